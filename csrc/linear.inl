// Linear maps: rows of activations times packed panels.
//
// A tile of a few rows keeps its sums in registers while it reads the panel once, from front to back. A sum is formed
// in one order, whatever the tile: bf16 pair after pair into one float; int8 in integers, which are exact; int4 in
// integers within a group, then group after group into one float. So a row's results do not depend on the rows beside
// it.
//
// Few rows wait for memory, where the processor's own prefetching is best left alone. With more rows than a tile has,
// the panel comes out of the cache again for each tile, and the tiles share the work of fetching what comes next.

constexpr int kVectors = kPanelColumns / 16;       // sixteen columns each
constexpr int64_t kStepBytes = kPanelColumns * 4;  // a word of four bytes for each column: 2, 4 or 8 inputs

// Rows of the largest tile, and vectors of columns whose sums a tile keeps in registers together where the panel is in
// the cache already. AVX-512 has room for all: 6 x 4 leave 8 registers for operands. Elsewhere the vectors take turns
// over pieces of the panel that stay in the nearest cache meanwhile. What comes from memory is read from front to back,
// at the price of sums that do not stay in registers: in turns, 2 to 4 rows ran at a third to a half of the speed.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTurnVectors = kVectors;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kTileRows = 4, kTurnVectors = 1;
#else
constexpr int kTileRows = 1, kTurnVectors = kVectors;  // plain loops: more would only take long to compile
#endif
constexpr int64_t kTurnSteps = 64;  // 16 KiB

constexpr float kNegligibleSize = 1e-30f;  // nothing is divided by less: it counts as zero

template <int number> struct Constant {
    constexpr operator int() const { return number; }
};
// body(0), body(1), .. body(count - 1), written out before the compiler decides what lives in registers.
template <int count, class Body> INLINE void each(const Body& body) {
    if constexpr (count > 0) {
        each<count - 1>(body);
        body(Constant<count - 1>{});
    }
}
#define EACH_BODY(index) [&](auto index) __attribute__((always_inline))

// ---- products -------------------------------------------------------------------------------------------------------

// What to fetch while a tile is computed. The tiles of a panel, T of them, each fetch a T-th of its length. The first
// starts at (T - 1) / T of its own panel, so it stays ahead of its own reads, and the last ends as far into the next
// panel: fetching never stops, and nothing is fetched long before it is used.
struct Ahead {
    const std::byte* from;
    int64_t step_bytes;
};
INLINE Ahead ahead_of(const std::byte* panel, int64_t bytes, int64_t tile, int64_t tiles) {
    if (tiles == 1) return {panel, 0};
    return {panel + bytes * (tiles - 1 + tile) / tiles, kStepBytes / tiles};
}

// Into the second cache: into the first it would push out what is in use there.
INLINE void prefetch_to_l2(const std::byte* p) { __builtin_prefetch(p, 0, 2); }

struct Tile {
    const std::byte* panel;
    int64_t padded_depth, group;
    const std::byte* codes[kTileRows];
    const float* scales[kTileRows];        // of the row's groups
    const int32_t* eight_sums[kTileRows];  // of the row's groups
    Ahead ahead;
    float* sums;  // [rows][64]
};

struct Bf16Product {
    static constexpr int64_t kInputs = 2;
    using Sum = F16;
    INLINE Sum zero() { return set_f(0.0f); }
    INLINE Sum add(Sum sum, B64 row, B64 column) { return dot_bf16(sum, row, column); }
    INLINE F16 value(Sum sum, const std::byte*, int) { return sum; }
};
struct Int8Product {
    static constexpr int64_t kInputs = 4;
    using Sum = I16;
    INLINE Sum zero() { return set_i(0); }
    INLINE Sum add(Sum sum, B64 row, B64 column) { return dot_us(sum, row, column); }
    // `end`: where the panel's codes end.
    INLINE F16 value(Sum sum, const std::byte* end, int vector) {
        const auto* corrections = reinterpret_cast<const int32_t*>(end) + kPanelColumns;
        return to_f(sum + load_i(corrections + 16 * vector));
    }
};

