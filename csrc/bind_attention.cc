// Attention over paged keys and values for Python: what the tests and bench/attention.py drive the kernels with.
// Forward passes call the same kernels from decoder.cc.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "bindings.h"
#include "pool.h"

namespace nb = nanobind;

namespace plait {
namespace {

using Vectors = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Parts = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& why) { throw nb::value_error(why.c_str()); }

KvFormat format_named(const std::string& name) {
    if (name == "bf16") return KvFormat::bf16;
    if (name == "int8") return KvFormat::int8;
    refuse("keys and values are kept in 'bf16' or 'int8', not in '" + name + "'");
}

// The largest head and the longest context that any of this is for: products of them stay far from overflow.
constexpr int64_t kMostDim = 1024, kMostKeys = int64_t{1} << 24, kMostHeads = 1024;

void check_shape(int64_t heads, int64_t kv_heads, int64_t dim) {
    if (dim < 16 || dim > kMostDim || dim % 16)
        refuse("heads have a multiple of 16 dimensions, at most 1024; not " + std::to_string(dim));
    if (kv_heads < 1 || heads < kv_heads || heads > kMostHeads || heads % kv_heads)
        refuse("query heads are a multiple of the kv heads, at most 1024; not " + std::to_string(heads) + " of " +
               std::to_string(kv_heads));
}

AttentionShape plain_shape(int64_t heads, int64_t kv_heads, int64_t dim, int64_t window_tokens, int64_t chunk_tokens) {
    check_shape(heads, kv_heads, dim);
    if (window_tokens < 0 || chunk_tokens < 0) refuse("a window or chunk has at least one token, or is 0: none");
    AttentionShape shape;
    shape.heads = heads;
    shape.kv_heads = kv_heads;
    shape.dim = dim;
    shape.window_tokens = window_tokens;
    shape.chunk_tokens = chunk_tokens;
    return shape;
}

int64_t attention_rows(const std::string& isa, const std::string& format, int64_t heads, int64_t kv_heads, int64_t dim,
                       int64_t keys, int64_t l2_bytes, int64_t window_tokens, int64_t chunk_tokens) {
    if (keys < 1 || keys > kMostKeys || l2_bytes < 1) refuse("attention_rows wants at least one key and some cache");
    return table_named(isa).attention_rows(plain_shape(heads, kv_heads, dim, window_tokens, chunk_tokens),
                                           format_named(format), keys, l2_bytes);
}

int64_t attention_scratch_bytes(const std::string& isa, const std::string& format, int64_t heads, int64_t kv_heads,
                                int64_t dim, int64_t most_keys) {
    if (most_keys < 1 || most_keys > kMostKeys) refuse("attention_scratch_bytes wants at least one key");
    return table_named(isa).attention_scratch_bytes(plain_shape(heads, kv_heads, dim, 0, 0), format_named(format),
                                                    most_keys);
}

// What one call of attend did.
struct AttentionRun {
    nb::object out;           // float32 [rows][heads][dim]
    int64_t scored = 0;       // tiles, counted once for each query row and head: products with keys
    int64_t weighed = 0;      // the same, products with values
    int64_t units = 0;
    int64_t touched_bytes = 0;  // of the scratch memory of the thread that used most, if asked for
};

constexpr unsigned char kUntouched = 0xa5;
constexpr int64_t kGuardBytes = 4096;

// KV memory of its own and the threads that attend over it.
class KvPages {
  public:
    KvPages(const std::string& format, int64_t layers, int64_t kv_heads, int64_t dim, int64_t block_tokens,
            int64_t kv_blocks, int threads) {
        check_shape(kv_heads, kv_heads, dim);
        if (layers < 1 || layers > 4096) refuse("KV memory is for 1 to 4096 layers");
        if (block_tokens < kTileTokens || block_tokens % kTileTokens || block_tokens > 65536)
            refuse("KV blocks hold a multiple of 16 tokens, at most 65536");
        if (kv_blocks < 1 || kv_blocks > std::numeric_limits<int32_t>::max()) refuse("KV memory has some blocks");
        if (threads < 1 || threads > 1024) refuse("attention wants 1 to 1024 threads");
        memory_.layout = {format_named(format), layers, kv_heads, dim, block_tokens};
        kv_blocks_ = kv_blocks;
        if (kv_blocks > std::numeric_limits<int64_t>::max() / 4 / memory_.layout.extent_bytes())
            refuse("that is more KV memory than can be addressed");
        arena_ = std::make_unique<Arena>(kv_blocks * memory_.layout.extent_bytes());
        memory_.data = arena_->data();
        pool_ = std::make_unique<Pool>(threads, nullptr, 0);
    }

