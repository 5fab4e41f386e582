// A span of a model's blocks on the CPU: one forward pass over a flat batch is one run of the thread pool.
//
// Threads take units of work (a panel of a matrix, a head of a sequence, a row) from a counter per phase and meet at a
// barrier between phases. Which thread does a unit never changes a bit of it.

#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "collective.h"
#include "pool.h"
#include "share.h"
#include "table.h"

namespace plait {

enum class Placement : int32_t { pre = 0, post = 1, sandwich = 2, parallel = 3, parallel_shared = 4, after_residual = 5 };

struct Linear {
    PackedMatrix matrix;
    const float* bias = nullptr;  // one per packed column

    bool present() const { return matrix.data != nullptr; }
};

struct Norm {
    NormWork work;
    bool present = false;
};

struct FeedForwardParts {
    bool gated = true;
    Activation activation = Activation::silu;
    float swiglu_alpha = 0.0f, swiglu_limit = 0.0f;
    int64_t inner = 0;  // columns of the activated product, padding included
};

struct BlockParts {
    Placement placement = Placement::pre;
    float residual_scale = 1.0f;
    Norm attention_in, attention_out, mlp_in, mlp_out;

    AttentionShape attention;
    Linear qkv, out;
    int rope = -1;              // which of the step's rotations; -1: none
    int64_t rotary_dim = 0;
    bool has_temperature = false;
    Norm query_norm, key_norm;  // over each head, or over all heads at once
    bool norm_over_head = true, norm_after_rope = false;

    FeedForwardParts mlp;
    Linear up, down;
    // A mixture, if `experts_up` is not empty; `mlp` then describes an expert and `shared` the shared one.
    std::vector<Linear> experts_up, experts_down;
    const float* router = nullptr;  // float32 [experts][hidden]
    const float* router_bias = nullptr;
    RouterWork routing;
    bool weighs_input = false;
    FeedForwardParts shared;
    Linear shared_up, shared_down;
};

struct ModelParts {
    int64_t hidden = 0, vocab = 0;
    std::vector<BlockParts> blocks;
    PackedMatrix embedding;  // absent unless the span starts the model
    float embedding_scale = 1.0f;
    const float* positions = nullptr;  // learned position vectors, [rows][hidden]
    int64_t position_rows = 0, position_offset = 0;
    Norm embedding_norm, final_norm;
    Linear head;  // absent unless the span ends the model; its columns are ids first_id ..
    int64_t first_id = 0;
    int64_t token_limit = 0;  // ids from here on pad the vocabulary and are never among the best
    float logit_scale = 1.0f, logit_softcap = 0.0f;
};

// Cosines and sines of one rope and length class, [positions][rotary_dim / 2].
struct RopeTable {
    const float* cosines = nullptr;
    const float* sines = nullptr;
    int64_t positions = 0;
};

struct StepInput {
    int64_t rows = 0;
    const int32_t* token_ids = nullptr;  // [rows], or
    const float* hidden = nullptr;       // [rows][hidden]
    int64_t first_block = 0, end_block = 0;  // of the span: the hosted blocks to run
    std::vector<SequencePart> parts;
    // For attention by parts, of each part: what is here of its context.
    std::vector<ContextShare> shares;
    std::vector<int32_t> rope_tables;  // [part][rope]: index of a RopeTable
    const float* temperatures = nullptr;  // [rows]
    KvMemory memory;
    const int32_t* logit_rows = nullptr;  // rows whose logits are wanted, and how: 0 all of them, k the best k
    const int32_t* logit_tops = nullptr;
    int64_t logit_count = 0;
};

struct StepOutput {
    float* hidden = nullptr;    // [rows][hidden], if the blocks do not end the model
    float* logits = nullptr;    // [rows that want all][head columns]
    TopEntry* tops = nullptr;   // [rows that want the best][most]: as many as asked for are written
    int64_t most = 0;
};

// What one pass spent its time on, as seen by the calling thread.
enum class PhaseKind : int { embed, norm, linear, rotate, attention, merge, experts, collective, head, count };
constexpr const char* kPhaseNames[] = {"embed",   "norm",       "linear", "rotate", "attention", "merge",
                                       "experts", "collective", "head"};

class Decoder {
  public:
    Decoder(const KernelTable& table, std::shared_ptr<Pool> pool, ModelParts parts, KvLayout layout,
            std::shared_ptr<Collective> collective, int64_t l2_bytes, bool by_parts);

    bool by_parts() const { return by_parts_; }
    const ModelParts& parts() const { return parts_; }
    const KvLayout& layout() const { return layout_; }
    int add_rope_table(const RopeTable& table);
    void replace_rope_table(int index, const RopeTable& table) { rope_tables_.at(index) = table; }
    const RopeTable& rope_table(int index) const { return rope_tables_.at(index); }
    int64_t rope_table_count() const { return static_cast<int64_t>(rope_tables_.size()); }

    // Throws std::runtime_error if the collective failed; what the KV memory holds for these rows is then undefined.
    void forward(StepInput& input, const StepOutput& output);

