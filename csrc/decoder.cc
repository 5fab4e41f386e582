#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace plait {

namespace {

constexpr int64_t kRowsPerUnit = 48;  // of a matrix product that is cut along its rows

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Hands out aligned pieces of one arena; with no arena it only adds up.
struct Cutter {
    std::byte* base = nullptr;
    int64_t used = 0;

    template <class T> T* take(int64_t count) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }
    ActivationRows take_rows(int64_t rows, int64_t width) {
        const int64_t padded = round_up(width, 128);
        ActivationRows result;
        result.codes = take<std::byte>(rows * padded * 2);
        result.scales = take<float>(rows * (padded / 32));
        result.eight_sums = take<int32_t>(rows * (padded / 32));
        return result;
    }
};

}  // namespace

struct Decoder::Thread {
    int number = 0;
    int64_t phase = 0;
    std::byte* scratch = nullptr;
    float* row = nullptr;  // room for the widest row
};

Decoder::Decoder(const KernelTable& table, std::shared_ptr<Pool> pool, ModelParts parts, KvLayout layout,
                 std::shared_ptr<Collective> collective, int64_t l2_bytes, bool by_parts)
    : table_(table),
      pool_(std::move(pool)),
      parts_(std::move(parts)),
      layout_(layout),
      collective_(std::move(collective)),
      l2_bytes_(l2_bytes),
      by_parts_(by_parts),
      counters_(2 * pool_->threads()) {
    scratch_bytes_ = 64;
    const auto consider = [&](const Linear& linear) {
        if (linear.present()) scratch_bytes_ = std::max(scratch_bytes_, table_.linear_scratch_bytes(linear.matrix));
    };
    for (const BlockParts& block : parts_.blocks) {
        for (const Linear* linear : {&block.qkv, &block.out, &block.up, &block.down, &block.shared_up, &block.shared_down})
            consider(*linear);
        for (const Linear& linear : block.experts_up) consider(linear);
        for (const Linear& linear : block.experts_down) consider(linear);
        qkv_width_ = std::max(qkv_width_, (block.attention.heads + 2 * block.attention.kv_heads) * block.attention.dim);
        inner_width_ = std::max({inner_width_, block.mlp.inner, block.shared.inner});
        if (!block.experts_up.empty()) visits_per_row_ = std::max(visits_per_row_, block.routing.chosen);
    }
    consider(parts_.head);
}

int Decoder::add_rope_table(const RopeTable& table) {
    rope_tables_.push_back(table);
    return static_cast<int>(rope_tables_.size()) - 1;
}

