// What every instruction set implements, and the memory layouts that all of them share.
//
// Functions of a table are single-threaded units of work over part of an operation; who runs which unit does not change
// a bit of the result. They neither allocate nor throw.

#pragma once

#include <cstddef>
#include <cstdint>

namespace plait {

// ---- matrices -------------------------------------------------------------------------------------------------------

enum class WeightFormat : int32_t { bf16 = 0, int8 = 1, int4_g32 = 2, int4_g128 = 3 };

constexpr int64_t kPanelColumns = 64;  // outputs in one packed panel

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Inputs that share a scale (int4), 0 for the other formats.
constexpr int64_t group_size(WeightFormat format) {
    return format == WeightFormat::int4_g32 ? 32 : format == WeightFormat::int4_g128 ? 128 : 0;
}
// Inputs are padded with zeros to a multiple of this.
constexpr int64_t depth_unit(WeightFormat format) { return format == WeightFormat::int4_g128 ? 128 : 32; }

// A panel is one contiguous piece, aligned to 64 bytes, read from front to back:
//   bf16   [k/2][64][2] bfloat16
//   int8   [k/4][64][4] int8 in -127 .. 127, then 64 float32 scales, then 64 int32 (-128 * sum of the column's codes)
//   int4   for each group of G inputs: [G/8][64][4] bytes, input 8j+i in the low half and 8j+4+i in the high half, codes
//          0 .. 15 that mean -8 .. 7; then 64 bfloat16 scales
constexpr int64_t panel_bytes(WeightFormat format, int64_t padded_depth) {
    switch (format) {
        case WeightFormat::bf16: return padded_depth * kPanelColumns * 2;
        case WeightFormat::int8: return padded_depth * kPanelColumns + kPanelColumns * 8;
        default: return padded_depth / group_size(format) * (group_size(format) * kPanelColumns / 2 + kPanelColumns * 2);
    }
}

struct PackedMatrix {
    WeightFormat format = WeightFormat::bf16;
    int64_t columns = 0;  // outputs; those beyond, up to panels * 64, are zero
    int64_t depth = 0;    // inputs, unpadded
    const std::byte* data = nullptr;

    int64_t panels() const { return round_up(columns, kPanelColumns) / kPanelColumns; }
    int64_t padded_depth() const { return round_up(depth, depth_unit(format)); }
    int64_t stride() const { return panel_bytes(format, padded_depth()); }
    const std::byte* panel(int64_t index) const { return data + index * stride(); }
    int64_t bytes() const { return panels() * stride(); }
};

// Rows of activations in the form that a weight format wants; padded to padded_depth with what multiplies to nothing.
//   bf16   bfloat16 [rows][padded_depth]
//   int8   uint8 [rows][padded_depth], code + 128; one scale a row
//   int4   int8 [rows][padded_depth]; per group a scale and eight times the sum of its codes
struct ActivationRows {
    std::byte* codes = nullptr;
    float* scales = nullptr;         // int8 [rows]; int4 [rows][groups]
    int32_t* eight_sums = nullptr;   // int4 [rows][groups]
    int64_t rows = 0;
    int64_t padded_depth = 0;
};
constexpr int64_t code_bytes(WeightFormat format) { return format == WeightFormat::bf16 ? 2 : 1; }

enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, clamped_swiglu = 4 };

// What happens to the finished sums before they are written; `bias` may be null.
enum class EpilogueKind : int32_t {
    store = 0,     // out[row][column] = sum + bias
    add = 1,       // out[row][column] += (sum + bias) * scale
    gate_up = 2,   // the panel's first 32 columns are gates, the others ups: out[row][32 * panel + i] = act(gate) * up
    activate = 3,  // out[row][column] = act(sum + bias)
};
struct Epilogue {
    EpilogueKind kind = EpilogueKind::store;
    Activation activation = Activation::silu;
    float scale = 1.0f;
    float swiglu_alpha = 0.0f, swiglu_limit = 0.0f;
    const float* bias = nullptr;  // one per packed column, padded to panels * 64
    float* out = nullptr;
    int64_t out_stride = 0;       // floats between rows
};

struct LinearWork {
    const PackedMatrix* weights = nullptr;
    ActivationRows inputs;
    const int32_t* input_rows = nullptr;  // which input row feeds output row r; null: r itself
    int64_t rows = 0;                     // output rows
    Epilogue epilogue;
};

// ---- keys and values ------------------------------------------------------------------------------------------------

enum class KvFormat : int32_t { bf16 = 0, int8 = 1 };

constexpr int64_t kTileTokens = 16;        // tokens of one tile; a KV block is a whole number of tiles
constexpr int64_t kPartitionTokens = 512;  // keys whose products are summed apart, at multiples of it: see attention.inl

// One head's keys (or values) of 16 tokens:
//   bf16   keys [dim/2][16][2], values [8][dim][2] (token pairs)
//   int8   keys [dim/4][16][4], values [4][dim][4] (token quads), each then 16 float32 scales
constexpr int64_t tile_bytes(KvFormat format, int64_t dim) {
    return format == KvFormat::bf16 ? kTileTokens * dim * 2 : kTileTokens * dim + kTileTokens * 4;
}

