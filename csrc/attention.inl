// Attention over paged keys and values.
//
// A unit of work is a block of query rows under all query heads of one kv head: "product rows", M = rows * heads / kv
// heads of them. They go through three stages, against all keys that they see (SlimAttention: one dimension is tiled,
// nothing is rescaled):
//
//   scores    s = (q . k) * scale, then softcap, then ALiBi; and their largest, the sink's included
//   weights   w = e^(s - largest), and their sum
//   products  sum of w * v, at the end divided by the sum of weights
//
// Whatever the block, the chunk, the thread or the instruction set, a row is the same bits:
//
// - q . k is one chain over the pairs (bf16) in order, or an exact integer (int8). The largest is exact in any order.
// - Keys are cut into partitions of 512 at absolute multiples. Inside one, each column of the products is one chain
//   over the keys in order and the sum of weights is sixteen chains, one a lane; partitions are then added in order.
//   Cutting a row along its keys (split_*) does the same operations.
// - Hidden keys weigh exactly +0 and every chain starts at +0, so whether a tile that a row does not see is left out or
//   computed, for the sake of other rows, changes nothing. Sums of partitions that start at +0 are never -0.
//
// Attention by parts (attend_partly) is for contexts that lie on several machines, each of which knows the largest of its
// own scores only. Its canonical order is another one, in which it does not show where a KV block lies:
//
// - Weights are relative to a whole power of two. Relative to another one they are the same numbers, rounded to bfloat16
//   or to codes alike, with other exponents: parts merge by exact factors. (Scores beyond 2^22 have no fractions that
//   could be kept.)
// - bfloat16: the sum of weights is that of the rounded ones, so that a single key keeps its value.
// - Products are one chain inside a KV block. Blocks are added in float64, which is exact for numbers of float32 that
//   differ by less than 2^29 in size, in any order, and after rounding to float32 almost certainly equal for others.
//
// Scores are kept times log2(e), which is folded into the scale: weights are then powers of two, whose reduction is
// exact.
//
// int8: queries are quantised a row and head to -127 .. 127, stored + 128 because the integer dot wants one unsigned
// side; 128 * (sum of the key's codes) comes off again. Weights are folded with the scale of their value, then
// quantised to 0 .. 255 with one step a row and tile: integers inside a tile, floats across tiles in order. The sum of
// weights is that of the weights before.
//
// What no token was written to yet, in the last tile of a sequence, may hold anything: its scores are masked, and its
// values are replaced by zeros in a copy of that tile. A token whose key or value is not finite is stored as a key of
// NaN and a value of zeros: who sees it becomes NaN, who does not see it stays as it is.

constexpr int64_t kPartitionTiles = kPartitionTokens / kTileTokens;
constexpr int64_t kMostProductRows = 64;  // more do not help: see attention_rows
constexpr int64_t kStripTiles = 12;       // tiles whose keys stay in the nearest cache while all product rows use them
constexpr int64_t kChunkTiles = 8;        // tiles whose values stay there while a block of product rows uses them
constexpr int64_t kAheadTiles = 8;        // tiles that are fetched before they are used

// Product rows that share the loads of a tile, and sums that are kept in registers.
#if defined(__AVX512BF16__)
constexpr int kBlockRows = 8, kSums = 24;
#elif defined(__AVX512F__)
constexpr int kBlockRows = 8, kSums = 16;
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int kBlockRows = 4, kSums = 4;
#else
constexpr int kBlockRows = 1, kSums = 1;  // where a vector is an array, unrolled code grows out of hand
#endif

constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// Tiles whose scores are computed together for `rows` product rows. int8 has one more sum a tile, of the key's codes.
constexpr int score_tiles(KvFormat format, int rows) {
    return larger(1, smaller(4, kSums / (format == KvFormat::int8 ? rows + 1 : rows)));
}
// Product rows and vectors of columns whose products are summed together. Wide rather than high: values then come from
// memory as they lie there. int8 has two sums, of integers (a tile) and of floats (a partition).
constexpr int kValueRows = kBlockRows == 8 ? 4 : kBlockRows;
constexpr int value_columns(KvFormat format, int rows) {
    return larger(1, smaller(4, kSums / (format == KvFormat::int8 ? 2 * rows : rows)));
}

// Both formats keep a tile as vectors of 16 words of 4 bytes: two bfloat16 or four codes.
constexpr int64_t word_values(KvFormat format) { return format == KvFormat::bf16 ? 2 : 4; }
constexpr int64_t weight_bytes(KvFormat format) { return format == KvFormat::bf16 ? 2 : 1; }

// Tiles of a paged sequence lie anywhere, 1 to 4 KiB each, too short for the hardware to guess. What is needed soon is
// fetched into L2: reading 2 KiB tiles on Zen 4, that is 15 GB/s instead of 5 without and 10 by way of L1. When memory
// cannot follow, L2 drops such requests, so what is needed next is fetched once more: one more GB/s where there is
// enough to compute meanwhile, less than nothing where there is not.
INLINE void fetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
INLINE void fetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }
constexpr bool fetches_twice(KvFormat format, int rows) { return format == KvFormat::bf16 && rows >= kValueRows; }

// Products of either format.
template <KvFormat format> struct SumOf { using type = F16; };
template <> struct SumOf<KvFormat::int8> { using type = I16; };
INLINE void clear(F16& sum) { sum = set_f(0.0f); }
INLINE void clear(I16& sum) { sum = set_i(0); }
INLINE F16 dot(F16 sum, B64 a, B64 b) { return dot_bf16(sum, a, b); }
INLINE I16 dot(I16 sum, B64 unsigned_codes, B64 codes) { return dot_us(sum, unsigned_codes, codes); }

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNegligible = 1e-30f;   // nothing is divided by less
constexpr float kMostBf16 = 3.389e38f;  // what is larger may round to infinity

// 2^(x - whole) for x <= whole + 1/2 or NaN, `lowest` being whole - 127: exactly 1 at `whole`, 0 from `lowest` down and a
// denormal number, which counts as zero, just above. Another `whole` changes the exponent of the result and nothing else.
// The polynomial is the best of its degree on [-1/2, 1/2]; its relative error of 2^-18 is far below that of the weights
// in the form that they are multiplied in, 2^-9.
INLINE F16 exp2_f(F16 x, F16 lowest, I16 whole) {
    const F16 bounded = max_f(lowest, x);  // in this order NaN stays NaN
    const I16 n = round_to_i(bounded);
    const F16 r = bounded - to_f(n);
    const F16 square = r * r;
    const F16 low = set_f(1.0f) + r * set_f(0.6931241751f);
    const F16 high = (set_f(0.2402409911f) + r * set_f(0.05590642616f)) + square * set_f(0.009582852945f);
    return as_f(as_i(low + square * high) + shift_left_i<23>(n - whole));
}
// Weights as bfloat16.
INLINE void store_weights(uint16_t* p, F16 weights) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(weights.v));
#else
    store_bf16(p, weights);
