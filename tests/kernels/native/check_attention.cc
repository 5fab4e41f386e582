// The functions of attention.inl: what is written into KV memory, and what queries read from it.

#include <algorithm>
#include <numeric>

#include "check.h"

namespace plait {
namespace {

constexpr int64_t kHeads = 6, kKvHeads = 2, kGroup = kHeads / kKvHeads;
constexpr int64_t kLayer = 1;      // of two
constexpr int64_t kTokens = 1100;  // two whole partitions, and a part of one that ends inside a tile
constexpr int64_t kBlockTokens = 32;

std::string named(KvFormat format, int64_t dim) {
    return (format == KvFormat::bf16 ? "bf16, dim " : "int8, dim ") + std::to_string(dim);
}

// A sequence of kTokens in shuffled KV blocks.
struct Sequence {
    KvFormat format;
    int64_t dim;
    std::vector<float> keys, values;  // [kTokens][kKvHeads][dim]
    std::vector<int32_t> blocks;
    KvMemory memory;
    Buffer buffer;

    Sequence(const KernelTable& table, KvFormat format_, int64_t dim_)
        : format(format_), dim(dim_), keys(random_floats(kTokens * kKvHeads * dim, 31)),
          values(random_floats(kTokens * kKvHeads * dim, 32)), blocks(round_up(kTokens, kBlockTokens) / kBlockTokens),
          memory{layout(format, dim), nullptr}, buffer(static_cast<int64_t>(blocks.size()) * memory.layout.extent_bytes()) {
        memory.data = buffer.data();
        std::iota(blocks.rbegin(), blocks.rend(), 0);
        for (size_t i = 0; i + 2 < blocks.size(); i += 2) std::swap(blocks[i], blocks[i + 2]);
        for (int64_t token = 0; token < kTokens; ++token)
            table.append_kv(memory, kLayer, blocks.data(), token, keys.data() + token * kKvHeads * dim,
                            values.data() + token * kKvHeads * dim);
    }
    static KvLayout layout(KvFormat format, int64_t dim) { return {format, 2, kKvHeads, dim, kBlockTokens}; }

    // An element as table.h says where it lies; plane 0 has the keys.
    float stored(int plane, int64_t token, int64_t head, int64_t d) const {
        const std::byte* tile = memory.tile(blocks.data(), kLayer, plane, head, token);
        const int64_t slot = token % kTileTokens;
        if (format == KvFormat::bf16) {
            const int64_t at = plane == 0 ? (d / 2 * kTileTokens + slot) * 2 + d % 2 : (slot / 2 * dim + d) * 2 + slot % 2;
            return from_bf16(read_at<uint16_t>(tile, at * 2));
        }
        const int64_t at = plane == 0 ? (d / 4 * kTileTokens + slot) * 4 + d % 4 : (slot / 4 * dim + d) * 4 + slot % 4;
        return static_cast<float>(read_at<int8_t>(tile, at)) * scale(plane, token, head);
    }
    float scale(int plane, int64_t token, int64_t head) const {
        return read_at<float>(memory.tile(blocks.data(), kLayer, plane, head, token),
                              kTileTokens * dim + token % kTileTokens * 4);
    }
};

void check_appending(const Sequence& sequence, Check& check) {
    const std::string what = named(sequence.format, sequence.dim);
    check.digest(sequence.buffer.data(), sequence.buffer.size());
    for (int64_t token = 0; token < kTokens; ++token) {
        for (int64_t head = 0; head < kKvHeads; ++head) {
            for (int64_t d = 0; d < sequence.dim; ++d) {
                for (int plane = 0; plane < 2; ++plane) {
                    const float got = sequence.stored(plane, token, head, d);
                    const float want = (plane ? sequence.values : sequence.keys)[(token * kKvHeads + head) * sequence.dim + d];
                    if (sequence.format == KvFormat::bf16)
                        check.equal(got, from_bf16(to_bf16(want)), what);
                    else
                        check.near(got, want, sequence.scale(plane, token, head) * 0.5001, what);
                }
            }
        }
    }
}

struct Variant {
    const char* name;
    int64_t window_tokens, chunk_tokens;
    float softcap;
    bool sinks, slopes;
};
constexpr Variant kVariants[] = {
    {"plain", 0, 0, 0, false, false},   {"window", 300, 0, 0, false, false}, {"chunk", 0, 400, 0, false, false},
    {"softcap", 0, 0, 2.0f, false, false}, {"sinks", 0, 0, 0, true, false},  {"slopes", 0, 0, 0, false, true},
    {"all", 700, 0, 3.0f, true, true},
};
constexpr float kSinks[kHeads] = {0.5f, -1.0f, 2.0f, 0.0f, 4.0f, 1.5f};
constexpr float kSlopes[kHeads] = {0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f, 0.015625f};

class Attending {
  public:
    Attending(const KernelTable& table, const Sequence& sequence, const Variant& variant)
        : table_(table), sequence_(sequence), variant_(variant), stride_(kHeads * sequence.dim + 16),
          queries_(random_floats(kTokens * stride_, 33, 3.0f)) {
        work_.shape = {kHeads, kKvHeads, sequence.dim, 1.0f / std::sqrt(static_cast<float>(sequence.dim)),
                       variant.window_tokens, variant.chunk_tokens, variant.softcap,
                       variant.sinks ? kSinks : nullptr, variant.slopes ? kSlopes : nullptr};
        work_.memory = sequence.memory;
        work_.layer = kLayer;
        work_.queries = queries_.data();
        work_.query_stride = work_.out_stride = stride_;
    }