void Decoder::reserve(const StepInput& input) {
    int64_t most_keys = 0;
    for (const SequencePart& part : input.parts)
        if (!by_parts_) most_keys = std::max(most_keys, part.start + part.tokens);
    for (const ContextShare& share : input.shares) most_keys = std::max(most_keys, share.keys(layout_));
    const int threads = pool_->threads();
    if (input.rows > capacity_rows_) {
        capacity_rows_ = std::max(input.rows, 2 * capacity_rows_);
        const int64_t rows = capacity_rows_, visits = rows * visits_per_row_;
        const int64_t hidden = parts_.hidden, widest = std::max({hidden, qkv_width_, inner_width_});
        for (int round = 0; round < 2; ++round) {
            Cutter cut{round ? memory_->data() : nullptr};
            x_ = cut.take<float>(rows * hidden);
            qkv_ = cut.take<float>(rows * qkv_width_);
            attended_ = cut.take<float>(rows * qkv_width_);
            branch_ = cut.take<float>(rows * hidden);
            normed_ = cut.take<float>(rows * hidden);
            inner_ = cut.take<float>(visits * inner_width_);
            attention_input_ = cut.take_rows(rows, std::max(hidden, qkv_width_));
            mlp_input_ = cut.take_rows(visits, hidden);
            inner_input_ = cut.take_rows(visits, inner_width_);
            if (visits_per_row_ > 1 || std::any_of(parts_.blocks.begin(), parts_.blocks.end(),
                                                   [](const BlockParts& b) { return !b.experts_up.empty(); })) {
                expert_out_ = cut.take<float>(visits * hidden);
                router_weights_ = cut.take<float>(visits);
                visit_weights_ = cut.take<float>(visits);
                experts_ = cut.take<int32_t>(visits);
                visit_rows_ = cut.take<int32_t>(visits);
                visit_of_ = cut.take<int32_t>(visits);
            }
            for (int thread = 0; thread < threads; ++thread) cut.take<float>(widest);
            if (!round) {
                memory_.reset();
                memory_ = std::make_unique<Arena>(cut.used);
            }
        }
    }
    if (most_keys > capacity_keys_ || !scratch_memory_) {
        capacity_keys_ = std::max(most_keys, 2 * capacity_keys_);
        for (const BlockParts& block : parts_.blocks)
            scratch_bytes_ = std::max(
                scratch_bytes_, table_.attention_scratch_bytes(block.attention, layout_.format, capacity_keys_));
        scratch_bytes_ = round_up(scratch_bytes_, 4096);
        const int64_t widest = round_up(std::max({parts_.hidden, qkv_width_, inner_width_, int64_t{4096}}), 64);
        scratch_memory_.reset();
        scratch_memory_ = std::make_unique<Arena>(threads * (scratch_bytes_ + widest * 4));
    }
    if (input.logit_count) {
        int64_t most = 1;
        for (int64_t i = 0; i < input.logit_count; ++i) most = std::max<int64_t>(most, input.logit_tops[i]);
        if (input.logit_count > capacity_logits_ || most > capacity_most_) {
            capacity_logits_ = std::max(input.logit_count, capacity_logits_);
            capacity_most_ = std::max(most, capacity_most_);
            for (int round = 0; round < 2; ++round) {
                Cutter cut{round ? logit_memory_->data() : nullptr};
                head_in_ = cut.take<float>(capacity_logits_ * parts_.hidden);
                head_input_ = cut.take_rows(capacity_logits_, parts_.hidden);
                thread_tops_ = cut.take<TopEntry>(threads * capacity_logits_ * capacity_most_);
                thread_filled_ = cut.take<int64_t>(threads * capacity_logits_);
                cut.take<float>(threads * capacity_logits_ * kPanelColumns);
                if (!round) {
                    logit_memory_.reset();
                    logit_memory_ = std::make_unique<Arena>(cut.used);
                }
            }
        }
    }

    units_.clear();
    split_ = false;
    if (parts_.blocks.empty() || by_parts_) return;
    // Units depend on the widest shape's rule only; blocks of one model differ in their windows, not in their heads.
    const AttentionShape& shape = parts_.blocks.front().attention;
    const bool decoding = std::all_of(input.parts.begin(), input.parts.end(),
                                      [](const SequencePart& part) { return part.tokens == 1; });
    const int64_t single_units = static_cast<int64_t>(input.parts.size()) * shape.kv_heads;
    // Too few heads for the threads: cut each along its keys.
    if (decoding && threads > 1 && most_keys > 2 * kPartitionTokens && single_units < 2 * threads) {
        const int64_t even = single_units % threads;
        split_ = even != 0 || single_units < threads;
    }
    if (split_) {
        partitions_ = round_up(most_keys, kPartitionTokens) / kPartitionTokens;
        const int64_t group = shape.heads / shape.kv_heads;
        split_stride_ = group * split_score_floats(most_keys);
        const int64_t scores = single_units * split_stride_;
        const int64_t partials = single_units * partitions_ * group * (shape.dim + 1);
        if (!split_memory_ || split_memory_->bytes() < (scores + partials) * 4)
            split_memory_ = std::make_unique<Arena>((scores + partials) * 8);
        split_scores_ = reinterpret_cast<float*>(split_memory_->data());
        split_partials_ = split_scores_ + scores;
        return;
    }
    for (size_t index = 0; index < input.parts.size(); ++index) {
        const SequencePart& part = input.parts[index];
        int64_t rows = table_.attention_rows(shape, layout_.format, part.start + part.tokens, l2_bytes_);
        rows = std::max<int64_t>(1, std::min(rows, part.tokens));
        for (int64_t head = 0; head < shape.kv_heads; ++head)
            for (int64_t begin = 0; begin < part.tokens; begin += rows)
                units_.push_back({static_cast<int32_t>(index), static_cast<int32_t>(head), static_cast<int32_t>(begin),
                                  static_cast<int32_t>(std::min(begin + rows, part.tokens))});
    }
    // Longest first, so that no thread starts a long unit when the others are done.
    std::stable_sort(units_.begin(), units_.end(), [&](const AttentionUnit& a, const AttentionUnit& b) {
        const auto cost = [&](const AttentionUnit& unit) {
            const SequencePart& part = input.parts[unit.part];
            return (part.start + unit.row_end) * (unit.row_end - unit.row_begin);
        };
        return cost(a) > cost(b);
    });
}

void Decoder::forward(StepInput& input, const StepOutput& output) {
    stage_ = Stage::none;
    prepare(input);
    run([&](Thread& thread) {
        embed(thread, input);
        for (int64_t index = input.first_block; index < input.end_block; ++index) {
            before_attention(thread, index, input);
            attend(thread, index, input);
            if (by_parts_) merge_shares(thread, parts_.blocks[index].attention, input, {});
            after_attention(thread, index);
            if (failed_.load(std::memory_order_relaxed)) return;  // set before a barrier that all have passed
        }
        finish(thread, input, output);
    });
}

void Decoder::start(StepInput input, StepOutput output) {
    stage_ = Stage::none;
    input_ = std::move(input);
    output_ = output;
    prepare(input_);
    next_block_ = input_.first_block;
    stage_ = Stage::started;
}

void Decoder::advance(const std::vector<std::vector<PartialRows>>& elsewhere) {
    const bool first = stage_ == Stage::started, last = next_block_ == input_.end_block;
    stage_ = Stage::none;
    run([&](Thread& thread) {
        if (first) {
            embed(thread, input_);
        } else {
            merge_shares(thread, parts_.blocks[next_block_ - 1].attention, input_, elsewhere);
            after_attention(thread, next_block_ - 1);
            if (failed_.load(std::memory_order_relaxed)) return;
        }
        if (last)
            finish(thread, input_, output_);
        else
            before_attention(thread, next_block_, input_);
    });
    if (!last) stage_ = Stage::queries;
}