    nb::ndarray<nb::numpy, uint8_t> bytes() {
        const size_t shape[] = {static_cast<size_t>(kv_blocks_), static_cast<size_t>(memory_.layout.extent_bytes())};
        return nb::ndarray<nb::numpy, uint8_t>(memory_.data, 2, shape, nb::find(*this));
    }

    void append(const std::string& isa, int64_t layer, const Table& table, int64_t start, const Vectors& keys,
                const Vectors& values) {
        const KernelTable& kernels = table_named(isa);
        const KvLayout& layout = memory_.layout;
        const int64_t tokens = keys.shape(0);
        check_layer(layer);
        for (const Vectors* each : {&keys, &values})
            if (static_cast<int64_t>(each->shape(0)) != tokens ||
                static_cast<int64_t>(each->shape(1)) != layout.heads ||
                static_cast<int64_t>(each->shape(2)) != layout.dim)
                refuse("keys and values are float32 [tokens, kv_heads, dim] of the KV memory's heads");
        check_table(table, start, tokens);
        const nb::gil_scoped_release released;
        const int64_t width = layout.heads * layout.dim;
        pool_->run([&](int thread) {
            if (thread > 0) return;
            for (int64_t i = 0; i < tokens; ++i)
                kernels.append_kv(memory_, layer, table.data(), start + i, keys.data() + i * width,
                                  values.data() + i * width);
        });
    }