    // [tokens][stride] for the last `tokens` positions before `end`, in calls of at most `rows` rows of one of the table's
    // ways to attend.
    std::vector<float> attend(decltype(KernelTable::attend) way, int64_t end, int64_t tokens, int64_t rows) {
        std::vector<float> out(static_cast<size_t>(kTokens * stride_));
        const SequencePart part = part_of(end, tokens);
        const int64_t keys = std::max(end, kPartitionTokens);  // attend_2d takes a partition at a time
        Buffer scratch(table_.attention_scratch_bytes(work_.shape, sequence_.format, keys));
        work_.out = out.data();
        rows = std::min(rows, table_.attention_rows(work_.shape, sequence_.format, end, int64_t{1} << 20));
        for (int64_t head = 0; head < kKvHeads; ++head)
            for (int64_t begin = 0; begin < tokens; begin += rows)
                way(work_, part, head, begin, std::min(tokens, begin + rows), scratch.data());
        return out;
    }
    // The same for one token, cut along the keys.
    std::vector<float> split(int64_t end) {
        std::vector<float> out(static_cast<size_t>(kTokens * stride_));
        const SequencePart part = part_of(end, 1);
        const int64_t partitions = round_up(end, kPartitionTokens) / kPartitionTokens;
        Buffer scratch(table_.attention_scratch_bytes(work_.shape, sequence_.format, end));
        Buffer scores(kGroup * split_score_floats(end) * 4), partial(partitions * kGroup * (sequence_.dim + 1) * 4);
        work_.out = out.data();
        for (int64_t head = 0; head < kKvHeads; ++head) {
            for (int64_t i = 0; i < partitions; ++i)
                table_.split_scores(work_, part, head, i, scores.floats(), scratch.data());
            for (int64_t i = partitions; i-- > 0;)
                table_.split_products(work_, part, head, i, scores.floats(), partial.floats(), scratch.data());
            table_.split_merge(work_, part, head, scores.floats(), partial.floats());
        }
        return out;
    }
    // Plain attention in double precision over what is stored, for one position.
    std::vector<double> reference(int64_t position, int64_t head) const {
        const int64_t dim = sequence_.dim, kv_head = head / kGroup;
        int64_t first = 0;
        if (variant_.window_tokens) first = std::max<int64_t>(0, position - variant_.window_tokens + 1);
        if (variant_.chunk_tokens) first = std::max(first, position - position % variant_.chunk_tokens);
        const float* query = queries_.data() + position * stride_ + head * dim;
        std::vector<double> scores, out(static_cast<size_t>(dim));
        for (int64_t key = first; key <= position; ++key) {
            double score = 0;
            for (int64_t d = 0; d < dim; ++d) score += static_cast<double>(query[d]) * sequence_.stored(0, key, kv_head, d);
            score *= work_.shape.scale;
            if (variant_.softcap != 0) score = variant_.softcap * std::tanh(score / variant_.softcap);
            if (variant_.slopes) score += static_cast<double>(kSlopes[head]) * static_cast<double>(key);
            scores.push_back(score);
        }
        double most = *std::max_element(scores.begin(), scores.end());
        if (variant_.sinks) most = std::max<double>(most, kSinks[head]);
        double sum = variant_.sinks ? std::exp(kSinks[head] - most) : 0.0;
        for (int64_t key = first; key <= position; ++key) {
            const double weight = std::exp(scores[key - first] - most);
            sum += weight;
            for (int64_t d = 0; d < dim; ++d) out[d] += weight * sequence_.stored(1, key, kv_head, d);
        }
        for (double& x : out) x /= sum;
        return out;
    }
    // The row of `out` for a position.
    const float* row(const std::vector<float>& out, int64_t position) const { return out.data() + position * stride_; }
    size_t row_bytes() const { return static_cast<size_t>(kHeads * sequence_.dim) * 4; }