void Decoder::attend() {
    stage_ = Stage::none;
    run([&](Thread& thread) { attend(thread, next_block_, input_); });
    ++next_block_;
    stage_ = Stage::attended;
}

void Decoder::plan_shares(StepInput& input) {
    int64_t bytes = 0;
    // Blocks differ in their windows, not in their heads.
    for (ContextShare& share : input.shares) {
        share.plan(table_, parts_.blocks[input.first_block].attention, layout_, l2_bytes_);
        bytes += share.result_bytes();
    }
    if (!share_memory_ || share_memory_->bytes() < bytes) {
        share_memory_.reset();
        share_memory_ = std::make_unique<Arena>(2 * bytes);
    }
    std::byte* memory = share_memory_->data();
    for (ContextShare& share : input.shares) {
        share.place_results(memory);
        memory += share.result_bytes();
    }
}

void Decoder::prepare(StepInput& input) {
    rows_ = input.rows;
    if (by_parts_) plan_shares(input);
    reserve(input);
    failed_.store(false, std::memory_order_relaxed);
    non_finite_.store(-1, std::memory_order_relaxed);
    seconds_.fill(0.0);
    logit_place_.resize(input.logit_count);
    int64_t full = 0, best = 0;
    for (int64_t i = 0; i < input.logit_count; ++i) logit_place_[i] = input.logit_tops[i] ? best++ : full++;
}