// Sums of `rows` rows; those of int8 without the scales.
template <class Product, int rows, int vectors>
static __attribute__((noinline)) void multiply(const Tile& tile) {
    typename Product::Sum sums[rows][kVectors];
    const std::byte* codes[rows];
    each<rows>(EACH_BODY(r) {
        codes[r] = tile.codes[r];
        each<kVectors>(EACH_BODY(v) { sums[r][v] = Product::zero(); });
    });
    const int64_t steps = tile.padded_depth / Product::kInputs;
    Ahead ahead = tile.ahead;
    const int64_t turn = vectors == kVectors ? steps : kTurnSteps;
    for (int64_t begin = 0; begin < steps; begin += turn) {
        const int64_t end = begin + turn < steps ? begin + turn : steps;
        for (int first = 0; first < kVectors; first += vectors) {
            typename Product::Sum part[rows][vectors];
            each<rows>(EACH_BODY(r) { each<vectors>(EACH_BODY(v) { part[r][v] = sums[r][first + v]; }); });
            const std::byte* weights = tile.panel + begin * kStepBytes + 64 * first;
            for (int64_t step = begin; step < end; ++step) {
                if (first == 0) {
                    prefetch_to_l2(ahead.from);
                    prefetch_to_l2(ahead.from + 64);
                    ahead.from += ahead.step_bytes;
                }
                B64 columns[vectors];
                each<vectors>(EACH_BODY(v) { columns[v] = load_b(weights + 64 * v); });
                each<rows>(EACH_BODY(r) {
                    const B64 row = repeat4(codes[r] + 4 * step);
                    each<vectors>(EACH_BODY(v) { part[r][v] = Product::add(part[r][v], row, columns[v]); });
                });
                weights += kStepBytes;
            }
            each<rows>(EACH_BODY(r) { each<vectors>(EACH_BODY(v) { sums[r][first + v] = part[r][v]; }); });
        }
    }
    const std::byte* codes_end = tile.panel + steps * kStepBytes;
    each<rows>(EACH_BODY(r) {
        each<kVectors>(EACH_BODY(v) {
            store_f(tile.sums + r * kPanelColumns + 16 * v, Product::value(sums[r][v], codes_end, v));
        });
    });
}

struct Int4Product {};
constexpr int64_t kInt4AheadBytes = 6144;
// Nibbles are taken apart in registers for every tile: with six rows the other operations hide it, and unpacked codes
// are twice the bytes (2 % faster at 512 rows, not counting the time to unpack).
template <int rows>
static __attribute__((noinline)) void multiply_int4(const Tile& tile) {
    const std::byte* codes[rows];
    each<rows>(EACH_BODY(r) {
        codes[r] = tile.codes[r];
        each<kVectors>(EACH_BODY(v) { store_f(tile.sums + r * kPanelColumns + 16 * v, set_f(0.0f)); });
    });
    const std::byte* weights = tile.panel;
    const int64_t groups = tile.padded_depth / tile.group, steps = tile.group / 8;
    int64_t input = 0;
    for (int64_t group = 0; group < groups; ++group) {
        I16 sums[rows][kVectors];
        each<rows>(EACH_BODY(r) {
            const I16 start = set_i(0) - set_i(tile.eight_sums[r][group]);
            each<kVectors>(EACH_BODY(v) { sums[r][v] = start; });
        });
        for (int64_t step = 0; step < steps; ++step) {
            // From three rows on the processor alone looks too few bytes ahead (12 % at four rows); before, it harms.
            if constexpr (rows > 2)
                each<kVectors>(EACH_BODY(v) { prefetch(weights + kInt4AheadBytes + 64 * v); });
            B64 columns[kVectors];
            each<kVectors>(EACH_BODY(v) { columns[v] = low_nibbles(load_b(weights + 64 * v)); });
            each<rows>(EACH_BODY(r) {
                const B64 row = repeat4(codes[r] + input);
                each<kVectors>(EACH_BODY(v) { sums[r][v] = dot_small_us(sums[r][v], columns[v], row); });
            });
            each<kVectors>(EACH_BODY(v) { columns[v] = high_nibbles(load_b(weights + 64 * v)); });
            each<rows>(EACH_BODY(r) {
                const B64 row = repeat4(codes[r] + input + 4);
                each<kVectors>(EACH_BODY(v) { sums[r][v] = dot_small_us(sums[r][v], columns[v], row); });
            });
            weights += kStepBytes;
            input += 8;
        }
        F16 scales[kVectors];
        each<kVectors>(EACH_BODY(v) {
            scales[v] = load_bf16(reinterpret_cast<const uint16_t*>(weights) + 16 * v);
        });
        each<rows>(EACH_BODY(r) {
            const F16 row_scale = set_f(tile.scales[r][group]);
            each<kVectors>(EACH_BODY(v) {
                float* total = tile.sums + r * kPanelColumns + 16 * v;
                store_f(total, load_f(total) + to_f(sums[r][v]) * (scales[v] * row_scale));
            });
        });
        weights += kPanelColumns * 2;
    }
}

