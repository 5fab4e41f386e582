// The executor for Python: a model is described by dictionaries whose arrays it keeps alive.

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <map>
#include <memory>
#include <optional>

#include "model_reader.h"

namespace nb = nanobind;

namespace plait {
namespace {

ModelParts model_parts(Reader& reader, const nb::dict& model) {
    ModelParts parts;
    parts.hidden = value_of<int64_t>(model, "hidden");
    parts.vocab = value_of<int64_t>(model, "vocab");
    for (nb::handle block : value_of<nb::list>(model, "blocks"))
        parts.blocks.push_back(reader.block(nb::cast<nb::dict>(block), parts.hidden));
    parts.embedding = reader.linear(model, "embedding").matrix;
    if (parts.embedding.data && (parts.embedding.columns != parts.vocab || parts.embedding.depth != parts.hidden))
        refuse("the embedding does not have the shape of the vocabulary");
    parts.embedding_scale = value_of<float>(model, "embedding_scale");
    parts.position_rows = value_of<int64_t>(model, "position_rows");
    parts.position_offset = value_of<int64_t>(model, "position_offset");
    parts.positions = reader.floats(model, "positions", parts.position_rows * parts.hidden);
    parts.embedding_norm = reader.norm(model, "embedding_norm", parts.hidden);
    parts.final_norm = reader.norm(model, "final_norm", parts.hidden);
    parts.head = reader.linear(model, "head");
    if (parts.head.present() && parts.head.matrix.depth != parts.hidden) refuse("the head does not have the model's width");
    parts.first_id = value_of<int64_t>(model, "first_id");
    parts.token_limit = value_of<int64_t>(model, "token_limit");
    parts.logit_scale = value_of<float>(model, "logit_scale");
    parts.logit_softcap = value_of<float>(model, "logit_softcap");
    return parts;
}

class BoundDecoder {
  public:
    BoundDecoder(std::shared_ptr<Pool> pool, nb::object weights, const nb::dict& model, const std::string& kv_format,
                 int64_t kv_heads, int64_t dim, int64_t block_tokens, std::shared_ptr<Collective> collective,
                 int64_t l2_bytes, bool by_parts) {
        if (by_parts && dim > 1024) refuse("attention by parts is for heads of at most 1024 dimensions");
        Reader reader(std::move(weights), kept_);
        ModelParts parts = model_parts(reader, model);
        KvLayout layout = layout_of(kv_format, static_cast<int64_t>(parts.blocks.size()), kv_heads, dim, block_tokens);
        for (const BlockParts& block : parts.blocks)
            if (block.attention.kv_heads != kv_heads || block.attention.dim != dim)
                refuse("every block must cache the same number of heads and dimensions");
        decoder_ = std::make_unique<Decoder>(table_named(""), std::move(pool), std::move(parts), layout,
                                             std::move(collective), l2_bytes, by_parts);
    }

    int add_rope_table() {
        ropes_.append(nb::none());
        return decoder_->add_rope_table({});
    }
    // Cosines and sines [positions, rotary_dim / 2] of the step's rotation number `rope`; a longer table may replace it.
    void set_rope_table(int index, int rope, nb::object cosines, nb::object sines) {
        const auto c = nb::cast<nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>>(cosines);
        const auto s = nb::cast<nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>>(sines);
        if (index < 0 || index >= decoder_->rope_table_count()) refuse("there is no such rope table");
        if (c.shape(0) != s.shape(0) || c.shape(1) != s.shape(1)) refuse("cosines and sines must have one shape");
        for (const BlockParts& block : decoder_->parts().blocks)
            if (block.rope == rope && static_cast<int64_t>(c.shape(1)) != block.rotary_dim / 2)
                refuse("the rope table is not as wide as the rotary dimension");
        decoder_->replace_rope_table(index, {c.data(), s.data(), static_cast<int64_t>(c.shape(0))});
        ropes_[index] = nb::make_tuple(cosines, sines);
    }

    // A pass, from its first to its last block at once.
    void forward(const nb::dict& step) {
        StepInput input;
        StepOutput output;
        const StepArrays arrays = read(step, false, input, output);
        nb::gil_scoped_release released;
        decoder_->forward(input, output);
    }