// work(thread) on all threads of the pool.
template <class Work> void Decoder::run(Work&& work) {
    for (WorkCounter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
    pool_->run([&](int number) {
        Thread thread;
        thread.number = number;
        const int64_t widest = round_up(std::max({parts_.hidden, qkv_width_, inner_width_, int64_t{4096}}), 64);
        std::byte* mine = scratch_memory_->data() + number * (scratch_bytes_ + widest * 4);
        thread.scratch = mine;
        thread.row = reinterpret_cast<float*>(mine + scratch_bytes_);
        work(thread);
    });
    if (failed_.load()) throw std::runtime_error(collective_->error());
}

void Decoder::finish(Thread& thread, const StepInput& input, const StepOutput& output) {
    if (output.hidden)
        for_units(thread, PhaseKind::embed, rows_, [&](int64_t row) {
            std::memcpy(output.hidden + row * parts_.hidden, x_ + row * parts_.hidden, parts_.hidden * sizeof(float));
        });
    else
        decide(thread, input, output);
}

template <class Work>
void Decoder::for_units(Thread& thread, PhaseKind kind, int64_t units, Work&& work, int shares) {
    const double start_s = thread.number == 0 ? now_s() : 0.0;
    const int threads = pool_->threads();
    WorkCounter* counters = &counters_[thread.phase % 2 * threads];
    // Nobody counts with those of the next phase: the last phase, which did, is over.
    counters_[(thread.phase + 1) % 2 * threads + thread.number].next.store(0, std::memory_order_relaxed);
    ++thread.phase;
    take_units(counters, shares, thread.number, units, work);
    pool_->barrier();
    if (thread.number == 0) seconds_[static_cast<int>(kind)] += now_s() - start_s;
}

// Each thread reads weights from front to back, as the processor expects when it fetches ahead: with one row and panels
// taken in turns, int4 ran at three quarters of the rate.
template <class Work> void Decoder::for_panels(Thread& thread, PhaseKind kind, int64_t units, Work&& work) {
    for_units(thread, kind, units, work, pool_->threads());
}

void Decoder::embed(Thread& thread, const StepInput& input) {
    const int64_t hidden = parts_.hidden;
    for_units(thread, PhaseKind::embed, rows_, [&](int64_t row) {
        float* x = x_ + row * hidden;
        if (input.hidden) {
            std::memcpy(x, input.hidden + row * hidden, hidden * sizeof(float));
            return;
        }
        const int64_t id = input.token_ids[row];
        const PackedMatrix& table = parts_.embedding;
        table_.unpack_column(table.format, table.panel(id / kPanelColumns), id % kPanelColumns, hidden, x);
        if (parts_.embedding_scale != 1.0f) table_.scale_row(x, hidden, parts_.embedding_scale);
        if (parts_.positions) {
            for (const SequencePart& part : input.parts)
                if (row >= part.row && row < part.row + part.tokens) {
                    const int64_t position = part.start + row - part.row + parts_.position_offset;
                    table_.add_row(x, parts_.positions + position * hidden, hidden, 1.0f);
                }
        }
        if (parts_.embedding_norm.present) {
            table_.norm_row(parts_.embedding_norm.work, x, hidden, thread.row);
            std::memcpy(x, thread.row, hidden * sizeof(float));
        }
    });
}

ActivationRows Decoder::shaped(const ActivationRows& buffer, const PackedMatrix& matrix, int64_t rows) const {
    ActivationRows result = buffer;
    result.rows = rows;
    result.padded_depth = matrix.padded_depth();
    return result;
}

void Decoder::note_non_finite(int64_t block, int64_t row) {
    int64_t none = -1;
    non_finite_.compare_exchange_strong(none, block << 32 | row);
}

std::string Decoder::non_finite() const {
    const int64_t found = non_finite_.load();
    if (found < 0) return {};
    return "row " + std::to_string(found & 0xffffffff) + " of the step, hosted block " + std::to_string(found >> 32);
}

// Rows of `in`, normalised if there is a norm, in the form that `matrix` wants; also as floats in `normed` if given.
void Decoder::quantize(Thread& thread, int64_t index, const PackedMatrix& matrix, const Norm* norm, const float* in,
                       int64_t in_stride, int64_t width, ActivationRows& out, float* normed) {
    const ActivationRows rows = shaped(out, matrix, rows_);
    for_units(thread, PhaseKind::norm, rows_, [&](int64_t row) {
        const float* source = in + row * in_stride;
        if (norm && norm->present) {
            float* target = normed ? normed + row * width : thread.row;
            table_.norm_row(norm->work, source, width, target);
            source = target;
        } else if (normed) {
            std::memcpy(normed + row * width, source, width * sizeof(float));
        }
        if (!table_.quantize_row(matrix.format, source, width, rows, row)) note_non_finite(index, row);
    });
    if (thread.number == 0) {
        out.rows = rows.rows;
        out.padded_depth = rows.padded_depth;
    }
}

void Decoder::linear(Thread& thread, const Linear& linear, const ActivationRows& in, float* out, int64_t out_stride,
                     bool adds, float scale, PhaseKind kind) {
    LinearWork work;
    work.weights = &linear.matrix;
    work.inputs = shaped(in, linear.matrix, rows_);
    work.rows = rows_;
    work.epilogue.kind = adds ? EpilogueKind::add : EpilogueKind::store;
    work.epilogue.scale = scale;
    work.epilogue.bias = linear.bias;
    work.epilogue.out = out;
    work.epilogue.out_stride = out_stride;
    const int64_t panels = linear.matrix.panels();
    const int64_t wanted = panels < 4 * pool_->threads() ? 4 * pool_->threads() / panels : 1;
    const int64_t pieces = std::max<int64_t>(1, std::min(wanted, rows_ / kRowsPerUnit));
    for_panels(thread, kind, panels * pieces, [&](int64_t unit) {
        const int64_t panel = unit / pieces, piece = unit % pieces;
        table_.linear_panel(work, panel, rows_ * piece / pieces, rows_ * (piece + 1) / pieces, thread.scratch);
    });
}

// act(gate) * up, or act(up), into inner_.
void Decoder::activated_linear(Thread& thread, const Linear& up, const FeedForwardParts& parts, const ActivationRows& in) {
    LinearWork work;
    work.weights = &up.matrix;
    work.inputs = shaped(in, up.matrix, rows_);
    work.rows = rows_;
    work.epilogue.kind = parts.gated ? EpilogueKind::gate_up : EpilogueKind::activate;
    work.epilogue.activation = parts.activation;
    work.epilogue.swiglu_alpha = parts.swiglu_alpha;
    work.epilogue.swiglu_limit = parts.swiglu_limit;
    work.epilogue.bias = up.bias;
    work.epilogue.out = inner_;
    work.epilogue.out_stride = inner_width_;
    const int64_t panels = up.matrix.panels();
    for_panels(thread, PhaseKind::linear, panels, [&](int64_t panel) {
        table_.linear_panel(work, panel, 0, rows_, thread.scratch);
    });
}

// The last product of a branch: its sums go to `out`, over all ranks where there are several.
void Decoder::output_linear(Thread& thread, const Linear& output, const ActivationRows& in, float* out, bool adds,
                            float scale) {
    if (!collective_) {
        linear(thread, output, in, out, parts_.hidden, adds, scale, PhaseKind::linear);
        return;
    }
    float* partial = collective_->partial(rows_ * parts_.hidden);
    linear(thread, output, in, partial, parts_.hidden, false, 1.0f, PhaseKind::linear);
    sum_ranks(thread, out, adds, scale);
}

void Decoder::sum_ranks(Thread& thread, float* out, bool adds, float scale) {
    const int64_t floats = rows_ * parts_.hidden;
    for_units(thread, PhaseKind::collective, 1, [&](int64_t) {
        if (!collective_->exchange(floats)) failed_.store(true, std::memory_order_relaxed);
    });
    constexpr int64_t kPiece = 4096;
    for_units(thread, PhaseKind::collective, round_up(floats, kPiece) / kPiece, [&](int64_t piece) {
        const int64_t begin = piece * kPiece, end = std::min(floats, begin + kPiece);
        if (!adds) std::memset(out + begin, 0, (end - begin) * sizeof(float));
        if (!failed_.load(std::memory_order_relaxed)) collective_->add_sum(out, begin, end, scale);
    });
}

void Decoder::add_normed(Thread& thread, const Norm& norm, float scale) {
    for_units(thread, PhaseKind::norm, rows_, [&](int64_t row) {
        const float* branch = branch_ + row * parts_.hidden;
        if (norm.present) {
            table_.norm_row(norm.work, branch, parts_.hidden, thread.row);
            branch = thread.row;
        }
        table_.add_row(x_ + row * parts_.hidden, branch, parts_.hidden, scale);
    });
}

void Decoder::normalize(Thread& thread, const Norm& norm) {
    for_units(thread, PhaseKind::norm, rows_, [&](int64_t row) {
        float* x = x_ + row * parts_.hidden;
        table_.norm_row(norm.work, x, parts_.hidden, thread.row);
        std::memcpy(x, thread.row, parts_.hidden * sizeof(float));
    });
}

// Up to the queries of the block, rotated, and its keys and values, stored.
void Decoder::before_attention(Thread& thread, int64_t index, const StepInput& input) {
    const BlockParts& block = parts_.blocks[index];
    const int64_t hidden = parts_.hidden;
    quantize(thread, index, block.qkv.matrix, &block.attention_in, x_, hidden, hidden, attention_input_, nullptr);
    linear(thread, block.qkv, attention_input_, qkv_, qkv_width_, false, 1.0f, PhaseKind::linear);
    rotate_and_store(thread, index, input);
}

void Decoder::after_attention(Thread& thread, int64_t index) {
    const BlockParts& block = parts_.blocks[index];
    const int64_t hidden = parts_.hidden;
    const float scale = block.residual_scale;
    const bool parallel = block.placement == Placement::parallel || block.placement == Placement::parallel_shared;
    const bool direct = block.placement == Placement::pre || block.placement == Placement::after_residual;
    const bool mixes = !block.experts_up.empty();

    const int64_t width = block.attention.heads * block.attention.dim;
    quantize(thread, index, block.out.matrix, nullptr, attended_, qkv_width_, width, attention_input_, nullptr);
    output_linear(thread, block.out, attention_input_, direct ? x_ : branch_, direct, direct ? scale : 1.0f);
    if (failed_.load(std::memory_order_relaxed)) return;
    if (block.placement == Placement::after_residual) normalize(thread, block.attention_out);
    if (!parallel && !direct) add_normed(thread, block.attention_out, scale);

    // In parallel placements x has not changed yet: the branch holds what attention adds.
    const Norm& norm = block.placement == Placement::parallel_shared ? block.attention_in : block.mlp_in;
    const Linear& first = mixes ? block.experts_up.front() : block.up;
    quantize(thread, index, first.matrix, &norm, x_, hidden, hidden, mlp_input_, mixes ? normed_ : nullptr);
    feed_forward(thread, index, direct ? x_ : branch_, direct || parallel, direct ? scale : 1.0f);
    if (failed_.load(std::memory_order_relaxed)) return;
    if (block.placement == Placement::after_residual) normalize(thread, block.mlp_out);
    if (!direct) add_normed(thread, parallel ? Norm{} : block.mlp_out, scale);
}

void Decoder::rotate_and_store(Thread& thread, int64_t index, const StepInput& input) {
    const BlockParts& block = parts_.blocks[index];
    const AttentionShape& shape = block.attention;
    const int64_t query_width = shape.heads * shape.dim, key_width = shape.kv_heads * shape.dim;
    const int64_t ropes = static_cast<int64_t>(input.parts.empty() ? 0 : input.rope_tables.size() / input.parts.size());
    const auto normalize_heads = [&](float* row, const Norm& norm, int64_t heads) {
        const int64_t pieces = block.norm_over_head ? heads : 1, width = heads * shape.dim / pieces;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            table_.norm_row(norm.work, row + piece * width, width, thread.row);
            std::memcpy(row + piece * width, thread.row, width * sizeof(float));
        }
    };
    for_units(thread, PhaseKind::rotate, rows_, [&](int64_t row) {
        const auto after = std::upper_bound(input.parts.begin(), input.parts.end(), row,
                                            [](int64_t value, const SequencePart& part) { return value < part.row; });
        const int64_t number = after - input.parts.begin() - 1;
        const SequencePart& part = input.parts[number];
        const int64_t position = part.start + row - part.row;
        float* query = qkv_ + row * qkv_width_;
        float* key = query + query_width;
        const auto normalize_both = [&] {
            if (!block.query_norm.present) return;
            normalize_heads(query, block.query_norm, shape.heads);
            normalize_heads(key, block.key_norm, shape.kv_heads);
        };
        if (!block.norm_after_rope) normalize_both();
        if (block.rope >= 0) {
            const RopeTable& rope = rope_tables_[input.rope_tables[number * ropes + block.rope]];
            const int64_t half = block.rotary_dim / 2;
            table_.rotate(query, shape.heads + shape.kv_heads, shape.dim, block.rotary_dim,
                          rope.cosines + position * half, rope.sines + position * half);
        }
        if (block.norm_after_rope) normalize_both();
        if (block.has_temperature) table_.scale_row(query, query_width, input.temperatures[row]);
    });
    // One unit per tile and part, whose tokens it appends in order: the first token of a tile clears the rest of it.
    int64_t tiles = 0;
    for (const SequencePart& part : input.parts)
        tiles += (part.start + part.tokens - 1) / kTileTokens - part.start / kTileTokens + 1;
    for_units(thread, PhaseKind::rotate, tiles, [&](int64_t unit) {
        for (const SequencePart& part : input.parts) {
            const int64_t first = part.start / kTileTokens;
            const int64_t count = (part.start + part.tokens - 1) / kTileTokens - first + 1;
            if (unit >= count) {
                unit -= count;
                continue;
            }
            const int64_t begin = std::max(part.start, (first + unit) * kTileTokens);
            const int64_t end = std::min(part.start + part.tokens, (first + unit + 1) * kTileTokens);
            for (int64_t position = begin; position < end; ++position) {
                const float* key = qkv_ + (part.row + position - part.start) * qkv_width_ + query_width;
                table_.append_kv(input.memory, index, part.table, position, key, key + key_width);
            }
            return;
        }
    });
}