// `rows` is at most kTileRows; `cached`: whether the panel comes out of the cache.
template <class Product, int most = kTileRows> INLINE void multiply_tile(const Tile& tile, int64_t rows, bool cached) {
    if (rows < most) {
        if constexpr (most > 1) multiply_tile<Product, most - 1>(tile, rows, cached);
    } else if constexpr (__is_same(Product, Int4Product)) {
        multiply_int4<most>(tile);
    } else if (cached) {
        multiply<Product, most, kTurnVectors>(tile);
    } else {
        multiply<Product, most, kVectors>(tile);
    }
}

// ---- what becomes of the sums ---------------------------------------------------------------------------------------

// These are called, not written out, for each vector: inlined everywhere they would be most of the code.
static __attribute__((noinline)) F16 activated(Activation activation, F16 x) {
    switch (activation) {
        case Activation::gelu: return x * (set_f(0.5f) * (set_f(1.0f) + erf_f(x * set_f(0.70710678118654752f))));
        case Activation::gelu_tanh: {
            const F16 inner = x + set_f(0.044715f) * (x * x * x);
            return x * (set_f(0.5f) * (set_f(1.0f) + tanh_f(set_f(0.79788456080286536f) * inner)));
        }
        case Activation::relu: return max_f(set_f(0.0f), x);
        default: return x * sigmoid_f(x);
    }
}
// The order of operands lets NaN through: minimum and maximum give the second one then.
static __attribute__((noinline)) F16 gated(const Epilogue& epilogue, F16 gate, F16 up) {
    if (epilogue.activation != Activation::clamped_swiglu) return activated(epilogue.activation, gate) * up;
    const F16 limit = set_f(epilogue.swiglu_limit);
    gate = min_f(limit, gate);
    up = max_f(set_f(-epilogue.swiglu_limit), min_f(limit, up));
    return (up + set_f(1.0f)) * (gate * sigmoid_f(gate * set_f(epilogue.swiglu_alpha)));
}

// Finished sums of 64 columns to where they belong in a row of outputs; `sums` is changed.
static __attribute__((noinline)) void write_sums(const Epilogue& epilogue, int64_t panel, int64_t columns, float* sums,
                                                 float* row) {
    const int64_t first = panel * kPanelColumns;
    if (const float* bias = epilogue.bias) {
        for (int64_t i = 0; i < kPanelColumns; i += 16) store_f(sums + i, load_f(sums + i) + load_f(bias + first + i));
    }
    if (epilogue.kind == EpilogueKind::gate_up) {
        constexpr int64_t half = kPanelColumns / 2;
        for (int64_t i = 0; i < half; i += 16)
            store_f(row + first / 2 + i, gated(epilogue, load_f(sums + i), load_f(sums + half + i)));
        return;
    }
    float* out = row + first;
    const int64_t count = columns - first < kPanelColumns ? columns - first : kPanelColumns;
    float old[kPanelColumns] = {};
    if (epilogue.kind == EpilogueKind::add) __builtin_memcpy(old, out, count * sizeof(float));
    const F16 scale = set_f(epilogue.scale);
    for (int64_t i = 0; i < count; i += 16) {
        F16 sum = load_f(sums + i);
        if (epilogue.kind == EpilogueKind::add) sum = load_f(old + i) + sum * scale;
        if (epilogue.kind == EpilogueKind::activate) sum = activated(epilogue.activation, sum);
        store_f(sums + i, sum);
    }
    __builtin_memcpy(out, sums, count * sizeof(float));
}

