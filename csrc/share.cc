#include "share.h"

#include <algorithm>

namespace plait {

void ContextShare::plan(const KernelTable& table, const AttentionShape& shape, const KvLayout& layout,
                        int64_t l2_bytes) {
    heads_ = shape.heads;
    kv_heads_ = shape.kv_heads;
    dim_ = shape.dim;
    const int64_t rows = table.attention_rows(shape, layout.format, std::max<int64_t>(1, keys(layout)), l2_bytes);
    rows_ = std::max<int64_t>(1, std::min(rows, part_.tokens));
    row_units_ = (part_.tokens + rows_ - 1) / rows_;
    cuts_.clear();
    const auto count = static_cast<int64_t>(kv_blocks_.size());
    const int64_t together =
        part_.tokens == 1 ? std::max<int64_t>(1, kPartitionTokens / layout.block_tokens) : std::max<int64_t>(1, count);
    for (int64_t begin = 0; begin < count || cuts_.empty();) {
        const int64_t end = std::min(count, begin + together);
        cuts_.push_back({kv_blocks_.data() + begin, starts_.data() + begin, end - begin});
        begin = end;
    }
}

int64_t ContextShare::result_bytes() const {
    return static_cast<int64_t>(cuts_.size()) * round_up(pairs() * (dim_ + 2) * 8, 64);
}

void ContextShare::place_results(std::byte* memory) {
    results_.clear();
    for (size_t i = 0; i < cuts_.size(); ++i) {
        double* summed = reinterpret_cast<double*>(memory + i * round_up(pairs() * (dim_ + 2) * 8, 64));
        results_.push_back({summed + pairs() * dim_, summed + pairs() * (dim_ + 1), summed});
    }
}

void ContextShare::attend(const KernelTable& table, const AttentionWork& work, int64_t unit, std::byte* scratch) const {
    const int64_t row = unit % row_units_ * rows_, other = unit / row_units_;
    const int64_t kv_head = other % kv_heads_, cut = other / kv_heads_;
    table.attend_partly(work, part_, cuts_[cut], kv_head, row, std::min(row + rows_, part_.tokens), results_[cut],
                        scratch);
}

}  // namespace plait