    // The same with stops: see csrc/decoder.h.
    void start(const nb::dict& step) {
        StepInput input;
        StepOutput output;
        if (!decoder_->by_parts()) refuse("a pass with stops is for attention by parts");
        StepArrays arrays = read(step, true, input, output);
        {
            nb::gil_scoped_release released;
            decoder_->start(std::move(input), output);
        }
        started_ = std::move(arrays);  // not before: the pass before may look at its own
    }

    void advance(const nb::list& elsewhere) {
        if (decoder_->stage() != Decoder::Stage::started && decoder_->stage() != Decoder::Stage::attended)
            refuse("a pass advances when it has been started, and after each attention");
        const StepInput& input = decoder_->started();
        const AttentionShape& shape = decoder_->parts().blocks[input.first_block].attention;
        std::vector<std::vector<PartialRows>> parts(input.shares.size());
        const bool first = decoder_->stage() == Decoder::Stage::started;
        if (elsewhere.size() != (first ? 0 : parts.size())) refuse("every share needs a list of parts, but not at first");
        for (size_t share = 0; share < elsewhere.size(); ++share)
            for (nb::handle one : nb::cast<nb::list>(elsewhere[share]))
                parts[share].push_back(read_part(one, input.shares[share].pairs(), shape.dim));
        nb::gil_scoped_release released;
        decoder_->advance(parts);
    }

    void attend() {
        if (decoder_->stage() != Decoder::Stage::queries) refuse("a pass attends after it has advanced to a block");
        nb::gil_scoped_release released;
        decoder_->attend();
    }

    // Of a share, float32 [tokens, heads, dim], a copy.
    void queries(int64_t share, const Array<float>& out) {
        if (decoder_->stage() != Decoder::Stage::queries) refuse("queries are to be had after a pass has advanced to a block");
        const StepInput& input = decoder_->started();
        if (share < 0 || share >= static_cast<int64_t>(input.shares.size())) refuse("there is no such share");
        const AttentionShape& shape = decoder_->parts().blocks[input.first_block].attention;
        const int64_t tokens = input.shares[share].part().tokens, width = shape.heads * shape.dim;
        if (static_cast<int64_t>(out.size()) != tokens * width) refuse("queries are [tokens, heads, dim]");
        for (int64_t row = 0; row < tokens; ++row)
            std::copy_n(decoder_->share_queries(share) + row * decoder_->query_stride(), width, out.data() + row * width);
    }

    std::string non_finite() const { return decoder_->non_finite(); }
    std::map<std::string, double> seconds() const {
        std::map<std::string, double> result;
        for (size_t i = 0; i < decoder_->seconds().size(); ++i) result[kPhaseNames[i]] = decoder_->seconds()[i];
        return result;
    }

  private:
    // What a pass was given, which must live as long as it may be looked at.
    struct StepArrays {
        std::optional<Array<const int32_t>> token_ids;
        std::optional<Array<const float>> hidden, temperatures;
        Array<const int64_t> parts;
        Array<const int32_t> tables, rope_tables, logit_rows, logit_tops;
        Array<uint8_t> kv;
        std::optional<Array<float>> out_hidden, logits;
        std::optional<Array<int32_t>> tops;
    };
    // Not converted: what is written into a copy is lost.
    template <class T> static Array<T> array(const nb::dict& step, const char* key) {
        if (!step.contains(key)) refuse(std::string("a step lacks '") + key + "'");
        return nb::cast<Array<T>>(step[key], false);
    }
    template <class T> static std::optional<Array<T>> array_or_none(const nb::dict& step, const char* key) {
        if (!has(step, key)) return {};
        return nb::cast<Array<T>>(step[key], false);
    }

    StepArrays read(const nb::dict& step, bool stops, StepInput& input, StepOutput& output) const {
        StepArrays arrays{array_or_none<const int32_t>(step, "token_ids"),
                          array_or_none<const float>(step, "hidden"),
                          array_or_none<const float>(step, "temperatures"),
                          array<const int64_t>(step, "parts"),
                          array<const int32_t>(step, "tables"),
                          array<const int32_t>(step, "rope_tables"),
                          array<const int32_t>(step, "logit_rows"),
                          array<const int32_t>(step, "logit_tops"),
                          array<uint8_t>(step, "kv"),
                          array_or_none<float>(step, "out_hidden"),
                          array_or_none<float>(step, "logits"),
                          array_or_none<int32_t>(step, "tops")};
        const auto count = static_cast<int64_t>(decoder_->parts().blocks.size());
        input.first_block = value_of<int64_t>(step, "first_block");
        input.end_block = value_of<int64_t>(step, "end_block");
        if (input.first_block < 0 || input.first_block >= input.end_block || input.end_block > count)
            refuse("the blocks to run are not those of this span");
        read_rows(arrays, input);
        read_parts(arrays, stops, input);
        if (decoder_->parts().head.present() && input.end_block == count)
            read_logits(arrays, input, output);
        else
            read_hidden_output(arrays, input, output);
        return arrays;
    }