// KV memory of one worker: extent of a KV block = [layer][plane: keys, values][head][block_tokens / 16] tiles.
struct KvLayout {
    KvFormat format = KvFormat::bf16;
    int64_t layers = 0, heads = 0, dim = 0, block_tokens = 16;

    int64_t head_bytes() const { return block_tokens / kTileTokens * tile_bytes(format, dim); }
    int64_t extent_bytes() const { return layers * 2 * heads * head_bytes(); }
};
struct KvMemory {
    KvLayout layout;
    std::byte* data = nullptr;  // extents one after the other

    std::byte* tile(const int32_t* table, int64_t layer, int plane, int64_t head, int64_t token) const {
        const int64_t per_block = layout.block_tokens;
        std::byte* extent = data + static_cast<int64_t>(table[token / per_block]) * layout.extent_bytes();
        const int64_t page = (layer * 2 + plane) * layout.heads + head;
        return extent + page * layout.head_bytes() +
               token % per_block / kTileTokens * tile_bytes(layout.format, layout.dim);
    }
};

// One sequence's part in a step.
struct SequencePart {
    const int32_t* table = nullptr;  // KV blocks that cover start + tokens
    int64_t row = 0;                 // its first row in the flat batch
    int64_t start = 0;               // position of that row
    int64_t tokens = 0;              // rows it brings
};

struct AttentionShape {
    int64_t heads = 0, kv_heads = 0, dim = 0;
    float scale = 1.0f;
    int64_t window_tokens = 0;      // 0: unlimited
    int64_t chunk_tokens = 0;       // 0: none
    float softcap = 0.0f;           // 0: none
    const float* sinks = nullptr;   // [heads]
    const float* slopes = nullptr;  // [heads], ALiBi: slope * key position is added to the score
};

// Floats that `split_scores` keeps of one head of a row with this many keys: the scores of whole partitions, then the
// largest of each.
constexpr int64_t split_score_floats(int64_t keys) {
    const int64_t partitions = round_up(keys, kPartitionTokens) / kPartitionTokens;
    return partitions * kPartitionTokens + round_up(partitions, kTileTokens);
}

// What a call of `attend` did, in product rows (a query row under one head) times tiles; its scratch memory begins with
// it.
struct AttentionCount {
    int64_t scored = 0, weighed = 0;
};

// Some of a sequence's KV blocks, in the order of the positions of their first tokens.
struct ContextBlocks {
    const int32_t* kv_blocks = nullptr;
    const int64_t* starts = nullptr;
    int64_t count = 0;
};

// Attention over some of the keys, of rows and heads: weights are relative to 2^most; minus infinity: no key was seen.
struct PartialRows {
    double* most = nullptr;    // [rows][heads]
    double* weight = nullptr;  // [rows][heads], the sum of weights
    double* summed = nullptr;  // [rows][heads][dim], of weights times values
};

struct AttentionWork {
    AttentionShape shape;
    KvMemory memory;
    int64_t layer = 0;
    const float* queries = nullptr;  // row r, head h: queries + r * query_stride + h * dim; rotated
    int64_t query_stride = 0;
    float* out = nullptr;            // row r, head h: out + r * out_stride + h * dim
    int64_t out_stride = 0;
};

// ---- small parts ----------------------------------------------------------------------------------------------------

enum class NormKind : int32_t { rms = 0, layer = 1 };

struct NormWork {
    NormKind kind = NormKind::rms;
    float eps = 0.0f;
    const float* weight = nullptr;  // what multiplies; null: nothing does
    const float* bias = nullptr;
};

struct RouterWork {
    int64_t experts = 0, chosen = 0, groups = 1, kept_groups = 1;
    bool sigmoid = false, renormalises = false, best_two = false;
    float scale = 1.0f;
    const float* correction = nullptr;
};

struct TopEntry {
    float value;
    int32_t id;
};

// ---- the table ------------------------------------------------------------------------------------------------------

struct KernelTable {
    const char* name;

    // linear.inl
    // Columns [64 * panel, 64 * panel + 64) of packed weights from rows of float32 or bfloat16 (`source_is_bf16`) of
    // `depth` inputs, `source_stride` elements apart; column c of the panel is source row `rows[c]`, none if negative.
    void (*pack_panel)(WeightFormat format, const void* source, bool source_is_bf16, int64_t source_stride,
                       const int64_t* rows, int64_t depth, std::byte* panel);
    // The panel's values as float32 [64][depth]: what the packed codes mean.
    void (*unpack_panel)(WeightFormat format, const std::byte* panel, int64_t depth, float* values);
    // One column of a panel as float32 [depth] (an embedding lookup).
    void (*unpack_column)(WeightFormat format, const std::byte* panel, int64_t column, int64_t depth, float* values);
    // Row `row` of the activations from float32 [depth]; pads to padded_depth. False if a value is not finite: the row's
    // results will be NaN.
    bool (*quantize_row)(WeightFormat format, const float* values, int64_t depth, const ActivationRows& out, int64_t row);
    // Output columns of one panel for rows [row_begin, row_end). `scratch` has linear_scratch_bytes.
    void (*linear_panel)(const LinearWork& work, int64_t panel, int64_t row_begin, int64_t row_end, std::byte* scratch);
    int64_t (*linear_scratch_bytes)(const PackedMatrix& weights);

