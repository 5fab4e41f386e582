// Attention of one sequence's rows over those of its KV blocks that are here, as units of work whose results are merged
// with each other and with those of other machines.

#pragma once

#include <cstdint>
#include <vector>

#include "table.h"

namespace plait {

class ContextShare {
  public:
    // `starts`: positions of the blocks' first tokens, ascending multiples of a tile. Of the part the table is not used.
    ContextShare(const SequencePart& part, std::vector<int32_t> kv_blocks, std::vector<int64_t> starts)
        : part_(part), kv_blocks_(std::move(kv_blocks)), starts_(std::move(starts)) {}

    const SequencePart& part() const { return part_; }
    int64_t keys(const KvLayout& layout) const { return static_cast<int64_t>(kv_blocks_.size()) * layout.block_tokens; }
    int64_t pairs() const { return part_.tokens * heads_; }

    // Cuts the work: a decoding row along its keys, rows of a prompt as `attend` wants them.
    void plan(const KernelTable& table, const AttentionShape& shape, const KvLayout& layout, int64_t l2_bytes);
    int64_t units() const { return static_cast<int64_t>(cuts_.size()) * kv_heads_ * row_units_; }
    int64_t result_bytes() const;
    void place_results(std::byte* memory);  // of result_bytes, until the results have been merged
    // `work.queries` are those of the flat batch.
    void attend(const KernelTable& table, const AttentionWork& work, int64_t unit, std::byte* scratch) const;
    const std::vector<PartialRows>& results() const { return results_; }  // in the order in which they are merged

  private:
    SequencePart part_;
    std::vector<int32_t> kv_blocks_;
    std::vector<int64_t> starts_;
    int64_t heads_ = 0, kv_heads_ = 0, dim_ = 0, rows_ = 1, row_units_ = 1;
    std::vector<ContextBlocks> cuts_;
    std::vector<PartialRows> results_;
};

}  // namespace plait