void Decoder::attend(Thread& thread, int64_t index, const StepInput& input) {
    AttentionWork work;
    work.shape = parts_.blocks[index].attention;
    work.memory = input.memory;
    work.layer = index;
    work.queries = qkv_;
    work.query_stride = qkv_width_;
    work.out = attended_;
    work.out_stride = qkv_width_;
    if (split_) {
        attend_split(thread, work, input);
        return;
    }
    if (by_parts_) {
        attend_shares(thread, work, input);
        return;
    }
    for_units(thread, PhaseKind::attention, static_cast<int64_t>(units_.size()), [&](int64_t number) {
        const AttentionUnit& unit = units_[number];
        table_.attend(work, input.parts[unit.part], unit.kv_head, unit.row_begin, unit.row_end, thread.scratch);
    });
}

void Decoder::attend_shares(Thread& thread, const AttentionWork& work, const StepInput& input) {
    int64_t units = 0;
    for (const ContextShare& share : input.shares) units += share.units();
    for_units(thread, PhaseKind::attention, units, [&](int64_t unit) {
        for (const ContextShare& share : input.shares) {
            if (unit < share.units()) {
                share.attend(table_, work, unit, thread.scratch);
                return;
            }
            unit -= share.units();
        }
    });
}

// What is here first, then the others' parts in order.
void Decoder::merge_shares(Thread& thread, const AttentionShape& shape, const StepInput& input,
                           const std::vector<std::vector<PartialRows>>& elsewhere) {
    std::vector<std::vector<PartialRows>> parts;
    for (const ContextShare& share : input.shares) parts.push_back(share.results());
    for (size_t number = 0; number < elsewhere.size(); ++number)
        parts[number].insert(parts[number].end(), elsewhere[number].begin(), elsewhere[number].end());
    for_units(thread, PhaseKind::merge, rows_, [&](int64_t row) {
        const auto after = std::upper_bound(input.parts.begin(), input.parts.end(), row,
                                            [](int64_t value, const SequencePart& part) { return value < part.row; });
        const int64_t number = after - input.parts.begin() - 1;
        for (int64_t head = 0; head < shape.heads; ++head) {
            const int64_t pair = (row - input.parts[number].row) * shape.heads + head;
            double most, weight;
            double* summed = reinterpret_cast<double*>(thread.row);
            table_.merge_parts(parts[number].data(), static_cast<int64_t>(parts[number].size()), pair, shape.dim, &most,
                               &weight, summed);
            table_.finish_part(shape, head, most, weight, summed, attended_ + row * qkv_width_ + head * shape.dim);
        }
    });
}