template <class Product>
static void linear_panel_as(const LinearWork& work, int64_t panel, int64_t row_begin, int64_t row_end) {
    const PackedMatrix& matrix = *work.weights;
    const ActivationRows& inputs = work.inputs;
    const int64_t row_bytes = inputs.padded_depth * code_bytes(matrix.format);
    alignas(64) float tile_sums[kTileRows * kPanelColumns];
    Tile tile;
    tile.sums = tile_sums;
    tile.panel = matrix.panel(panel);
    tile.padded_depth = inputs.padded_depth;
    tile.group = group_size(matrix.format);
    const int64_t groups = tile.group ? inputs.padded_depth / tile.group : 1;
    const auto* column_scales = reinterpret_cast<const float*>(tile.panel + inputs.padded_depth * kPanelColumns);
    // Tiles of nearly the same size: none is so small that it wastes the panel's pass.
    const int64_t rows = row_end - row_begin, tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t index = 0; index < tiles; ++index) {
        const int64_t begin = row_begin + rows * index / tiles, end = row_begin + rows * (index + 1) / tiles;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t input = work.input_rows ? work.input_rows[row] : row;
            tile.codes[row - begin] = inputs.codes + input * row_bytes;
            if (inputs.scales) tile.scales[row - begin] = inputs.scales + input * groups;
            if (inputs.eight_sums) tile.eight_sums[row - begin] = inputs.eight_sums + input * groups;
        }
        tile.ahead = ahead_of(tile.panel, matrix.stride(), index, tiles);
        multiply_tile<Product>(tile, end - begin, tiles > 1);
        for (int64_t row = begin; row < end; ++row) {
            float* sums = tile.sums + (row - begin) * kPanelColumns;
            if constexpr (__is_same(Product, Int8Product)) {
                const F16 row_scale = set_f(*tile.scales[row - begin]);
                for (int64_t i = 0; i < kPanelColumns; i += 16)
                    store_f(sums + i, load_f(sums + i) * (row_scale * load_f(column_scales + i)));
            }
            write_sums(work.epilogue, panel, matrix.columns, sums, work.epilogue.out + row * work.epilogue.out_stride);
        }
    }
}

static void linear_panel(const LinearWork& work, int64_t panel, int64_t row_begin, int64_t row_end, std::byte*) {
    switch (work.weights->format) {
        case WeightFormat::bf16: return linear_panel_as<Bf16Product>(work, panel, row_begin, row_end);
        case WeightFormat::int8: return linear_panel_as<Int8Product>(work, panel, row_begin, row_end);
        default: return linear_panel_as<Int4Product>(work, panel, row_begin, row_end);
    }
}
static int64_t linear_scratch_bytes(const PackedMatrix&) { return 0; }

// ---- activations ----------------------------------------------------------------------------------------------------

// A row of `depth` floats seen in whole units: the last, if incomplete, from a copy that zeros fill up.
struct PaddedRow {
    const float* values;
    int64_t whole;  // inputs of complete units
    alignas(64) float rest[128] = {};

    const float* at(int64_t input) const { return input < whole ? values + input : rest + (input - whole); }
};
INLINE void pad_row(PaddedRow& row, const float* values, int64_t depth, int64_t unit) {
    row.values = values;
    row.whole = depth / unit * unit;
    __builtin_memcpy(row.rest, values + row.whole, (depth - row.whole) * sizeof(float));
}

// The largest size among some values, and zero, or NaN if one of them is not finite.
struct Extent {
    F16 largest = set_f(0.0f), spoiled = set_f(0.0f);
};
INLINE void include(Extent& extent, F16 value) {
    extent.largest = max_f(extent.largest, abs_f(value));
    extent.spoiled = extent.spoiled + (value - value);
}
// Codes -127 .. 127 of which one means `step`.
struct Grid {
    float step, inverse;
};
INLINE bool is_finite(const Extent& extent) { return sum_of(extent.spoiled) == 0.0f; }
INLINE Grid grid_of(const Extent& extent) {
    const float largest = max_of(extent.largest);
    if (!is_finite(extent)) return {__builtin_nanf(""), 0.0f};
    return largest > kNegligibleSize ? Grid{largest / 127.0f, 127.0f / largest} : Grid{0.0f, 0.0f};
}
// Zero where the inverse is, even of what is not finite.
INLINE I16 code_of(F16 value, const Grid& grid) {
    return grid.inverse == 0.0f ? set_i(0) : round_to_i(value * set_f(grid.inverse));
}