#endif
}
// The larger one; `b` if `a` is NaN.
INLINE float larger_or(float a, float b) { return a > b ? a : b; }
INLINE float exp2_of(float x, int32_t whole = 0) {
    float lanes[16];
    store_f(lanes, exp2_f(set_f(x), set_f(static_cast<float>(whole) - 127.0f), set_i(whole)));
    return lanes[0];
}

// ---- storing --------------------------------------------------------------------------------------------------------

// Symmetric codes -127 .. 127 of a vector: value = code * step.
struct Scale {
    float step, inverse;
    bool finite;
};
INLINE Scale scale_of(const float* values, int64_t count) {
    F16 largest = set_f(0.0f), spoiled = set_f(0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        const F16 value = load_f(values + i);
        largest = max_f(largest, abs_f(value));
        spoiled = spoiled + (value - value);  // NaN for what is not finite
    }
    const float bound = max_of(largest);
    const bool finite = sum_of(spoiled) == 0.0f && bound < kMostBf16;
    const bool codes = finite && bound > kNegligible;
    return {codes ? bound / 127.0f : 0.0f, codes ? 127.0f / bound : 0.0f, finite};
}

static void append_kv(const KvMemory& memory, int64_t layer, const int32_t* table, int64_t position, const float* key,
                      const float* value) {
    const KvLayout& layout = memory.layout;
    const int64_t dim = layout.dim, slot = position % kTileTokens;
    const uint32_t nan_pair = 0x7fc07fc0u, no_codes = 0;
    for (int64_t head = 0; head < layout.heads; ++head, key += dim, value += dim) {
        std::byte* key_tile = memory.tile(table, layer, 0, head, position);
        std::byte* value_tile = memory.tile(table, layer, 1, head, position);
        const Scale key_scale = scale_of(key, dim), value_scale = scale_of(value, dim);
        const bool finite = key_scale.finite && value_scale.finite;
        if (layout.format == KvFormat::bf16) {
            std::byte* pairs = value_tile + slot / 2 * 4 * dim + slot % 2 * 2;
            for (int64_t i = 0; i < dim; i += 16) {
                uint16_t halves[16];
                store_bf16(halves, load_f(key + i));
                for (int64_t word = 0; word < 8; ++word)
                    __builtin_memcpy(key_tile + ((i / 2 + word) * kTileTokens + slot) * 4,
                                     finite ? static_cast<const void*>(halves + 2 * word) : &nan_pair, 4);
                store_bf16(halves, finite ? load_f(value + i) : set_f(0.0f));
                for (int64_t j = 0; j < 16; ++j) __builtin_memcpy(pairs + 4 * (i + j), halves + j, 2);
            }
        } else {
            std::byte* quads = value_tile + slot / 4 * 4 * dim + slot % 4;
            for (int64_t i = 0; i < dim; i += 16) {
                std::byte codes[16];
                store_i8(codes, round_to_i(load_f(key + i) * set_f(key_scale.inverse)));
                for (int64_t word = 0; word < 4; ++word)
                    __builtin_memcpy(key_tile + ((i / 4 + word) * kTileTokens + slot) * 4,
                                     finite ? static_cast<const void*>(codes + 4 * word) : &no_codes, 4);
                store_i8(codes, finite ? round_to_i(load_f(value + i) * set_f(value_scale.inverse)) : set_i(0));
                for (int64_t j = 0; j < 16; ++j) quads[4 * (i + j)] = codes[j];
            }
            const float key_step = finite ? key_scale.step : __builtin_nanf("");
            const float value_step = finite ? value_scale.step : 0.0f;
            __builtin_memcpy(key_tile + kTileTokens * dim + 4 * slot, &key_step, 4);
            __builtin_memcpy(value_tile + kTileTokens * dim + 4 * slot, &value_step, 4);
        }
    }
}

// ---- units ----------------------------------------------------------------------------------------------------------

// A query row under one query head.
struct ProductRow {
    int64_t first, end;  // keys that it sees
    float slope;         // what a key's position adds
    float sink;          // minus infinity: none
    float peak;          // the largest score, or the sink
    float base;          // a score weighs 2^((score - base) - whole)
    int32_t whole;
    float sum;           // of weights
    float* out;
};

struct Unit {
    const AttentionShape* shape;
    int64_t rows;                    // product rows, query row after query row
    int64_t begin, end;              // tiles
    int64_t origin;                  // the tile whose scores come first
    int64_t stride;                  // floats between the scores of two product rows
    AttentionCount* count;
    ProductRow* row;
    const std::byte** keys;          // tile t: keys[t - begin]
    const std::byte** values;        // right behind the keys: the first are fetched while the last keys are used
    std::byte* last_values;          // the sequence's last tile of values with its unwritten tokens cleared
    std::byte* queries;              // for each block of product rows [words][kBlockRows][4 bytes]
    float* factors;                  // [rows], int8: what turns q . k times the key's step into a score
    float* peaks;                    // [rows][16]
    std::byte* weights;              // [kBlockRows][512]
    float* steps;                    // [kBlockRows][32 tiles], int8 only
    float* partial;                  // [kBlockRows][dim]
    float* scores;                   // [rows][stride]
};

INLINE int64_t first_key(const AttentionShape& shape, int64_t position) {
    int64_t first = 0;
    if (shape.window_tokens > 0) first = larger(first, position - shape.window_tokens + 1);
    if (shape.chunk_tokens > 0) first = larger(first, position - position % shape.chunk_tokens);
    return first;
}

INLINE int64_t tiles_of(int64_t keys) { return (keys + kTileTokens - 1) / kTileTokens; }
// An odd number of cache lines: the same tile of several rows then does not fall into one set of the cache.
INLINE int64_t score_stride(int64_t tiles) { return (tiles | 1) * kTileTokens; }

struct Cutter {
    std::byte* base;
    int64_t used;
};
template <class T> INLINE T* cut(Cutter& cutter, int64_t count) {
    std::byte* piece = cutter.base + cutter.used;
    cutter.used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
}

// Gives a unit its scratch memory, the scores last; returns how much that is. `tiles`: of which it needs the addresses;
// `kept_tiles`: whose scores it keeps.
INLINE int64_t lay_out(Unit& unit, KvFormat format, int64_t dim, int64_t rows, int64_t tiles, int64_t kept_tiles,
                       std::byte* scratch) {
    Cutter cutter{scratch, 0};
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    unit.rows = rows;
    unit.stride = score_stride(kept_tiles);
    unit.count = cut<AttentionCount>(cutter, 1);
    unit.row = cut<ProductRow>(cutter, rows);
    unit.keys = cut<const std::byte*>(cutter, 2 * tiles + kAheadTiles);
    unit.values = unit.keys + tiles;
    unit.last_values = cut<std::byte>(cutter, tile_bytes(format, dim));
    unit.queries = cut<std::byte>(cutter, blocks * kBlockRows * dim * weight_bytes(format));
    unit.factors = cut<float>(cutter, blocks * kBlockRows);
    unit.peaks = cut<float>(cutter, rows * 16);
    unit.weights = cut<std::byte>(cutter, kBlockRows * kPartitionTokens * weight_bytes(format));
    unit.steps = cut<float>(cutter, kBlockRows * kPartitionTiles);
    unit.partial = cut<float>(cutter, kBlockRows * dim);
    unit.scores = cut<float>(cutter, rows * unit.stride);
    return cutter.used;
}

