// Attention over KV blocks that a machine keeps for others: memory and the model's shapes, no weights.

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>

#include "model_reader.h"
#include "pool.h"

namespace plait {
namespace {

class Lender {
  public:
    Lender(std::shared_ptr<Pool> pool, const nb::list& blocks, const std::string& kv_format, int64_t kv_heads, int64_t dim,
           int64_t block_tokens, int64_t l2_bytes, const std::string& isa)
        : table_(table_named(isa)),
          pool_(std::move(pool)),
          layout_(layout_of(kv_format, static_cast<int64_t>(blocks.size()), kv_heads, dim, block_tokens)),
          l2_bytes_(l2_bytes) {
        Reader reader(kept_);
        for (nb::handle block : blocks) {
            shapes_.push_back(reader.attention(nb::cast<nb::dict>(block)));
            if (shapes_.back().kv_heads != kv_heads || shapes_.back().dim != dim)
                refuse("every block must cache the same number of heads and dimensions");
        }
    }

    void attend(const Array<uint8_t>& kv, int64_t layer, const Array<const int32_t>& kv_blocks,
                const Array<const int64_t>& starts, int64_t position, const Array<const float>& queries,
                const nb::tuple& out) {
        if (layer < 0 || layer >= layout_.layers) refuse("there is no such hosted block");
        const AttentionShape& shape = shapes_[layer];
        const int64_t width = shape.heads * shape.dim, tokens = static_cast<int64_t>(queries.size()) / width;
        if (tokens < 1 || static_cast<int64_t>(queries.size()) != tokens * width || position < 0)
            refuse("queries are float32 [tokens, heads, dim]");
        const PartialRows merged = read_part(out, tokens * shape.heads, shape.dim);
        const int64_t count = static_cast<int64_t>(kv_blocks.size());
        const int64_t known = static_cast<int64_t>(kv.size()) / layout_.extent_bytes();
        if (static_cast<int64_t>(starts.size()) != count) refuse("every KV block has a start");
        int64_t free_from = 0;  // where the next block may begin
        for (int64_t i = 0; i < count; ++i) {
            const int64_t start = starts.data()[i];
            if (kv_blocks.data()[i] < 0 || kv_blocks.data()[i] >= known) refuse("there is no such KV block");
            if (start < free_from || start % kTileTokens || start > position - layout_.block_tokens)
                refuse("KV blocks come in order, begin at multiples of 16 tokens and end before the query");
            free_from = start + layout_.block_tokens;
        }
        SequencePart part;
        part.start = position;
        part.tokens = tokens;
        ContextShare share(part, {kv_blocks.data(), kv_blocks.data() + count}, {starts.data(), starts.data() + count});
        AttentionWork work;
        work.shape = shape;
        work.memory = {layout_, reinterpret_cast<std::byte*>(kv.data())};
        work.layer = layer;
        work.queries = queries.data();
        work.query_stride = width;
        nb::gil_scoped_release released;
        run(share, work, merged);
    }

  private:
    void run(ContextShare& share, const AttentionWork& work, const PartialRows& out) {
        share.plan(table_, work.shape, layout_, l2_bytes_);
        const int64_t each = round_up(
            table_.attention_scratch_bytes(work.shape, layout_.format, std::max<int64_t>(16, share.keys(layout_))), 4096);
        reserve(scratch_, each * pool_->threads());
        reserve(results_, share.result_bytes());
        share.place_results(results_->data());
        WorkCounter units, pairs;
        pool_->run([&](int thread) {
            take_units(&units, 1, thread, share.units(), [&](int64_t unit) {
                share.attend(table_, work, unit, scratch_->data() + thread * each);
            });
            pool_->barrier();
            const std::vector<PartialRows>& parts = share.results();
            take_units(&pairs, 1, thread, share.pairs(), [&](int64_t pair) {
                table_.merge_parts(parts.data(), static_cast<int64_t>(parts.size()), pair, work.shape.dim,
                                   out.most + pair, out.weight + pair, out.summed + pair * work.shape.dim);
            });
        });
    }

    static void reserve(std::unique_ptr<Arena>& arena, int64_t bytes) {
        if (arena && arena->bytes() >= bytes) return;
        arena.reset();
        arena = std::make_unique<Arena>(2 * bytes);
    }

    nb::list kept_;
    const KernelTable& table_;
    std::shared_ptr<Pool> pool_;
    KvLayout layout_;
    int64_t l2_bytes_;
    std::vector<AttentionShape> shapes_;
    std::unique_ptr<Arena> scratch_, results_;
};

}  // namespace

void bind_share(nb::module_& m) {
    nb::class_<Lender>(m, "Lender", "Attention over KV blocks of others, of a span whose blocks have these shapes.")
        .def(nb::init<std::shared_ptr<Pool>, const nb::list&, const std::string&, int64_t, int64_t, int64_t, int64_t,
                      const std::string&>(),
             nb::arg("pool"), nb::arg("blocks"), nb::arg("kv_format"), nb::arg("kv_heads"), nb::arg("dim"),
             nb::arg("block_tokens"), nb::arg("l2_bytes"), nb::arg("isa") = "")
        .def("attend", &Lender::attend, nb::arg("kv").noconvert(), nb::arg("layer"), nb::arg("kv_blocks").noconvert(),
             nb::arg("starts").noconvert(), nb::arg("position"), nb::arg("queries").noconvert(), nb::arg("out"),
             "Attend queries float32 [tokens, heads, dim], the first at `position`, over KV blocks that hold the tokens "
             "from `starts` on; `out` is (most, weight, summed).");
}

}  // namespace plait