INLINE bool quantize_bf16(const PaddedRow& row, uint16_t* codes, int64_t padded_depth) {
    Extent extent;
    for (int64_t i = 0; i < padded_depth; i += 16) {
        const F16 value = load_f(row.at(i));
        include(extent, value);
        store_bf16(codes + i, value);
    }
    if (is_finite(extent)) return true;
    for (int64_t i = 0; i < padded_depth; ++i) codes[i] = 0x7fc0;  // NaN
    return false;
}
INLINE bool quantize_int8(const PaddedRow& row, std::byte* codes, int64_t padded_depth, float* scale) {
    Extent extent;
    for (int64_t i = 0; i < padded_depth; i += 16) include(extent, load_f(row.at(i)));
    const Grid grid = grid_of(extent);
    for (int64_t i = 0; i < padded_depth; i += 16) store_i8(codes + i, code_of(load_f(row.at(i)), grid) + set_i(128));
    *scale = grid.step;
    return grid.step == grid.step;
}
INLINE bool quantize_int4(const PaddedRow& row, std::byte* codes, int64_t padded_depth, int64_t group, float* scales,
                          int32_t* eight_sums) {
    bool finite = true;
    for (int64_t begin = 0; begin < padded_depth; begin += group) {
        const float* values = row.at(begin);
        Extent extent;
        for (int64_t i = 0; i < group; i += 16) include(extent, load_f(values + i));
        const Grid grid = grid_of(extent);
        I16 sum = set_i(0);
        for (int64_t i = 0; i < group; i += 16) {
            const I16 code = code_of(load_f(values + i), grid);
            sum = sum + code;
            store_i8(codes + begin + i, code);
        }
        *scales++ = grid.step;
        *eight_sums++ = 8 * static_cast<int32_t>(sum_of(to_f(sum)));
        finite &= grid.step == grid.step;
    }
    return finite;
}

static bool quantize_row(WeightFormat format, const float* values, int64_t depth, const ActivationRows& out,
                         int64_t index) {
    const int64_t padded_depth = out.padded_depth, group = group_size(format);
    PaddedRow row;
    pad_row(row, values, depth, depth_unit(format));
    std::byte* codes = out.codes + index * padded_depth * code_bytes(format);
    if (format == WeightFormat::bf16) return quantize_bf16(row, reinterpret_cast<uint16_t*>(codes), padded_depth);
    if (format == WeightFormat::int8) return quantize_int8(row, codes, padded_depth, out.scales + index);
    const int64_t first_group = index * (padded_depth / group);
    return quantize_int4(row, codes, padded_depth, group, out.scales + first_group, out.eight_sums + first_group);
}

// ---- packing --------------------------------------------------------------------------------------------------------

// The 64 rows of weights that become a panel's columns.
struct Source {
    const void* values;
    bool is_bf16;
    int64_t stride;
    const int64_t* rows;
    int64_t depth;
};
// Inputs [begin, begin + 16) of a column; zero where it has none.
INLINE F16 inputs_of(const Source& source, int64_t column, int64_t begin) {
    const int64_t row = source.rows[column], left = source.depth - begin;
    if (row < 0 || left <= 0) return set_f(0.0f);
    const int64_t first = row * source.stride + begin;
    const auto* floats = static_cast<const float*>(source.values) + first;
    const auto* halves = static_cast<const uint16_t*>(source.values) + first;
    if (left >= 16) return source.is_bf16 ? load_bf16(halves) : load_f(floats);
    float part[16] = {};
    uint16_t half_part[16] = {};
    if (!source.is_bf16) {
        __builtin_memcpy(part, floats, left * 4);
        return load_f(part);
    }
    __builtin_memcpy(half_part, halves, left * 2);
    return load_bf16(half_part);
}
// `words` words of four bytes to every 64th word from `out` on: a column of a panel.
INLINE void scatter_words(const void* from, int64_t words, std::byte* out) {
    const auto* word = static_cast<const std::byte*>(from);
    for (int64_t i = 0; i < words; ++i) __builtin_memcpy(out + i * kStepBytes, word + 4 * i, 4);
}