// What a product row sees and where its results go: query row `query` of the part, head `in_group` of the group.
INLINE ProductRow product_row(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t query,
                              int64_t in_group) {
    const AttentionShape& shape = work.shape;
    const int64_t head = kv_head * (shape.heads / shape.kv_heads) + in_group;
    ProductRow row;
    row.first = first_key(shape, part.start + query);
    row.end = part.start + query + 1;
    row.slope = shape.slopes ? shape.slopes[head] * kLog2E : 0.0f;
    row.sink = shape.sinks ? shape.sinks[head] * kLog2E : -__builtin_inff();
    row.peak = row.sink;
    row.base = 0.0f;
    row.whole = 0;
    row.sum = 0.0f;
    row.out = work.out + (part.row + query) * work.out_stride + head * shape.dim;
    return row;
}
INLINE void find_rows(Unit& unit, const AttentionWork& work, const SequencePart& part, int64_t kv_head,
                      int64_t row_begin) {
    const int64_t group = work.shape.heads / work.shape.kv_heads;
    for (int64_t i = 0; i < unit.rows; ++i)
        unit.row[i] = product_row(work, part, kv_head, row_begin + i / group, i % group);
}

// The values of the last of `count` tiles, of which `written` tokens are written, with the others cleared, in a copy.
INLINE void clear_unwritten(Unit& unit, const KvLayout& layout, int64_t count, int64_t written) {
    __builtin_memcpy(unit.last_values, unit.values[count - 1], tile_bytes(layout.format, layout.dim));
    const int64_t together = word_values(layout.format), size = weight_bytes(layout.format);
    for (int64_t slot = written; slot < kTileTokens; ++slot) {
        std::byte* word = unit.last_values + slot / together * 4 * layout.dim + slot % together * size;
        for (int64_t i = 0; i < layout.dim; ++i) __builtin_memset(word + 4 * i, 0, size);
        if (layout.format == KvFormat::int8)
            __builtin_memset(unit.last_values + kTileTokens * layout.dim + 4 * slot, 0, 4);
    }
    unit.values[count - 1] = unit.last_values;
}
// Who fetches ahead of the last tile fetches it again.
INLINE void repeat_last(Unit& unit, int64_t count) {
    for (int64_t i = 0; i < kAheadTiles; ++i) unit.values[count + i] = unit.values[count - 1];
}

// Where the tiles [begin, end) are.
INLINE void find_tiles(Unit& unit, const AttentionWork& work, const SequencePart& part, int64_t kv_head) {
    const KvLayout& layout = work.memory.layout;
    const int64_t bytes = tile_bytes(layout.format, layout.dim), per_block = layout.block_tokens / kTileTokens;
    const int64_t page = (work.layer * 2 * layout.heads + kv_head) * layout.head_bytes();
    const int64_t plane = layout.heads * layout.head_bytes();
    for (int64_t tile = unit.begin; tile < unit.end;) {
        const int64_t block = tile / per_block;
        const std::byte* keys = work.memory.data + part.table[block] * layout.extent_bytes() + page;
        int64_t inside = tile - block * per_block;
        for (; inside < per_block && tile < unit.end; ++inside, ++tile) {
            unit.keys[tile - unit.begin] = keys + inside * bytes;
            unit.values[tile - unit.begin] = keys + plane + inside * bytes;
        }
    }
    const int64_t count = unit.end - unit.begin, written = part.start + part.tokens;
    if (unit.end == tiles_of(written) && written % kTileTokens != 0)
        clear_unwritten(unit, layout, count, written % kTileTokens);
    repeat_last(unit, count);
}

template <KvFormat format>
INLINE void pack_queries(Unit& unit, const AttentionWork& work, const SequencePart& part, int64_t kv_head,
                         int64_t row_begin) {
    const int64_t dim = work.shape.dim, group = work.shape.heads / work.shape.kv_heads;
    const float factor = work.shape.softcap > 0.0f ? work.shape.scale : work.shape.scale * kLog2E;
    constexpr int64_t words_of_16 = 16 / word_values(format);
    for (int64_t i = 0; i < unit.rows; ++i) {
        const float* query = work.queries + (part.row + row_begin + i / group) * work.query_stride +
                             (kv_head * group + i % group) * dim;
        const int64_t in_block = i % kBlockRows;
        std::byte* packed = unit.queries + (i - in_block) * dim * weight_bytes(format) + in_block * 4;
        Scale scale{};
        if constexpr (format == KvFormat::int8) {
            scale = scale_of(query, dim);
            unit.factors[i] = factor * (scale.finite ? scale.step : __builtin_nanf(""));
        }
        for (int64_t j = 0; j < dim; j += 16) {
            uint32_t words[words_of_16];
            if constexpr (format == KvFormat::bf16)
                store_bf16(reinterpret_cast<uint16_t*>(words), load_f(query + j) * set_f(factor));
            else
                store_i8(words, round_to_i(load_f(query + j) * set_f(scale.inverse)) + set_i(128));
            for (int64_t word = 0; word < words_of_16; ++word, packed += 4 * kBlockRows)
                __builtin_memcpy(packed, words + word, 4);
        }
    }
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// Scores of R product rows and T tiles, before softcap and what follows it.
template <KvFormat format, int R, int T>
INLINE void dot_tiles(const std::byte* queries, const float* factors, int64_t words, const std::byte* const* tiles,
                      float* scores, int64_t stride) {
    using Sum = typename SumOf<format>::type;
    Sum sums[R][T];
    [[maybe_unused]] I16 excess[T];  // int8: 128 for each of the key's codes
    const uint32_t four_128 = 0x80808080u;
    [[maybe_unused]] const B64 all_128 = repeat4(&four_128);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        excess[t] = set_i(0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) clear(sums[r][t]);
    }
    for (int64_t word = 0; word < words; ++word) {
        B64 keys[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            keys[t] = load_b(tiles[t] + 64 * word);
            fetch_far(tiles[kAheadTiles + t] + 64 * word);
            if constexpr (fetches_twice(format, R)) fetch_near(tiles[T + t] + 64 * word);
            if constexpr (format == KvFormat::int8) excess[t] = dot_us(excess[t], all_128, keys[t]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const B64 query = repeat4(queries + (word * kBlockRows + r) * 4);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sums[r][t] = dot(sums[r][t], query, keys[t]);
        }
    }
    for (int t = 0; t < T; ++t) {
        if constexpr (format == KvFormat::int8) {
            const void* steps = tiles[t] + 64 * words;
            const F16 key_steps = load_f(static_cast<const float*>(steps));
            fetch_far(tiles[kAheadTiles + t] + 64 * words);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                store_f(scores + r * stride + 16 * t, to_f(sums[r][t] - excess[t]) * (key_steps * set_f(factors[r])));
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) store_f(scores + r * stride + 16 * t, sums[r][t]);
        }
    }
}