  private:
    // Row numbers in the batch are positions, so that every call reads the same queries.
    SequencePart part_of(int64_t end, int64_t tokens) const {
        return {sequence_.blocks.data(), end - tokens, end - tokens, tokens};
    }

    const KernelTable& table_;
    const Sequence& sequence_;
    const Variant& variant_;
    const int64_t stride_;
    const std::vector<float> queries_;
    AttentionWork work_;
};

struct AttendChecks {
    Check attend, split, in_two_dimensions;
};

// The row of one position against plain attention. Queries are rounded to bfloat16, or to 8 bits, before they meet the
// keys, and weights likewise.
void compare(Check& check, const Attending& attending, const Sequence& sequence, const float* row, int64_t position,
             const std::string& what) {
    for (int64_t head = 0; head < kHeads; ++head) {
        const auto want = attending.reference(position, head);
        for (int64_t d = 0; d < sequence.dim; ++d)
            check.near(row[head * sequence.dim + d], want[d], 0.02,
                       what + ", position " + std::to_string(position) + ", head " + std::to_string(head));
    }
}

void check_attending(const KernelTable& table, const Sequence& sequence, AttendChecks& checks) {
    for (const Variant& variant : kVariants) {
        if (sequence.dim != 64 && variant.name != std::string("all")) continue;  // emulators take their time
        Attending attending(table, sequence, variant);
        const std::string what = named(sequence.format, sequence.dim) + ", " + variant.name;
        constexpr int64_t tokens = 21;
        for (const int64_t end : {tokens, kTokens}) {
            const int64_t first = end - tokens, middle = end - tokens / 2, last = end - 1;
            const auto out = attending.attend(table.attend, end, tokens, tokens);
            const auto other = attending.attend(table.attend_2d, end, tokens, tokens);
            for (int64_t position = first; position < end; ++position) {
                checks.attend.digest(attending.row(out, position), attending.row_bytes());
                checks.in_two_dimensions.digest(attending.row(other, position), attending.row_bytes());
            }
            for (const int64_t position : {middle, last}) {
                compare(checks.attend, attending, sequence, attending.row(out, position), position, what);
                compare(checks.in_two_dimensions, attending, sequence, attending.row(other, position), position, what);
            }
            // The same bits in smaller calls, one token at a time, and cut along the keys.
            const auto cut = attending.attend(table.attend, end, tokens, 5), alone = attending.attend(table.attend, end, 1, 1);
            const auto split = attending.split(end);
            const float* want = attending.row(out, last);
            const size_t bytes = attending.row_bytes();
            for (const int64_t position : {first, middle, last})
                checks.attend.same_bits(attending.row(cut, position), attending.row(out, position), bytes,
                                        what + ", calls of 5 rows");
            checks.attend.same_bits(attending.row(alone, last), want, bytes, what + ", alone");
            checks.split.same_bits(attending.row(split, last), want, bytes, what + ", split");
            checks.split.digest(attending.row(split, last), bytes);
        }
    }
}

}  // namespace

void check_attention(const KernelTable& table) {
    Check append(table, "append_kv");
    AttendChecks checks = {{table, "attend"}, {table, "split_scores+products+merge"}, {table, "attend_2d"}};
    for (const KvFormat format : {KvFormat::bf16, KvFormat::int8}) {
        for (const int64_t dim : {64, 80}) {
            const Sequence sequence(table, format, dim);
            check_appending(sequence, append);
            check_attending(table, sequence, checks);
        }
    }
}

}  // namespace plait