    AttentionRun attend(const std::string& isa, int64_t layer, const Vectors& queries, const Parts& parts,
                        const std::vector<Table>& tables, float scale, int64_t window_tokens, int64_t chunk_tokens,
                        float softcap, const std::optional<Numbers>& sinks, const std::optional<Numbers>& slopes,
                        const std::string& way, int64_t unit_rows, int64_t l2_bytes, bool watches_scratch) {
        const KernelTable& kernels = table_named(isa);
        const KvLayout& layout = memory_.layout;
        check_layer(layer);
        const int64_t rows = queries.shape(0), heads = queries.shape(1), dim = queries.shape(2);
        AttentionWork work;
        work.shape = plain_shape(heads, layout.heads, dim, window_tokens, chunk_tokens);
        if (dim != layout.dim) refuse("queries are float32 [rows, heads, dim] with the KV memory's dim");
        if (!std::isfinite(scale) || !std::isfinite(softcap) || softcap < 0)
            refuse("the scale is finite, and a softcap is positive, or 0: none");
        for (const std::optional<Numbers>* each : {&sinks, &slopes})
            if (*each && static_cast<int64_t>((*each)->shape(0)) != heads)
                refuse("sinks and slopes are float32 [heads]");
        work.shape.scale = scale;
        work.shape.softcap = softcap;
        work.shape.sinks = sinks ? sinks->data() : nullptr;
        work.shape.slopes = slopes ? slopes->data() : nullptr;
        work.memory = memory_;
        work.layer = layer;
        work.queries = queries.data();
        work.query_stride = work.out_stride = heads * dim;

        const Way chosen = way_named(way);
        const int64_t group = heads / layout.heads;
        if (unit_rows < 0 || (unit_rows > 1 && unit_rows * group > 64))
            refuse("a unit takes at most 64 query rows times heads that share a kv head; 0: as many as are good");
        if (l2_bytes < 1) refuse("l2_bytes is the size of a core's cache");
        if (tables.size() != parts.shape(0)) refuse("every part needs a table of its KV blocks");
        std::vector<SequencePart> sequence_parts;
        std::vector<Unit> units;
        int64_t most_keys = 1, next_row = 0;
        for (size_t i = 0; i < parts.shape(0); ++i) {
            const SequencePart part{tables[i].data(), parts(i, 0), parts(i, 1), parts(i, 2)};
            if (part.tokens < 1 || part.row != next_row || part.row + part.tokens > rows)
                refuse("parts are (row, start, tokens) that cover the queries' rows in order");
            if (chosen == Way::split && part.tokens != 1) refuse("only a part of one token is cut along its keys");
            check_table(tables[i], part.start, part.tokens);
            next_row += part.tokens;
            most_keys = std::max(most_keys, part.start + part.tokens);
            int64_t step = unit_rows;
            if (step == 0 && chosen == Way::two_dimensional) step = std::max<int64_t>(1, 64 / group);
            if (step == 0)
                step = kernels.attention_rows(work.shape, layout.format, part.start + part.tokens, l2_bytes);
            for (int64_t head = 0; head < layout.heads; ++head)
                for (int64_t begin = 0; begin < part.tokens; begin += step)
                    units.push_back({i, head, begin, std::min(begin + step, part.tokens)});
            sequence_parts.push_back(part);
        }
        if (next_row != rows) refuse("parts are (row, start, tokens) that cover the queries' rows in order");
        // Later units have more keys: first, so that no thread starts a long one when the others are done.
        std::reverse(units.begin(), units.end());

        auto* out = new float[std::max<int64_t>(1, rows * heads * dim)];
        nb::capsule owner(out, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
        work.out = out;
        AttentionRun run;
        run.units = static_cast<int64_t>(units.size());
        {
            const nb::gil_scoped_release released;
            const int64_t keys = chosen == Way::two_dimensional ? std::max(most_keys, kPartitionTokens) : most_keys;
            const int64_t scratch = kernels.attention_scratch_bytes(work.shape, layout.format, keys);
            reserve(round_up(scratch + kGuardBytes, 4096));
            if (watches_scratch) std::memset(scratch_->data(), kUntouched, scratch_->bytes());
            if (chosen == Way::split)
                run_split(kernels, work, sequence_parts, most_keys);
            else
                run_units(kernels, work, sequence_parts, units, chosen, run);
            if (watches_scratch) run.touched_bytes = touched_bytes(scratch);
        }
        const size_t shape[] = {static_cast<size_t>(rows), static_cast<size_t>(heads), static_cast<size_t>(dim)};
        run.out = nb::cast(nb::ndarray<nb::numpy, float>(out, 3, shape, owner));
        return run;
    }

    int threads() const { return pool_->threads(); }

  private:
    enum class Way { whole, split, two_dimensional };
    struct Unit {
        size_t part;
        int64_t kv_head, begin, end;
    };

    static Way way_named(const std::string& name) {
        if (name == "whole") return Way::whole;
        if (name == "split") return Way::split;
        if (name == "two-dimensional") return Way::two_dimensional;
        refuse("attention runs 'whole', 'split' along the keys, or 'two-dimensional'; not '" + name + "'");
    }

    void check_layer(int64_t layer) const {
        if (layer < 0 || layer >= memory_.layout.layers) refuse("there is no layer " + std::to_string(layer));
    }

    void check_table(const Table& table, int64_t start, int64_t tokens) const {
        if (start < 0 || start > kMostKeys || tokens > kMostKeys - start)
            refuse("positions are from 0 to 2^24: float32 holds no others");
        const int64_t blocks = round_up(start + tokens, memory_.layout.block_tokens) / memory_.layout.block_tokens;
        if (static_cast<int64_t>(table.shape(0)) < blocks)
            refuse("the table has " + std::to_string(table.shape(0)) + " KV blocks where the tokens need " +
                   std::to_string(blocks));
        for (int64_t i = 0; i < blocks; ++i)
            if (table(i) < 0 || table(i) >= kv_blocks_) refuse("there is no KV block " + std::to_string(table(i)));
    }

    void reserve(int64_t bytes_each) {
        scratch_each_ = bytes_each;
        const int64_t bytes = bytes_each * pool_->threads();
        if (!scratch_ || scratch_->bytes() < bytes) {
            scratch_.reset();
            scratch_ = std::make_unique<Arena>(bytes);
        }
    }

    // The most that a thread wrote of its `bytes`. RuntimeError if it wrote more.
    int64_t touched_bytes(int64_t bytes) const {
        int64_t most = 0;
        for (int thread = 0; thread < pool_->threads(); ++thread) {
            const std::byte* own = scratch_->data() + thread * scratch_each_;
            int64_t last = scratch_each_;
            while (last > 0 && own[last - 1] == std::byte{kUntouched}) --last;
            most = std::max(most, last);
        }
        if (most > bytes) throw std::runtime_error("attention wrote behind its scratch memory");
        return most;
    }

    void run_units(const KernelTable& kernels, const AttentionWork& work, const std::vector<SequencePart>& parts,
                   const std::vector<Unit>& units, Way way, AttentionRun& run) {
        WorkCounter counter;
        std::atomic<int64_t> scored{0}, weighed{0};
        pool_->run([&](int thread) {
            std::byte* scratch = scratch_->data() + thread * scratch_each_;
            for (int64_t i = counter.take(); i < static_cast<int64_t>(units.size()); i = counter.take()) {
                const Unit& unit = units[i];
                const auto attend = way == Way::whole ? kernels.attend : kernels.attend_2d;
                attend(work, parts[unit.part], unit.kv_head, unit.begin, unit.end, scratch);
                AttentionCount count;
                std::memcpy(&count, scratch, sizeof count);
                scored += count.scored;
                weighed += count.weighed;
            }
        });
        run.scored = scored;
        run.weighed = weighed;
    }

    void run_split(const KernelTable& kernels, const AttentionWork& work, const std::vector<SequencePart>& parts,
                   int64_t most_keys) {
        const int64_t heads = work.shape.kv_heads, group = work.shape.heads / heads;
        const int64_t partitions = round_up(most_keys, kPartitionTokens) / kPartitionTokens;
        const int64_t score_floats = group * split_score_floats(most_keys);
        const int64_t partial_floats = partitions * group * (work.shape.dim + 1);
        const int64_t pairs = static_cast<int64_t>(parts.size()) * heads;
        std::vector<float> scores(pairs * score_floats), partials(pairs * partial_floats);
        WorkCounter counters[3];
        pool_->run([&](int thread) {
            std::byte* scratch = scratch_->data() + thread * scratch_each_;
            for (int stage = 0; stage < 3; ++stage) {
                const int64_t units = stage < 2 ? pairs * partitions : pairs;
                for (int64_t i = counters[stage].take(); i < units; i = counters[stage].take()) {
                    const int64_t pair = stage < 2 ? i / partitions : i, partition = i % partitions;
                    const SequencePart& part = parts[pair / heads];
                    float* own = scores.data() + pair * score_floats;
                    float* partial = partials.data() + pair * partial_floats;
                    if (stage == 0)
                        kernels.split_scores(work, part, pair % heads, partition, own, scratch);
                    else if (stage == 1)
                        kernels.split_products(work, part, pair % heads, partition, own, partial, scratch);
                    else
                        kernels.split_merge(work, part, pair % heads, own, partial);
                }
                pool_->barrier();
            }
        });
    }

    KvMemory memory_;
    int64_t kv_blocks_ = 0, scratch_each_ = 0;
    std::unique_ptr<Arena> arena_, scratch_;
    std::unique_ptr<Pool> pool_;
};

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention_rows", attention_rows, nb::arg("isa"), nb::arg("format"), nb::arg("heads"), nb::arg("kv_heads"),
          nb::arg("dim"), nb::arg("keys"), nb::arg("l2_bytes"), nb::arg("window_tokens") = 0,
          nb::arg("chunk_tokens") = 0,
          "How many query rows of a sequence with this many keys are attended in one unit of work.");
    m.def("attention_scratch_bytes", attention_scratch_bytes, nb::arg("isa"), nb::arg("format"), nb::arg("heads"),
          nb::arg("kv_heads"), nb::arg("dim"), nb::arg("most_keys"),
          "Scratch memory that a thread needs for attention over up to this many keys.");
    nb::class_<AttentionRun>(m, "AttentionRun", "What one call of KvPages.attend did.")
        .def_ro("out", &AttentionRun::out, "float32 [rows, heads, dim]")
        .def_ro("scored", &AttentionRun::scored, "Tiles of 16 keys times query rows and heads, multiplied with keys.")
        .def_ro("weighed", &AttentionRun::weighed, "The same, multiplied with values.")
        .def_ro("units", &AttentionRun::units, "Units of work.")
        .def_ro("touched_bytes", &AttentionRun::touched_bytes, "Scratch memory that a thread wrote, if watched.");
    nb::class_<KvPages>(m, "KvPages",
                        "Paged keys and values in memory of their own, in 'bf16' or 'int8', and threads that attend "
                        "over them. For tests and measurements of the kernels.")
        .def(nb::init<const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int>(), nb::arg("format"),
             nb::arg("layers"), nb::arg("kv_heads"), nb::arg("dim"), nb::arg("block_tokens"), nb::arg("kv_blocks"),
             nb::arg("threads") = 1)
        .def_prop_ro("bytes", &KvPages::bytes, "The memory itself, uint8 [kv_blocks, extent bytes].")
        .def_prop_ro("threads", &KvPages::threads)
        .def("append", &KvPages::append, nb::arg("isa"), nb::arg("layer"), nb::arg("table"), nb::arg("start"),
             nb::arg("keys"), nb::arg("values"),
             "Store keys and values float32 [tokens, kv_heads, dim] of the tokens from position `start` of the "
             "sequence whose KV blocks are `table`.")
        .def("attend", &KvPages::attend, nb::arg("isa"), nb::arg("layer"), nb::arg("queries"), nb::arg("parts"),
             nb::arg("tables"), nb::kw_only(), nb::arg("scale"), nb::arg("window_tokens") = 0,
             nb::arg("chunk_tokens") = 0, nb::arg("softcap") = 0.0f, nb::arg("sinks") = nb::none(),
             nb::arg("slopes") = nb::none(), nb::arg("way") = "whole", nb::arg("unit_rows") = 0,
             nb::arg("l2_bytes") = 1 << 20, nb::arg("watches_scratch") = false,
             "Attention of queries float32 [rows, heads, dim]. `parts` int64 [sequences, 3] are (first row, position "
             "of that row, rows), `tables` their KV blocks. `way`: 'whole' rows against all their keys, 'split' along "
             "the keys (one row a part), or 'two-dimensional' for comparison. `unit_rows` query rows make one unit of "
             "work, 0: as many as attention_rows says.");
}

}  // namespace plait