template <KvFormat format, int R>
INLINE void dot_all_tiles(int64_t rows, const std::byte* queries, const float* factors, int64_t words,
                          const std::byte* const* tiles, int64_t count, float* scores, int64_t stride) {
    if constexpr (R > 1) {
        if (rows < R) {
            dot_all_tiles<format, R - 1>(rows, queries, factors, words, tiles, count, scores, stride);
            return;
        }
    }
    constexpr int T = score_tiles(format, R);
    int64_t done = 0;
    for (; done + T <= count; done += T)
        dot_tiles<format, R, T>(queries, factors, words, tiles + done, scores + 16 * done, stride);
    if constexpr (T > 1)
        for (; done < count; ++done)
            dot_tiles<format, R, 1>(queries, factors, words, tiles + done, scores + 16 * done, stride);
}

INLINE F16 lane_numbers() {
    static const float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_f(numbers);
}
// Minus infinity where the row does not see the key.
INLINE F16 hide_unseen(F16 scores, int64_t first_token, const ProductRow& row) {
    const F16 lanes = lane_numbers(), hidden = set_f(-__builtin_inff());
    const F16 from_first = select_gt_f(set_f(static_cast<float>(row.first - first_token)), lanes, hidden, scores);
    return select_gt_f(set_f(static_cast<float>(row.end - first_token)), lanes, from_first, hidden);
}

// Scores of the block of product rows from `first_row`, for those of the tiles [begin, end) that any of them sees.
template <KvFormat format>
static void score_block(const Unit& unit, int64_t first_row, int64_t begin, int64_t end) {
    const AttentionShape& shape = *unit.shape;
    const int64_t rows = smaller(kBlockRows, unit.rows - first_row);
    const int64_t first_tile = unit.row[first_row].first / kTileTokens;
    const int64_t end_tile = tiles_of(unit.row[first_row + rows - 1].end);
    begin = larger(begin, first_tile);
    end = smaller(end, end_tile);
    if (begin >= end) return;
    unit.count->scored += rows * (end - begin);
    const std::byte* const* tiles = unit.keys + (begin - unit.begin);
    float* scores = unit.scores + first_row * unit.stride + (begin - unit.origin) * kTileTokens;
    dot_all_tiles<format, kBlockRows>(rows, unit.queries + first_row * shape.dim * weight_bytes(format),
                                      unit.factors + first_row, shape.dim / word_values(format), tiles, end - begin,
                                      scores, unit.stride);
    const float softcap = shape.softcap;
    const bool has_slopes = shape.slopes != nullptr, plain = softcap <= 0.0f && !has_slopes;
    for (int64_t r = 0; r < rows; ++r) {
        const ProductRow row = unit.row[first_row + r];
        float* row_scores = scores + r * unit.stride;
        float* row_peaks = unit.peaks + (first_row + r) * 16;
        F16 peaks = load_f(row_peaks);
        for (int64_t i = 0; i < end - begin; ++i, row_scores += kTileTokens) {
            const int64_t token = (begin + i) * kTileTokens;
            const bool seen = token >= row.first && token + kTileTokens <= row.end;
            F16 score = load_f(row_scores);
            if (!plain || !seen) {
                if (softcap > 0.0f) score = tanh_f(score / set_f(softcap)) * set_f(softcap * kLog2E);
                if (has_slopes)
                    score = score + (set_f(static_cast<float>(token)) + lane_numbers()) * set_f(row.slope);
                if (!seen) score = hide_unseen(score, token, row);
                store_f(row_scores, score);
            }
            peaks = max_f(score, peaks);  // in this order NaN is passed over
        }
        store_f(row_peaks, peaks);
    }
}

INLINE void clear_peaks(const Unit& unit) {
    for (int64_t i = 0; i < unit.rows; ++i) store_f(unit.peaks + 16 * i, set_f(-__builtin_inff()));
}

// ---- weights and products -------------------------------------------------------------------------------------------