    void read_rows(const StepArrays& step, StepInput& input) const {
        const ModelParts& model = decoder_->parts();
        if (step.token_ids.has_value() == step.hidden.has_value()) refuse("a span takes either token ids or hidden states");
        if (step.token_ids) {
            if (!model.embedding.data || input.first_block)
                refuse("these blocks do not start the model: they take hidden states");
            input.rows = static_cast<int64_t>(step.token_ids->size());
            input.token_ids = step.token_ids->data();
            for (int64_t row = 0; row < input.rows; ++row)
                if (input.token_ids[row] < 0 || input.token_ids[row] >= model.vocab)
                    refuse("token id " + std::to_string(input.token_ids[row]) + " is beyond the vocabulary");
        } else {
            input.rows = static_cast<int64_t>(step.hidden->size()) / model.hidden;
            input.hidden = step.hidden->data();
            if (static_cast<int64_t>(step.hidden->size()) != input.rows * model.hidden) refuse("hidden states have the wrong width");
        }
        if (step.temperatures) {
            if (static_cast<int64_t>(step.temperatures->size()) != input.rows) refuse("temperatures must be one a row");
            input.temperatures = step.temperatures->data();
        }
        for (const BlockParts& block : model.blocks)
            if (block.has_temperature && !input.temperatures) refuse("this model needs temperatures");
    }

    void read_parts(const StepArrays& step, bool stops, StepInput& input) const {
        const ModelParts& model = decoder_->parts();
        const int64_t count = static_cast<int64_t>(step.parts.size()) / 4;
        if (step.parts.ndim() != 2 || step.parts.shape(1) != 4 || !count) refuse("parts must be [parts, 4] and not empty");
        input.memory.layout = decoder_->layout();
        input.memory.data = reinterpret_cast<std::byte*>(step.kv.data());
        const int64_t kv_blocks = static_cast<int64_t>(step.kv.size()) / decoder_->layout().extent_bytes();
        int64_t ropes = 0;
        for (const BlockParts& block : model.blocks) ropes = std::max<int64_t>(ropes, block.rope + 1);
        if (static_cast<int64_t>(step.rope_tables.size()) != count * ropes) refuse("rope_tables must be [parts, ropes]");
        input.rope_tables.assign(step.rope_tables.data(), step.rope_tables.data() + step.rope_tables.size());
        int64_t row = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t* one = step.parts.data() + 4 * i;
            SequencePart part;
            part.row = one[0];
            part.start = one[1];
            part.tokens = one[2];
            if (part.row != row || part.tokens < 1 || part.start < 0) refuse("the parts do not cover the rows in order");
            if (one[3] < 0 || one[3] > static_cast<int64_t>(step.tables.size())) refuse("a block table is not there");
            part.table = step.tables.data() + one[3];
            read_table(part, static_cast<int64_t>(step.tables.size()) - one[3], kv_blocks, stops, input);
            for (int64_t rope = 0; rope < ropes; ++rope) {
                const int32_t index = step.rope_tables.data()[i * ropes + rope];
                if (index < 0 || index >= decoder_->rope_table_count() ||
                    decoder_->rope_table(index).positions < part.start + part.tokens)
                    refuse("a rope table is shorter than a sequence");
            }
            if (model.positions && part.start + part.tokens + model.position_offset > model.position_rows)
                refuse("a sequence is longer than the learned positions");
            row += part.tokens;
            input.parts.push_back(part);
        }
        if (row != input.rows) refuse("the parts do not cover all rows");
    }