// Inputs are taken 32 at a time for all columns, so that what is being written stays in the nearest cache.
static void pack_bf16(const Source& source, int64_t padded_depth, std::byte* panel) {
    for (int64_t begin = 0; begin < padded_depth; begin += 32) {
        for (int64_t column = 0; column < kPanelColumns; ++column) {
            uint16_t halves[32];
            for (int64_t i = 0; i < 32; i += 16) store_bf16(halves + i, inputs_of(source, column, begin + i));
            scatter_words(halves, 16, panel + begin / 2 * kStepBytes + 4 * column);
        }
    }
}

static void pack_int8(const Source& source, int64_t padded_depth, std::byte* panel) {
    Grid grids[kPanelColumns];
    for (int64_t column = 0; column < kPanelColumns; ++column) {
        Extent extent;
        for (int64_t i = 0; i < source.depth; i += 16) include(extent, inputs_of(source, column, i));
        grids[column] = grid_of(extent);
    }
    for (int64_t begin = 0; begin < padded_depth; begin += 32) {
        for (int64_t column = 0; column < kPanelColumns; ++column) {
            std::byte codes[32];
            for (int64_t i = 0; i < 32; i += 16)
                store_i8(codes + i, code_of(inputs_of(source, column, begin + i), grids[column]));
            scatter_words(codes, 8, panel + begin / 4 * kStepBytes + 4 * column);
        }
    }
    std::byte* end = panel + padded_depth * kPanelColumns;
    for (int64_t column = 0; column < kPanelColumns; ++column)
        __builtin_memcpy(end + 4 * column, &grids[column].step, 4);
    const uint8_t offsets[4] = {128, 128, 128, 128};  // what activations are stored above their value
    for (int v = 0; v < kVectors; ++v) {
        I16 excess = set_i(0);
        for (const std::byte* word = panel + 64 * v; word < end; word += kStepBytes)
            excess = dot_us(excess, repeat4(offsets), load_b(word));
        store_i(reinterpret_cast<int32_t*>(end) + kPanelColumns + 16 * v, set_i(0) - excess);
    }
}

INLINE F16 rounded_to_bf16(F16 value) {
    uint16_t halves[16];
    store_bf16(halves, value);
    return load_bf16(halves);
}
// The code -8 .. 7 of a value.
INLINE I16 int4_code(F16 value, F16 inverse) {
    return round_to_i(max_f(set_f(-8.0f), min_f(set_f(7.0f), value * inverse)));
}