// Lane i: the largest of the sixteen numbers from rows + 16 * i.
INLINE F16 row_maxima(const float* rows) {
#if defined(__AVX512F__)
    __m512 half[8], quarter[4], eighth[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = _mm512_loadu_ps(rows + 16 * i), b = _mm512_loadu_ps(rows + 16 * (i + 8));
        half[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        quarter[i] = _mm512_max_ps(_mm512_shuffle_f32x4(half[i], half[i + 4], 0x88),
                                   _mm512_shuffle_f32x4(half[i], half[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        eighth[i] = _mm512_max_ps(_mm512_shuffle_ps(quarter[i], quarter[i + 2], 0x44),
                                  _mm512_shuffle_ps(quarter[i], quarter[i + 2], 0xee));
    const __m512 all = _mm512_max_ps(_mm512_shuffle_ps(eighth[0], eighth[1], 0x88),
                                     _mm512_shuffle_ps(eighth[0], eighth[1], 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return {_mm512_permutexvar_ps(order, all)};
#else
    float maxima[16];
    for (int i = 0; i < 16; ++i) maxima[i] = max_of(load_f(rows + 16 * i));
    return load_f(maxima);
#endif
}

// Sums of weights: sixteen chains, one a lane; in float64 where they are of several KV blocks.
template <class Sum> struct LaneSums;
template <> struct LaneSums<float> {
    F16 lanes = set_f(0.0f);
    inline __attribute__((always_inline)) void add(F16 weights) { lanes = lanes + weights; }
    inline __attribute__((always_inline)) float total() const { return sum_of(lanes); }
};
template <> struct LaneSums<double> {
    double lanes[16] = {};
    inline __attribute__((always_inline)) void add(F16 weights) {
        float values[16];
        store_f(values, weights);
        for (int i = 0; i < 16; ++i) lanes[i] += static_cast<double>(values[i]);
    }
    inline __attribute__((always_inline)) double total() const {
        double sum = 0.0;
        for (double lane : lanes) sum += lane;
        return sum;
    }
};

// Weights of a block of product rows for the tiles [begin, end) of one partition; their sums [rows].
template <KvFormat format, class Sum>
static void weigh_block(const Unit& unit, int64_t first_row, int64_t rows, int64_t begin, int64_t end,
                        Sum* sums) {
    const int64_t count = end - begin;
    const std::byte* const* tiles = unit.values + (begin - unit.begin);
    unit.count->weighed += rows * count;
    [[maybe_unused]] float value_steps[kPartitionTokens];
    if constexpr (format == KvFormat::int8)
        for (int64_t i = 0; i < count; ++i)
            __builtin_memcpy(value_steps + 16 * i, tiles[i] + kTileTokens * unit.shape->dim, 64);
    for (int64_t r = 0; r < rows; ++r) {
        const ProductRow& row = unit.row[first_row + r];
        const F16 base = set_f(row.base), lowest = set_f(static_cast<float>(row.whole) - 127.0f);
        const I16 whole = set_i(row.whole);
        const float* scores = unit.scores + (first_row + r) * unit.stride + (begin - unit.origin) * kTileTokens;
        LaneSums<Sum> sum;
        if constexpr (format == KvFormat::bf16) {
            uint16_t* weights = reinterpret_cast<uint16_t*>(unit.weights) + r * kPartitionTokens;
            for (int64_t i = 0; i < count; ++i) {
                const F16 weight = exp2_f(load_f(scores + 16 * i) - base, lowest, whole);
                store_weights(weights + 16 * i, weight);
                // Where the largest weight is not exactly 1, what divides is what was multiplied.
                sum.add(sizeof(Sum) == sizeof(double) ? load_bf16(weights + 16 * i) : weight);
            }
        } else {
            std::byte* codes = unit.weights + r * kPartitionTokens;
            float* steps = unit.steps + r * kPartitionTiles;
            float folded[kPartitionTokens], inverses[kPartitionTiles];
            for (int64_t i = 0; i < count; ++i) {
                const F16 weight = exp2_f(load_f(scores + 16 * i) - base, lowest, whole);
                sum.add(weight);
                store_f(folded + 16 * i, weight * load_f(value_steps + 16 * i));
            }
            for (int64_t i = count; i % 16 != 0; ++i) store_f(folded + 16 * i, set_f(0.0f));
            for (int64_t i = 0; i < count; i += 16) {
                const F16 largest = row_maxima(folded + 16 * i);
                store_f(steps + i, largest * set_f(1.0f / 255.0f));
                store_f(inverses + i,
                        select_gt_f(largest, set_f(kNegligible), set_f(255.0f) / largest, set_f(0.0f)));
            }
            for (int64_t i = 0; i < count; ++i)
                store_i8(codes + 16 * i, round_to_i(load_f(folded + 16 * i) * set_f(inverses[i])));
        }
        sums[r] = sum.total();
    }
}

// Weights and values that are multiplied in one pass.
struct Pass {
    const std::byte* weights;         // [product rows][512]
    const float* steps;               // [product rows][32 tiles], int8 only
    const std::byte* const* tiles;    // of values
    int64_t count, dim;
    int64_t fetch_first, fetch_step;  // at which of the tiles one further ahead is fetched
    float* partial;                   // [product rows][stride]
    int64_t stride;
};

// Adds R product rows' weights times values to their sums, for C vectors of columns from `column` on.
template <KvFormat format, int R, int C>
INLINE void add_values(const Pass& pass, int64_t column) {
    constexpr int words = 16 / word_values(format);
    constexpr int64_t row_bytes = kPartitionTokens * weight_bytes(format);
    const int64_t word_bytes = 4 * pass.dim;
    F16 totals[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) totals[r][c] = load_f(pass.partial + r * pass.stride + column + 16 * c);
    int64_t fetch_next = pass.fetch_first;
    for (int64_t tile = 0; tile < pass.count; ++tile) {
        const std::byte* here = pass.tiles[tile] + 4 * column;
        [[maybe_unused]] const std::byte* next = pass.tiles[tile + 1] + 4 * column;
        const std::byte* ahead = here;  // is there already: no branch, and nothing to wait for
        if (tile == fetch_next) {
            ahead = pass.tiles[tile + kAheadTiles] + 4 * column;
            fetch_next += pass.fetch_step;
        }
        const std::byte* weights = pass.weights + tile * kTileTokens * weight_bytes(format);
        [[maybe_unused]] I16 sums[R][C];
        if constexpr (format == KvFormat::int8) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) sums[r][c] = set_i(0);
        }
#pragma GCC unroll 4
        for (int word = 0; word < words; ++word) {
            B64 values[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                values[c] = load_b(here + word * word_bytes + 64 * c);
                fetch_far(ahead + word * word_bytes + 64 * c);
                if constexpr (fetches_twice(format, R)) fetch_near(next + word * word_bytes + 64 * c);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const B64 weight = repeat4(weights + r * row_bytes + word * 4);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    if constexpr (format == KvFormat::bf16)
                        totals[r][c] = dot_bf16(totals[r][c], weight, values[c]);
                    else
                        sums[r][c] = dot_us(sums[r][c], weight, values[c]);
                }
            }
        }
        if constexpr (format == KvFormat::int8) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const F16 step = set_f(pass.steps[r * kPartitionTiles + tile]);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) totals[r][c] = totals[r][c] + to_f(sums[r][c]) * step;
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store_f(pass.partial + r * pass.stride + column + 16 * c, totals[r][c]);
}

template <KvFormat format, int R>
INLINE void add_all_columns(const Pass& pass, int64_t rows) {
    if constexpr (R > 1) {
        if (rows < R) return add_all_columns<format, R - 1>(pass, rows);
    }
    // As few steps as possible, of as equal width as possible: 5 vectors are 3 and 2, not 4 and 1.
    constexpr int C = value_columns(format, R);
    int64_t column = 0;
    for (int64_t left = pass.dim / 16; left > 0;) {
        const int64_t steps = (left + C - 1) / C, width = (left + steps - 1) / steps;
        if (width == 4)
            add_values<format, R, smaller(C, 4)>(pass, column);
        else if (width == 3)
            add_values<format, R, smaller(C, 3)>(pass, column);
        else if (width == 2)
            add_values<format, R, smaller(C, 2)>(pass, column);
        else
            add_values<format, R, 1>(pass, column);
        column += 16 * width;
        left -= width;
    }
}

// Weighted values of a block of product rows over the tiles [begin, end) of one partition -> partial [rows][stride]. The
// weights are those of the tiles from `weighed` on.
template <KvFormat format>
static void multiply_block(const Unit& unit, int64_t first_row, int64_t rows, int64_t weighed, int64_t begin,
                           int64_t end, float* partial, int64_t stride) {
    const int64_t dim = unit.shape->dim;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < dim; i += 16) store_f(partial + r * stride + i, set_f(0.0f));
    // The first block brings values from memory: a few tiles at a time, so that they stay near until all its rows have
    // used them, and every pass over its rows fetches some of the next, so that memory does not rest.
    const bool fetches = first_row == 0;
    const int64_t chunk = fetches ? kChunkTiles : kPartitionTiles, passes = (rows + kValueRows - 1) / kValueRows;
    for (int64_t tile = begin; tile < end; tile += chunk) {
        for (int64_t number = 0; number < passes; ++number) {
            const int64_t r = number * kValueRows;
            Pass pass;
            pass.weights = unit.weights + (r * kPartitionTokens + (tile - weighed) * kTileTokens) * weight_bytes(format);
            pass.steps = unit.steps + r * kPartitionTiles + (tile - weighed);
            pass.tiles = unit.values + (tile - unit.begin);
            pass.count = smaller(chunk, end - tile);
            pass.dim = dim;
            pass.fetch_first = fetches ? number : pass.count;
            pass.fetch_step = passes;
            pass.partial = partial + r * stride;
            pass.stride = stride;
            add_all_columns<format, kValueRows>(pass, smaller(kValueRows, rows - r));
        }
    }
}

INLINE void add_to(float* out, const float* partial, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) store_f(out + i, load_f(out + i) + load_f(partial + i));
}

INLINE void clear_out(const ProductRow& row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) store_f(row.out + i, set_f(0.0f));
}
INLINE void finish_row(const ProductRow& row, int64_t dim, bool has_sink) {
    const float total = has_sink ? row.sum + exp2_of(row.sink - row.base, row.whole) : row.sum;
    for (int64_t i = 0; i < dim; i += 16) store_f(row.out + i, load_f(row.out + i) / set_f(total));
}

// ---- whole rows -----------------------------------------------------------------------------------------------------

template <KvFormat format>
static void attend_as(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t row_begin,
                      int64_t row_end, std::byte* scratch) {
    const AttentionShape& shape = work.shape;
    const int64_t dim = shape.dim;
    Unit unit;
    unit.shape = &shape;
    unit.begin = unit.origin = first_key(shape, part.start + row_begin) / kTileTokens;
    unit.end = tiles_of(part.start + row_end);
    const int64_t tiles = unit.end - unit.begin;
    lay_out(unit, format, dim, (row_end - row_begin) * (shape.heads / shape.kv_heads), tiles, tiles, scratch);
    *unit.count = {};
    find_rows(unit, work, part, kv_head, row_begin);
    find_tiles(unit, work, part, kv_head);
    pack_queries<format>(unit, work, part, kv_head, row_begin);
    clear_peaks(unit);
    for (int64_t tile = unit.begin; tile < unit.end; tile += kStripTiles)
        for (int64_t block = 0; block < unit.rows; block += kBlockRows)
            score_block<format>(unit, block, tile, tile + kStripTiles);
    for (int64_t i = 0; i < unit.rows; ++i) {
        unit.row[i].peak = larger_or(max_of(load_f(unit.peaks + 16 * i)), unit.row[i].sink);
        unit.row[i].base = unit.row[i].peak;
        clear_out(unit.row[i], dim);
    }
    for (int64_t part_begin = unit.begin / kPartitionTiles * kPartitionTiles; part_begin < unit.end;
         part_begin += kPartitionTiles) {
        for (int64_t block = 0; block < unit.rows; block += kBlockRows) {
            const int64_t rows = smaller(kBlockRows, unit.rows - block);
            const int64_t first_tile = unit.row[block].first / kTileTokens;
            const int64_t end_tile = tiles_of(unit.row[block + rows - 1].end);
            const int64_t begin = larger(part_begin, first_tile);
            const int64_t end = smaller(part_begin + kPartitionTiles, end_tile);
            if (begin >= end) continue;
            float sums[kBlockRows];
            weigh_block<format>(unit, block, rows, begin, end, sums);
            multiply_block<format>(unit, block, rows, begin, begin, end, unit.partial, dim);
            for (int64_t r = 0; r < rows; ++r) {
                unit.row[block + r].sum = unit.row[block + r].sum + sums[r];
                add_to(unit.row[block + r].out, unit.partial + r * dim, dim);
            }
        }
    }
    for (int64_t i = 0; i < unit.rows; ++i) finish_row(unit.row[i], dim, shape.sinks != nullptr);
}

static void attend(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t row_begin,
                   int64_t row_end, std::byte* scratch) {
    if (work.memory.layout.format == KvFormat::bf16)
        attend_as<KvFormat::bf16>(work, part, kv_head, row_begin, row_end, scratch);
    else
        attend_as<KvFormat::int8>(work, part, kv_head, row_begin, row_end, scratch);
}

// More product rows read the keys and values less often, and need more memory for their scores. Half of the L2 cache is
// for scores, the rest for what passes through. (He et al. 2024 divide what a head's keys and values leave of L2, and
// take all rows at once where they leave nothing; their scores then fill megabytes. Here they always have half.) Beyond
// 64 product rows nothing is gained: reading a tile then costs 1/8 of computing with it. Less than a block of product
// rows is never worth it, even if their scores do fill L2: at 32,768 keys 4 were 3 to 13 % slower than 8.
static int64_t attention_rows(const AttentionShape& shape, KvFormat, int64_t keys, int64_t l2_bytes) {
    const int64_t group = shape.heads / shape.kv_heads;
    int64_t seen = keys;
    if (shape.window_tokens > 0) seen = smaller(seen, shape.window_tokens + kMostProductRows);
    if (shape.chunk_tokens > 0) seen = smaller(seen, shape.chunk_tokens + kMostProductRows);
    const int64_t products = smaller(kMostProductRows, l2_bytes / 2 / (tiles_of(seen) * kTileTokens * 4));
    return larger(1, larger(products / kBlockRows, 1) * kBlockRows / group);
}

static int64_t attention_scratch_bytes(const AttentionShape& shape, KvFormat format, int64_t most_keys) {
    Unit unit;
    const int64_t group = shape.heads / shape.kv_heads, tiles = tiles_of(most_keys);
    return lay_out(unit, format, shape.dim, larger(group, kMostProductRows), tiles, tiles, nullptr);
}

// ---- one row, cut along its keys ------------------------------------------------------------------------------------

// The tiles of a partition that the part's only row sees; none: begin >= end.
INLINE void cut_out(Unit& unit, const AttentionShape& shape, const SequencePart& part, int64_t partition) {
    const int64_t first = first_key(shape, part.start) / kTileTokens, end = tiles_of(part.start + 1);
    const int64_t from = partition * kPartitionTiles, to = from + kPartitionTiles;
    unit.shape = &shape;
    unit.begin = larger(from, first);
    unit.end = smaller(to, end);
}

INLINE int64_t partitions_of(const SequencePart& part) { return part.start / kPartitionTokens + 1; }

// The largest score of a row of the group, the sink's included: behind a row's scores lie those of its partitions.
INLINE float split_peak(const ProductRow& row, int64_t in_group, const SequencePart& part, const float* scores) {
    const int64_t partitions = partitions_of(part);
    const float* peaks = scores + in_group * split_score_floats(part.start + 1) + partitions * kPartitionTokens;
    float peak = row.sink;
    for (int64_t p = row.first / kPartitionTokens; p < partitions; ++p) peak = larger_or(peaks[p], peak);
    return peak;
}

template <KvFormat format>
static void split_scores_as(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t partition,
                            float* scores, std::byte* scratch) {
    Unit unit;
    cut_out(unit, work.shape, part, partition);
    if (unit.begin >= unit.end) return;
    lay_out(unit, format, work.shape.dim, work.shape.heads / work.shape.kv_heads, unit.end - unit.begin, 0, scratch);
    unit.origin = 0;
    unit.stride = split_score_floats(part.start + 1);
    unit.scores = scores;
    find_rows(unit, work, part, kv_head, 0);
    find_tiles(unit, work, part, kv_head);
    pack_queries<format>(unit, work, part, kv_head, 0);
    clear_peaks(unit);
    for (int64_t block = 0; block < unit.rows; block += kBlockRows)
        score_block<format>(unit, block, unit.begin, unit.end);
    float* peaks = scores + partitions_of(part) * kPartitionTokens + partition;
    for (int64_t i = 0; i < unit.rows; ++i) peaks[i * unit.stride] = max_of(load_f(unit.peaks + 16 * i));
}

template <KvFormat format>
static void split_products_as(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t partition,
                              const float* scores, float* partial, std::byte* scratch) {
    const int64_t dim = work.shape.dim, group = work.shape.heads / work.shape.kv_heads;
    Unit unit;
    cut_out(unit, work.shape, part, partition);
    if (unit.begin >= unit.end) return;
    lay_out(unit, format, dim, group, unit.end - unit.begin, 0, scratch);
    unit.origin = 0;
    unit.stride = split_score_floats(part.start + 1);
    unit.scores = const_cast<float*>(scores);  // from here on they are only read
    find_rows(unit, work, part, kv_head, 0);
    find_tiles(unit, work, part, kv_head);
    for (int64_t i = 0; i < group; ++i) {
        unit.row[i].peak = split_peak(unit.row[i], i, part, scores);
        unit.row[i].base = unit.row[i].peak;
    }
    partial += partition * group * (dim + 1);
    for (int64_t block = 0; block < group; block += kBlockRows) {
        const int64_t rows = smaller(kBlockRows, group - block);
        float sums[kBlockRows];
        weigh_block<format>(unit, block, rows, unit.begin, unit.end, sums);
        multiply_block<format>(unit, block, rows, unit.begin, unit.begin, unit.end, partial + block * (dim + 1), dim + 1);
        for (int64_t r = 0; r < rows; ++r) partial[(block + r) * (dim + 1) + dim] = sums[r];
    }
}

static void split_scores(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t partition,
                         float* scores, std::byte* scratch) {
    if (work.memory.layout.format == KvFormat::bf16)
        split_scores_as<KvFormat::bf16>(work, part, kv_head, partition, scores, scratch);
    else
        split_scores_as<KvFormat::int8>(work, part, kv_head, partition, scores, scratch);
}

static void split_products(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t partition,
                           const float* scores, float* partial, std::byte* scratch) {
    if (work.memory.layout.format == KvFormat::bf16)
        split_products_as<KvFormat::bf16>(work, part, kv_head, partition, scores, partial, scratch);
    else
        split_products_as<KvFormat::int8>(work, part, kv_head, partition, scores, partial, scratch);
}

static void split_merge(const AttentionWork& work, const SequencePart& part, int64_t kv_head, const float* scores,
                        const float* partial) {
    const int64_t dim = work.shape.dim, group = work.shape.heads / work.shape.kv_heads;
    for (int64_t i = 0; i < group; ++i) {
        ProductRow row = product_row(work, part, kv_head, 0, i);
        row.peak = split_peak(row, i, part, scores);
        row.base = row.peak;
        clear_out(row, dim);
        for (int64_t p = row.first / kPartitionTokens; p < partitions_of(part); ++p) {
            const float* own = partial + (p * group + i) * (dim + 1);
            row.sum = row.sum + own[dim];
            add_to(row.out, own, dim);
        }
        finish_row(row, dim, work.shape.sinks != nullptr);
    }
}

// ---- a part of the context ------------------------------------------------------------------------------------------

INLINE int64_t tiles_per_block(const KvLayout& layout) { return layout.block_tokens / kTileTokens; }
// The place in the sequence, in tiles, of the tile `index` of these blocks, and back: the first of their tiles from there
// on.
INLINE int64_t place_of(const ContextBlocks& blocks, int64_t per_block, int64_t index) {
    return blocks.starts[index / per_block] / kTileTokens + index % per_block;
}
INLINE int64_t first_from(const ContextBlocks& blocks, int64_t per_block, int64_t place) {
    int64_t low = 0, high = blocks.count;  // the first block that ends behind the place
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (blocks.starts[middle] / kTileTokens + per_block > place)
            high = middle;
        else
            low = middle + 1;
    }
    if (low == blocks.count) return low * per_block;
    return low * per_block + larger(0, place - blocks.starts[low] / kTileTokens);
}