void Decoder::attend_split(Thread& thread, const AttentionWork& work, const StepInput& input) {
    const AttentionShape& shape = work.shape;
    const int64_t group = shape.heads / shape.kv_heads;
    const int64_t pairs = static_cast<int64_t>(input.parts.size()) * shape.kv_heads;
    const int64_t partial_stride = partitions_ * group * (shape.dim + 1);
    const auto each = [&](auto&& act) {
        for_units(thread, PhaseKind::attention, pairs * partitions_, [&](int64_t unit) {
            const int64_t pair = unit / partitions_, partition = unit % partitions_;
            const SequencePart& part = input.parts[pair / shape.kv_heads];
            if (partition * kPartitionTokens > part.start) return;
            act(part, pair % shape.kv_heads, partition, split_scores_ + pair * split_stride_,
                split_partials_ + pair * partial_stride);
        });
    };
    each([&](const SequencePart& part, int64_t head, int64_t partition, float* scores, float*) {
        table_.split_scores(work, part, head, partition, scores, thread.scratch);
    });
    each([&](const SequencePart& part, int64_t head, int64_t partition, float* scores, float* partial) {
        table_.split_products(work, part, head, partition, scores, partial, thread.scratch);
    });
    for_units(thread, PhaseKind::attention, pairs, [&](int64_t pair) {
        table_.split_merge(work, input.parts[pair / shape.kv_heads], pair % shape.kv_heads,
                           split_scores_ + pair * split_stride_, split_partials_ + pair * partial_stride);
    });
}