    // attention.inl
    // Store the key and the value [kv_heads][dim] of the token at `position`.
    void (*append_kv)(const KvMemory& memory, int64_t layer, const int32_t* table, int64_t position, const float* key,
                      const float* value);
    // Queries [row_begin, row_end) of the part (relative to its first row), all query heads of one kv head, against all
    // that they see: the whole of attention for them. `scratch` has attention_scratch_bytes.
    void (*attend)(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t row_begin,
                   int64_t row_end, std::byte* scratch);
    int64_t (*attention_scratch_bytes)(const AttentionShape& shape, KvFormat format, int64_t most_keys);
    // How many rows of a part with this many keys one call of `attend` should take.
    int64_t (*attention_rows)(const AttentionShape& shape, KvFormat format, int64_t keys, int64_t l2_bytes);
    // The same for one decoding token (the part's only row), cut along the keys; three calls with barriers between:
    // scores of a partition -> `scores` [group heads][split_score_floats]; products of a partition, which needs all
    // scores -> `partial` [partition][group heads][dim + 1] (the last is the sum of weights); then one merge.
    void (*split_scores)(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t partition,
                         float* scores, std::byte* scratch);
    void (*split_products)(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t partition,
                           const float* scores, float* partial, std::byte* scratch);
    void (*split_merge)(const AttentionWork& work, const SequencePart& part, int64_t kv_head, const float* scores,
                        const float* partial);
    // Queries [row_begin, row_end) of the part over `blocks`, of which `part.table` is not looked at, without sinks; rows
    // of `out` are counted from the part's first. `scratch` has attention_scratch_bytes for the keys of these blocks.
    void (*attend_partly)(const AttentionWork& work, const SequencePart& part, const ContextBlocks& blocks,
                          int64_t kv_head, int64_t row_begin, int64_t row_end, const PartialRows& out,
                          std::byte* scratch);
    // What these parts of the row and head `pair` = row * heads + head make together, added in their order; and what the
    // part that is the whole means, sinks included, float32 [dim].
    void (*merge_parts)(const PartialRows* parts, int64_t count, int64_t pair, int64_t dim, double* most, double* weight,
                        double* summed);
    void (*finish_part)(const AttentionShape& shape, int64_t head, double most, double weight, const double* summed,
                        float* out);
    // attention_2d.inl, for the benchmark only: `attend` by another tiling.
    void (*attend_2d)(const AttentionWork& work, const SequencePart& part, int64_t kv_head, int64_t row_begin,
                      int64_t row_end, std::byte* scratch);

    // elementwise.inl
    void (*norm_row)(const NormWork& work, const float* in, int64_t width, float* out);
    // Rotate `heads` heads of `dim` in place; pairs are (j, j + rotary_dim / 2); cosines and sines [rotary_dim / 2].
    void (*rotate)(float* row, int64_t heads, int64_t dim, int64_t rotary_dim, const float* cosines, const float* sines);
    void (*scale_row)(float* row, int64_t width, float factor);
    // out += in * factor
    void (*add_row)(float* out, const float* in, int64_t width, float factor);
    void (*softcap_row)(float* row, int64_t width, float cap);
    // Experts of one row and their weights from router logits [experts].
    void (*route_row)(const RouterWork& work, const float* logits, int32_t* experts, float* weights);
    // Plain float32 matrix-vector product for routers: out[n] = weights [n][depth] . in + bias.
    void (*small_linear)(const float* weights, const float* bias, const float* in, int64_t columns, int64_t depth,
                         float* out);
    // Fold `count` values with ids first_id.. into the best `k`, kept sorted: larger value first, then smaller id.
    // `best` has k entries; `filled` says how many are in use. NaN counts as larger than everything.
    void (*fold_top)(const float* values, int64_t count, int32_t first_id, TopEntry* best, int64_t k, int64_t* filled);
    float (*row_max)(const float* row, int64_t width);

    // measure.inl, for benchmarks only
    // Reads `bytes`, a multiple of 256, from front to back; the sum of all words.
    int32_t (*read_stream)(const std::byte* data, int64_t bytes);
    // At least `dots` dot products of 64 bytes with 64 bytes, without reading memory, by the instructions that multiply
    // this format; something that depends on all of them.
    float (*repeat_dot)(WeightFormat format, int64_t dots);
};

// Tables that were compiled in and run on this machine, best first.
const KernelTable* const* available_tables(int* count);
// The one in use: the best, or the one named by PLAIT_ISA. Null with a reason if that name is not available.
const KernelTable* current_table(const char** reason);

}  // namespace plait