// Where the tiles with the numbers [begin, end) of the blocks are.
INLINE void find_listed_tiles(Unit& unit, const AttentionWork& work, const SequencePart& part,
                              const ContextBlocks& blocks, int64_t kv_head) {
    const KvLayout& layout = work.memory.layout;
    const int64_t bytes = tile_bytes(layout.format, layout.dim), per_block = tiles_per_block(layout);
    const int64_t page = (work.layer * 2 * layout.heads + kv_head) * layout.head_bytes();
    const int64_t plane = layout.heads * layout.head_bytes(), count = unit.end - unit.begin;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t index = unit.begin + i;
        unit.keys[i] = work.memory.data + blocks.kv_blocks[index / per_block] * layout.extent_bytes() + page +
                       index % per_block * bytes;
        unit.values[i] = unit.keys[i] + plane;
    }
    const int64_t written = part.start + part.tokens;
    if (place_of(blocks, per_block, unit.end - 1) + 1 == tiles_of(written) && written % kTileTokens != 0)
        clear_unwritten(unit, layout, count, written % kTileTokens);
    repeat_last(unit, count);
}

// What scores are relative to, once the largest is known: the whole number nearest to it, if it has a fraction left.
INLINE void choose_base(ProductRow& row) {
    constexpr float kMostWhole = 1 << 22;
    const bool rounds = row.peak < kMostWhole && row.peak > -kMostWhole;
    row.base = rounds ? 0.0f : row.peak;
    row.whole = rounds ? static_cast<int32_t>(__builtin_rintf(row.peak)) : 0;
}
INLINE void add_wide(double* out, const float* in, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] += static_cast<double>(in[i]);
}