void Decoder::feed_forward(Thread& thread, int64_t index, float* out, bool adds, float scale) {
    const BlockParts& block = parts_.blocks[index];
    if (!block.experts_up.empty()) {
        mix_experts(thread, index, normed_);
        const int64_t chosen = block.routing.chosen, hidden = parts_.hidden;
        float* partial = collective_ ? collective_->partial(rows_ * hidden) : nullptr;
        for_units(thread, PhaseKind::experts, rows_, [&](int64_t row) {
            std::memset(thread.row, 0, hidden * sizeof(float));
            for (int64_t choice = 0; choice < chosen; ++choice) {
                const int64_t visit = visit_of_[row * chosen + choice];
                const float weight = block.weighs_input ? 1.0f : router_weights_[row * chosen + choice];
                table_.add_row(thread.row, expert_out_ + visit * hidden, hidden, weight);
            }
            if (block.shared_up.present()) table_.add_row(thread.row, normed_ + row * hidden, hidden, 1.0f);
            float* target = (partial ? partial : out) + row * hidden;
            if (partial || !adds)
                std::memcpy(target, thread.row, hidden * sizeof(float));
            else
                table_.add_row(target, thread.row, hidden, scale);
        });
        if (partial) sum_ranks(thread, out, adds, scale);
        return;
    }
    activated_linear(thread, block.up, block.mlp, mlp_input_);
    quantize(thread, index, block.down.matrix, nullptr, inner_, inner_width_, block.down.matrix.depth, inner_input_, nullptr);
    output_linear(thread, block.down, inner_input_, out, adds, scale);
}

// Every visit's result in expert_out_, the shared expert's in normed_.
void Decoder::mix_experts(Thread& thread, int64_t index, const float* source) {
    const BlockParts& block = parts_.blocks[index];
    const RouterWork& routing = block.routing;
    const int64_t chosen = routing.chosen, hidden = parts_.hidden, visits = rows_ * chosen;
    for_units(thread, PhaseKind::experts, rows_, [&](int64_t row) {
        table_.small_linear(block.router, block.router_bias, source + row * hidden, routing.experts, hidden, thread.row);
        table_.route_row(routing, thread.row, experts_ + row * chosen, router_weights_ + row * chosen);
    });
    // Visits sorted by expert, rows in order within each, so that an expert's weights are read once.
    for_units(thread, PhaseKind::experts, 1, [&](int64_t) {
        expert_starts_.assign(routing.experts + 1, 0);
        for (int64_t visit = 0; visit < visits; ++visit) ++expert_starts_[experts_[visit] + 1];
        for (int64_t expert = 0; expert < routing.experts; ++expert) expert_starts_[expert + 1] += expert_starts_[expert];
        std::vector<int64_t> next(expert_starts_.begin(), expert_starts_.end() - 1);
        for (int64_t visit = 0; visit < visits; ++visit) {
            const int64_t place = next[experts_[visit]]++;
            visit_of_[visit] = static_cast<int32_t>(place);
            visit_rows_[place] = static_cast<int32_t>(visit / chosen);
            visit_weights_[place] = router_weights_[visit];
        }
        expert_units_.clear();
        for (int64_t expert = 0; expert < routing.experts; ++expert)
            if (expert_starts_[expert + 1] > expert_starts_[expert])
                expert_units_.push_back({static_cast<int32_t>(expert), 0});
    });
    const int64_t visited = static_cast<int64_t>(expert_units_.size());
    const Linear& first_up = block.experts_up.front();
    const Linear& first_down = block.experts_down.front();
    // The shared expert reads the same rows; it goes first, because weighing inputs replaces them.
    if (block.shared_up.present()) {
        activated_linear(thread, block.shared_up, block.shared, mlp_input_);
        quantize(thread, index, block.shared_down.matrix, nullptr, inner_, inner_width_, block.shared_down.matrix.depth,
                 inner_input_, nullptr);
    }
    if (block.weighs_input) {
        const ActivationRows rows = shaped(mlp_input_, first_up.matrix, visits);
        for_units(thread, PhaseKind::experts, visits, [&](int64_t visit) {
            std::memcpy(thread.row, source + visit_rows_[visit] * hidden, hidden * sizeof(float));
            table_.scale_row(thread.row, hidden, visit_weights_[visit]);
            if (!table_.quantize_row(first_up.matrix.format, thread.row, hidden, rows, visit)) note_non_finite(index, visit);
        });
    }
    if (block.shared_up.present())
        linear(thread, block.shared_down, inner_input_, normed_, hidden, false, 1.0f, PhaseKind::linear);
    const auto for_expert_panels = [&](int64_t panels, auto&& work) {
        for_panels(thread, PhaseKind::experts, visited * panels, [&](int64_t unit) {
            work(expert_units_[unit / panels][0], unit % panels);
        });
    };
    // Rows of the linear work are absolute visits: an expert's are [starts, next starts).
    const auto work_of = [&](const Linear& linear, const ActivationRows& inputs, float* out, int64_t stride) {
        LinearWork work;
        work.weights = &linear.matrix;
        work.inputs = inputs;
        work.rows = visits;
        work.epilogue.bias = linear.bias;
        work.epilogue.out = out;
        work.epilogue.out_stride = stride;
        return work;
    };
    const ActivationRows up_rows = shaped(mlp_input_, first_up.matrix, block.weighs_input ? visits : rows_);
    for_expert_panels(first_up.matrix.panels(), [&](int64_t expert, int64_t panel) {
        LinearWork work = work_of(block.experts_up[expert], up_rows, inner_, inner_width_);
        work.input_rows = block.weighs_input ? nullptr : visit_rows_;
        work.epilogue.kind = block.mlp.gated ? EpilogueKind::gate_up : EpilogueKind::activate;
        work.epilogue.activation = block.mlp.activation;
        work.epilogue.swiglu_alpha = block.mlp.swiglu_alpha;
        work.epilogue.swiglu_limit = block.mlp.swiglu_limit;
        table_.linear_panel(work, panel, expert_starts_[expert], expert_starts_[expert + 1], thread.scratch);
    });
    const ActivationRows down_rows = shaped(inner_input_, first_down.matrix, visits);
    for_units(thread, PhaseKind::experts, visits, [&](int64_t visit) {
        if (!table_.quantize_row(first_down.matrix.format, inner_ + visit * inner_width_, first_down.matrix.depth, down_rows,
                                 visit))
            note_non_finite(index, visit_rows_[visit]);
    });
    for_expert_panels(first_down.matrix.panels(), [&](int64_t expert, int64_t panel) {
        const LinearWork work = work_of(block.experts_down[expert], down_rows, expert_out_, hidden);
        table_.linear_panel(work, panel, expert_starts_[expert], expert_starts_[expert + 1], thread.scratch);
    });
}