    // The same, by parts, where contexts lie partly elsewhere, with stops at each block's attention, in this order:
    //   start, then for each block { advance, attend }, then advance
    // What `advance` is given are, for each share, the parts that others have of the attention that it completes (none
    // the first time); behind it `share_queries` are those of the next block. What is given to `start` is kept until the
    // next start; a pass may be left at any stop.
    void start(StepInput input, StepOutput output);
    void advance(const std::vector<std::vector<PartialRows>>& elsewhere);
    void attend();
    enum class Stage { none, started, queries, attended };
    Stage stage() const { return stage_; }
    const StepInput& started() const { return input_; }
    // Of a share: [tokens][heads * dim], `query_stride` floats between rows.
    const float* share_queries(int64_t share) const { return qkv_ + input_.shares[share].part().row * qkv_width_; }
    int64_t query_stride() const { return qkv_width_; }

    // Where a non-finite activation was met first in the last pass; empty if nowhere.
    std::string non_finite() const;
    const std::array<double, static_cast<int>(PhaseKind::count)>& seconds() const { return seconds_; }

  private:
    struct Thread;
    struct AttentionUnit {
        int32_t part, kv_head, row_begin, row_end;
    };

    template <class Work> void run(Work&& work);
    void prepare(StepInput& input);
    void plan_shares(StepInput& input);
    void before_attention(Thread& thread, int64_t index, const StepInput& input);
    void after_attention(Thread& thread, int64_t index);
    void finish(Thread& thread, const StepInput& input, const StepOutput& output);
    void embed(Thread& thread, const StepInput& input);
    void quantize(Thread& thread, int64_t index, const PackedMatrix& matrix, const Norm* norm, const float* in,
                  int64_t in_stride, int64_t width, ActivationRows& out, float* normed);
    void rotate_and_store(Thread& thread, int64_t index, const StepInput& input);
    void attend(Thread& thread, int64_t index, const StepInput& input);
    void attend_shares(Thread& thread, const AttentionWork& work, const StepInput& input);
    void merge_shares(Thread& thread, const AttentionShape& shape, const StepInput& input,
                      const std::vector<std::vector<PartialRows>>& elsewhere);
    void attend_split(Thread& thread, const AttentionWork& work, const StepInput& input);
    void feed_forward(Thread& thread, int64_t index, float* out, bool adds, float scale);
    void mix_experts(Thread& thread, int64_t index, const float* source);
    void activated_linear(Thread& thread, const Linear& up, const FeedForwardParts& parts, const ActivationRows& in);
    void linear(Thread& thread, const Linear& linear, const ActivationRows& in, float* out, int64_t out_stride, bool adds,
                float scale, PhaseKind kind);
    void sum_ranks(Thread& thread, float* out, bool adds, float scale);
    void output_linear(Thread& thread, const Linear& linear, const ActivationRows& in, float* out, bool adds, float scale);
    void decide(Thread& thread, const StepInput& input, const StepOutput& output);
    void add_normed(Thread& thread, const Norm& norm, float scale);
    void normalize(Thread& thread, const Norm& norm);

    template <class Work> void for_units(Thread& thread, PhaseKind kind, int64_t units, Work&& work, int shares = 1);
    template <class Work> void for_panels(Thread& thread, PhaseKind kind, int64_t units, Work&& work);
    ActivationRows shaped(const ActivationRows& buffer, const PackedMatrix& matrix, int64_t rows) const;
    void reserve(const StepInput& input);
    void note_non_finite(int64_t block, int64_t row);

    const KernelTable& table_;
    std::shared_ptr<Pool> pool_;
    ModelParts parts_;
    KvLayout layout_;
    std::shared_ptr<Collective> collective_;
    int64_t l2_bytes_;
    bool by_parts_;
    std::vector<RopeTable> rope_tables_;

    // Of the current step; grown when a step needs more, never shrunk.
    int64_t rows_ = 0, capacity_rows_ = 0, capacity_keys_ = 0, capacity_logits_ = 0, capacity_most_ = 0;
    std::unique_ptr<Arena> memory_, scratch_memory_, logit_memory_;
    float *x_ = nullptr, *qkv_ = nullptr, *attended_ = nullptr, *branch_ = nullptr, *inner_ = nullptr;
    float *normed_ = nullptr, *expert_out_ = nullptr, *router_weights_ = nullptr, *visit_weights_ = nullptr;
    int32_t *experts_ = nullptr, *visit_rows_ = nullptr, *visit_of_ = nullptr;
    std::vector<int64_t> expert_starts_;
    std::vector<std::array<int32_t, 2>> expert_units_;
    ActivationRows attention_input_, mlp_input_, inner_input_;
    float* head_in_ = nullptr;
    ActivationRows head_input_;
    TopEntry* thread_tops_ = nullptr;
    int64_t* thread_filled_ = nullptr;
    std::vector<int64_t> logit_place_;  // for each wanted row, its place among its kind
    std::vector<AttentionUnit> units_;
    bool split_ = false;
    int64_t partitions_ = 0, split_stride_ = 0;
    std::unique_ptr<Arena> split_memory_;
    float *split_scores_ = nullptr, *split_partials_ = nullptr;
    int64_t scratch_bytes_ = 0;
    StepInput input_;  // of a pass with stops
    StepOutput output_;
    Stage stage_ = Stage::none;
    int64_t next_block_ = 0;
    std::unique_ptr<Arena> share_memory_;
    int64_t qkv_width_ = 0, inner_width_ = 0, visits_per_row_ = 1;

    std::vector<WorkCounter> counters_;  // one a thread for the phase that runs, and one for the next
    std::atomic<bool> failed_{false};
    std::atomic<int64_t> non_finite_{-1};
    std::array<double, static_cast<int>(PhaseKind::count)> seconds_{};
};

}  // namespace plait