// Tiles are counted through the blocks, wherever these lie in the sequence; where they lie matters to what a row sees.
template <KvFormat format>
static void attend_partly_as(const AttentionWork& work, const SequencePart& part, const ContextBlocks& blocks,
                             int64_t kv_head, int64_t row_begin, int64_t row_end, const PartialRows& out,
                             std::byte* scratch) {
    const AttentionShape& shape = work.shape;
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads, per_block = tiles_per_block(work.memory.layout);
    // Products are one chain inside a KV block, or inside 512 keys of a larger one; weights are made for 512 keys at once.
    const int64_t chain = smaller(per_block, kPartitionTiles);
    const auto chain_end = [&](int64_t tile) {
        const int64_t inside = tile % per_block;
        return tile + smaller(chain - inside % chain, per_block - inside);
    };
    const auto range_end_of = [&](int64_t tile) {
        return per_block > chain ? chain_end(tile) : (tile / per_block + kPartitionTiles / per_block) * per_block;
    };
    const auto from_place = [&](int64_t place) { return first_from(blocks, per_block, place); };
    const auto place = [&](int64_t index) { return place_of(blocks, per_block, index); };
    const int64_t first = from_place(first_key(shape, part.start + row_begin) / kTileTokens);
    const int64_t stop = larger(first, from_place(tiles_of(part.start + row_end)));
    Unit unit;
    unit.shape = &shape;
    lay_out(unit, format, dim, (row_end - row_begin) * group, stop - first, stop - first, scratch);
    *unit.count = {};
    find_rows(unit, work, part, kv_head, row_begin);
    const auto pair_of = [&](int64_t i) { return (row_begin + i / group) * shape.heads + kv_head * group + i % group; };
    for (int64_t i = 0; i < unit.rows; ++i) {
        out.weight[pair_of(i)] = 0.0;
        for (int64_t j = 0; j < dim; ++j) out.summed[pair_of(i) * dim + j] = 0.0;
    }
    clear_peaks(unit);
    if (first < stop) {
        unit.begin = first;
        unit.end = stop;
        find_listed_tiles(unit, work, part, blocks, kv_head);
        pack_queries<format>(unit, work, part, kv_head, row_begin);
    }
    // Scores want the places of tiles: blocks that lie side by side are gone through at once.
    for (int64_t index = first; index < stop;) {
        int64_t run_end = index + per_block - index % per_block;
        while (run_end < stop && place(run_end) == place(run_end - 1) + 1) run_end += per_block;
        run_end = smaller(run_end, stop);
        unit.begin = unit.origin = first + place(index) - index;
        for (; index < run_end; index += kStripTiles)
            for (int64_t block = 0; block < unit.rows; block += kBlockRows)
                score_block<format>(unit, block, place(index), place(index) + smaller(kStripTiles, run_end - index));
        index = run_end;
    }
    for (int64_t i = 0; i < unit.rows; ++i) {
        unit.row[i].peak = max_of(load_f(unit.peaks + 16 * i));
        choose_base(unit.row[i]);
        out.most[pair_of(i)] = static_cast<double>(unit.row[i].base) + unit.row[i].whole;
        if (!(unit.row[i].peak > -__builtin_inff())) unit.row[i].base = 0.0f;  // sees nothing: weights are 0, not NaN
    }
    unit.begin = unit.origin = first;
    for (int64_t index = first; index < stop;) {
        const int64_t range_end = smaller(stop, range_end_of(index));
        for (int64_t block = 0; block < unit.rows; block += kBlockRows) {
            const int64_t rows = smaller(kBlockRows, unit.rows - block);
            const int64_t begin = larger(index, from_place(unit.row[block].first / kTileTokens));
            const int64_t end = smaller(range_end, from_place(tiles_of(unit.row[block + rows - 1].end)));
            if (begin >= end) continue;
            double sums[kBlockRows];
            weigh_block<format>(unit, block, rows, begin, end, sums);
            for (int64_t r = 0; r < rows; ++r) out.weight[pair_of(block + r)] += sums[r];
            for (int64_t tile = begin; tile < end;) {
                const int64_t block_end = smaller(end, chain_end(tile));
                multiply_block<format>(unit, block, rows, begin, tile, block_end, unit.partial, dim);
                for (int64_t r = 0; r < rows; ++r)
                    add_wide(out.summed + pair_of(block + r) * dim, unit.partial + r * dim, dim);
                tile = block_end;
            }
        }
        index = range_end;
    }
}