    // Numbers from `kv_blocks` on are of blocks elsewhere, which may come before the step's own in a pass with stops.
    void read_table(const SequencePart& part, int64_t most, int64_t kv_blocks, bool stops, StepInput& input) const {
        const int64_t per_block = decoder_->layout().block_tokens;
        const int64_t blocks = (part.start + part.tokens + per_block - 1) / per_block;
        if (blocks > most) refuse("a block table is too short");
        std::vector<int32_t> here;
        std::vector<int64_t> starts;
        for (int64_t block = 0; block < blocks; ++block) {
            if (part.table[block] < 0) refuse("a block table names a KV block that is not there");
            if (part.table[block] >= kv_blocks) {
                if (!stops || block >= part.start / per_block) refuse("a block table names a KV block that is not there");
                continue;
            }
            here.push_back(part.table[block]);
            starts.push_back(block * per_block);
        }
        if (decoder_->by_parts())
            input.shares.emplace_back(part, std::move(here), std::move(starts));
    }

    void read_logits(const StepArrays& step, StepInput& input, StepOutput& output) const {
        const ModelParts& model = decoder_->parts();
        input.logit_count = static_cast<int64_t>(step.logit_rows.size());
        if (step.logit_tops.size() != step.logit_rows.size()) refuse("logit_tops must be one for each of logit_rows");
        input.logit_rows = step.logit_rows.data();
        input.logit_tops = step.logit_tops.data();
        int64_t full = 0, best = 0, most = 0;
        for (int64_t i = 0; i < input.logit_count; ++i) {
            if (input.logit_rows[i] < 0 || input.logit_rows[i] >= input.rows || input.logit_tops[i] < 0)
                refuse("a wanted row of logits is not in this step");
            ++(input.logit_tops[i] ? best : full);
            most = std::max<int64_t>(most, input.logit_tops[i]);
        }
        if (full) {
            if (!step.logits || static_cast<int64_t>(step.logits->size()) != full * model.head.matrix.columns)
                refuse("logits must be [rows that want all of them, columns of the head]");
            output.logits = step.logits->data();
        }
        if (best) {
            if (!step.tops || step.tops->ndim() != 3 || static_cast<int64_t>(step.tops->shape(0)) != best ||
                static_cast<int64_t>(step.tops->shape(1)) < most || step.tops->shape(2) != 2)
                refuse("tops must be [rows that want the best, the most wanted, 2]");
            output.tops = reinterpret_cast<TopEntry*>(step.tops->data());
            output.most = static_cast<int64_t>(step.tops->shape(1));
        }
    }

    void read_hidden_output(const StepArrays& step, const StepInput& input, StepOutput& output) const {
        if (!step.out_hidden || static_cast<int64_t>(step.out_hidden->size()) != input.rows * decoder_->parts().hidden)
            refuse("out_hidden must be [rows, hidden]");
        output.hidden = step.out_hidden->data();
    }

    nb::list kept_;
    nb::list ropes_;
    std::optional<StepArrays> started_;
    std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<BoundDecoder>(m, "Decoder", "A span of blocks on the CPU; see csrc/decoder.h.")
        .def(nb::init<std::shared_ptr<Pool>, nb::object, const nb::dict&, const std::string&, int64_t, int64_t, int64_t,
                      std::shared_ptr<Collective>, int64_t, bool>(),
             nb::arg("pool"), nb::arg("weights"), nb::arg("model"), nb::arg("kv_format"), nb::arg("kv_heads"), nb::arg("dim"),
             nb::arg("block_tokens"), nb::arg("collective").none(), nb::arg("l2_bytes"), nb::arg("by_parts"))
        .def("add_rope_table", &BoundDecoder::add_rope_table)
        .def("set_rope_table", &BoundDecoder::set_rope_table, nb::arg("index"), nb::arg("rope"), nb::arg("cosines"), nb::arg("sines"))
        .def("forward", &BoundDecoder::forward, nb::arg("step"))
        .def("start", &BoundDecoder::start, nb::arg("step"))
        .def("advance", &BoundDecoder::advance, nb::arg("elsewhere"))
        .def("attend", &BoundDecoder::attend)
        .def("queries", &BoundDecoder::queries, nb::arg("share"), nb::arg("out").noconvert())
        .def("non_finite", &BoundDecoder::non_finite)
        .def("seconds", &BoundDecoder::seconds);
    m.def(
        "kv_extent_bytes",
        [](const std::string& format, int64_t layers, int64_t heads, int64_t dim, int64_t block_tokens) {
            return layout_of(format, layers, heads, dim, block_tokens).extent_bytes();
        },
        nb::arg("format"), nb::arg("layers"), nb::arg("heads"), nb::arg("dim"), nb::arg("block_tokens"));
}

}  // namespace plait