void Decoder::decide(Thread& thread, const StepInput& input, const StepOutput& output) {
    const int64_t count = input.logit_count, hidden = parts_.hidden, columns = parts_.head.matrix.columns;
    if (!count) return;
    const PackedMatrix& matrix = parts_.head.matrix;
    const ActivationRows rows = shaped(head_input_, matrix, count);
    for_units(thread, PhaseKind::head, count, [&](int64_t i) {
        const float* source = x_ + input.logit_rows[i] * hidden;
        if (parts_.final_norm.present) {
            table_.norm_row(parts_.final_norm.work, source, hidden, head_in_ + i * hidden);
            source = head_in_ + i * hidden;
        }
        if (!table_.quantize_row(matrix.format, source, hidden, rows, i))
            note_non_finite(static_cast<int64_t>(parts_.blocks.size()), input.logit_rows[i]);
    });
    TopEntry* tops = thread_tops_ + thread.number * capacity_logits_ * capacity_most_;
    int64_t* filled = thread_filled_ + thread.number * capacity_logits_;
    std::fill_n(filled, count, 0);
    LinearWork work;
    work.weights = &matrix;
    work.inputs = rows;
    work.rows = count;
    work.epilogue.bias = parts_.head.bias;
    work.epilogue.out_stride = kPanelColumns;
    // The panel's logits stay in this thread's cache until they are copied or folded.
    float* tile = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(thread_filled_) +
                                           round_up(pool_->threads() * capacity_logits_ * 8, 64)) +
                  thread.number * capacity_logits_ * kPanelColumns;
    for_panels(thread, PhaseKind::head, matrix.panels(), [&](int64_t panel) {
        const int64_t first = panel * kPanelColumns, width = std::min(kPanelColumns, columns - first);
        LinearWork mine = work;
        // linear_panel writes at the panel's own columns: shift the tile so that they fall on it.
        mine.epilogue.out = tile - first;
        table_.linear_panel(mine, panel, 0, count, thread.scratch);
        for (int64_t i = 0; i < count; ++i) {
            float* values = tile + i * kPanelColumns;
            if (parts_.logit_scale != 1.0f) table_.scale_row(values, width, parts_.logit_scale);
            if (parts_.logit_softcap > 0.0f) table_.softcap_row(values, width, parts_.logit_softcap);
            const int64_t first_id = parts_.first_id + first, known = std::min(width, parts_.token_limit - first_id);
            if (const int64_t k = input.logit_tops[i]) {
                if (known > 0)
                    table_.fold_top(values, known, static_cast<int32_t>(first_id), tops + i * capacity_most_, k, filled + i);
            } else
                std::memcpy(output.logits + logit_place_[i] * columns + first, values, width * sizeof(float));
        }
    });
    // Larger value first, then smaller id: the same order whichever thread saw which panel.
    for_units(thread, PhaseKind::head, count, [&](int64_t i) {
        const int64_t k = input.logit_tops[i];
        if (!k) return;
        std::vector<TopEntry> all;
        for (int other = 0; other < pool_->threads(); ++other) {
            const TopEntry* theirs = thread_tops_ + (other * capacity_logits_ + i) * capacity_most_;
            all.insert(all.end(), theirs, theirs + thread_filled_[other * capacity_logits_ + i]);
        }
        std::sort(all.begin(), all.end(), [](const TopEntry& a, const TopEntry& b) {
            const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
            if (a_nan != b_nan) return a_nan;
            return !a_nan && a.value != b.value ? a.value > b.value : a.id < b.id;
        });
        all.resize(std::min<size_t>(all.size(), k));
        std::copy(all.begin(), all.end(), output.tops + logit_place_[i] * output.most);
    });
}

}  // namespace plait