static void attend_partly(const AttentionWork& work, const SequencePart& part, const ContextBlocks& blocks,
                          int64_t kv_head, int64_t row_begin, int64_t row_end, const PartialRows& out,
                          std::byte* scratch) {
    if (work.memory.layout.format == KvFormat::bf16)
        attend_partly_as<KvFormat::bf16>(work, part, blocks, kv_head, row_begin, row_end, out, scratch);
    else
        attend_partly_as<KvFormat::int8>(work, part, blocks, kv_head, row_begin, row_end, out, scratch);
}

// 2^x for x <= 0 or NaN, exactly for the whole numbers that parts are mostly relative to.
INLINE double exp2_wide(double x) {
    if (!(x >= -1022.0)) return x < 0.0 ? 0.0 : x;
    const auto whole = static_cast<int64_t>(x);
    if (static_cast<double>(whole) != x) return static_cast<double>(exp2_of(static_cast<float>(x)));
    const int64_t bits = (1023 + whole) << 52;
    double value;
    __builtin_memcpy(&value, &bits, 8);
    return value;
}

static void merge_parts(const PartialRows* parts, int64_t count, int64_t pair, int64_t dim, double* most,
                        double* weight, double* summed) {
    *most = -__builtin_inf();
    for (int64_t i = 0; i < count; ++i)
        if (parts[i].most[pair] > *most) *most = parts[i].most[pair];
    *weight = 0.0;
    for (int64_t j = 0; j < dim; ++j) summed[j] = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        if (parts[i].most[pair] == -__builtin_inf()) continue;  // has seen nothing
        const double factor = exp2_wide(parts[i].most[pair] - *most);
        const double* own = parts[i].summed + pair * dim;
        *weight += parts[i].weight[pair] * factor;
        for (int64_t j = 0; j < dim; ++j) summed[j] += own[j] * factor;
    }
}

static void finish_part(const AttentionShape& shape, int64_t head, double most, double weight, const double* summed,
                        float* out) {
    double factor = 1.0;
    if (shape.sinks) {
        ProductRow row;
        row.sink = shape.sinks[head] * kLog2E;
        row.peak = larger_or(static_cast<float>(most), row.sink);
        choose_base(row);
        factor = exp2_wide(most - row.base - row.whole);
        weight = weight * factor + static_cast<double>(exp2_of(row.sink - row.base, row.whole));
    }
    for (int64_t j = 0; j < shape.dim; ++j) out[j] = static_cast<float>(summed[j] * factor / weight);
}