// Sixteen columns' scales for a group of inputs, and their inverses (0 of 0).
struct Int4Scales {
    F16 scale, inverse;
};
INLINE Int4Scales int4_scales(F16 scale) {
    const F16 rounded = rounded_to_bf16(scale);
    const F16 one = set_f(1.0f), zero = set_f(0.0f), size = abs_f(rounded), least = set_f(kNegligibleSize);
    const F16 divisor = select_gt_f(size, least, rounded, one);
    return {select_gt_f(size, least, rounded, zero), select_gt_f(size, least, one / divisor, zero)};
}
INLINE F16 squared_error(const float (*values)[16], int64_t group, const Int4Scales& scales) {
    F16 sum = set_f(0.0f);
    for (int64_t i = 0; i < group; ++i) {
        const F16 value = load_f(values[i]);
        const F16 error = value - to_f(int4_code(value, scales.inverse)) * scales.scale;
        sum = sum + error * error;
    }
    return sum;
}
// The scale, among these multiples of the one that takes the largest value to -8, with the least squared error. They
// were chosen one after the other for normal and Laplacian weights: 10 % less error than the first alone, where 80
// multiples reach 12 %.
INLINE Int4Scales best_int4_scales(const float (*values)[16], int64_t group) {
    constexpr float kMultiples[] = {1.0f, 1.02f, 0.98f, 0.96f, 0.93f, 0.9f, 0.84f, 1.12f};
    F16 extreme = set_f(0.0f);
    for (int64_t i = 0; i < group; ++i) {
        const F16 value = load_f(values[i]);
        extreme = select_gt_f(abs_f(value), abs_f(extreme), value, extreme);
    }
    const F16 whole = extreme * set_f(-0.125f);
    Int4Scales best = int4_scales(whole);
    F16 least = squared_error(values, group, best);
    for (int c = 1; c < static_cast<int>(sizeof kMultiples / sizeof *kMultiples); ++c) {
        const Int4Scales candidate = int4_scales(whole * set_f(kMultiples[c]));
        const F16 error = squared_error(values, group, candidate);
        best.scale = select_gt_f(least, error, candidate.scale, best.scale);
        best.inverse = select_gt_f(least, error, candidate.inverse, best.inverse);
        least = min_f(error, least);
    }
    return best;
}
static void pack_int4(const Source& source, int64_t padded_depth, int64_t group, std::byte* panel) {
    for (int64_t begin = 0; begin < padded_depth; begin += group) {
        for (int v = 0; v < kVectors; ++v) {
            alignas(64) float values[128][16];  // [input][column]
            for (int64_t column = 0; column < 16; ++column) {
                for (int64_t i = 0; i < group; i += 16) {
                    float inputs[16];
                    store_f(inputs, inputs_of(source, 16 * v + column, begin + i));
                    for (int64_t j = 0; j < 16; ++j) values[i + j][column] = inputs[j];
                }
            }
            const Int4Scales scales = best_int4_scales(values, group);
            for (int64_t i = 0; i < group; i += 8) {
                I16 word = set_i(0);
                each<4>(EACH_BODY(byte) {
                    const I16 low = int4_code(load_f(values[i + byte]), scales.inverse) + set_i(8);
                    const I16 high = int4_code(load_f(values[i + 4 + byte]), scales.inverse) + set_i(8);
                    word = word + shift_left_i<8 * byte>(low) + shift_left_i<8 * byte + 4>(high);
                });
                store_i(reinterpret_cast<int32_t*>(panel + i / 8 * kStepBytes + 64 * v), word);
            }
            store_bf16(reinterpret_cast<uint16_t*>(panel + group * (kPanelColumns / 2)) + 16 * v, scales.scale);
        }
        panel += group * (kPanelColumns / 2) + kPanelColumns * 2;
    }
}

static void pack_panel(WeightFormat format, const void* values, bool is_bf16, int64_t stride, const int64_t* rows,
                       int64_t depth, std::byte* panel) {
    const Source source{values, is_bf16, stride, rows, depth};
    const int64_t padded_depth = round_up(depth, depth_unit(format));
    switch (format) {
        case WeightFormat::bf16: return pack_bf16(source, padded_depth, panel);
        case WeightFormat::int8: return pack_int8(source, padded_depth, panel);
        default: return pack_int4(source, padded_depth, group_size(format), panel);
    }
}

INLINE float float_of(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
static void unpack_column(WeightFormat format, const std::byte* panel, int64_t column, int64_t depth, float* values) {
    const std::byte* word = panel + 4 * column;
    if (format == WeightFormat::bf16) {
        for (int64_t i = 0; i < depth; ++i) {
            uint16_t half;
            __builtin_memcpy(&half, word + i / 2 * kStepBytes + i % 2 * 2, 2);
            values[i] = float_of(half);
        }
    } else if (format == WeightFormat::int8) {
        float scale;
        __builtin_memcpy(&scale, word + round_up(depth, depth_unit(format)) * kPanelColumns, 4);
        for (int64_t i = 0; i < depth; ++i)
            values[i] = static_cast<float>(static_cast<int8_t>(word[i / 4 * kStepBytes + i % 4])) * scale;
    } else {
        const int64_t group = group_size(format), group_bytes = group * (kPanelColumns / 2) + kPanelColumns * 2;
        for (int64_t i = 0; i < depth; ++i) {
            const std::byte* codes = panel + i / group * group_bytes;
            uint16_t scale;
            __builtin_memcpy(&scale, codes + group * (kPanelColumns / 2) + 2 * column, 2);
            const int pair = static_cast<int>(codes[i % group / 8 * kStepBytes + 4 * column + i % 4]);
            values[i] = static_cast<float>((i % 8 < 4 ? pair & 15 : pair >> 4) - 8) * float_of(scale);
        }
    }
}
static void unpack_panel(WeightFormat format, const std::byte* panel, int64_t depth, float* values) {
    for (int64_t column = 0; column < kPanelColumns; ++column)
        unpack_column(format, panel, column, depth, values + column * depth);
}
