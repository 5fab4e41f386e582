// The executor for Python: a model is described by dictionaries whose arrays it keeps alive.

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <map>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "decoder.h"

namespace nb = nanobind;

namespace plait {
namespace {

template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& sentence) { throw nb::value_error(sentence.c_str()); }

template <class T> T value_of(const nb::dict& dict, const char* key) {
    if (!dict.contains(key)) refuse(std::string("the description of the model lacks '") + key + "'");
    return nb::cast<T>(dict[key]);
}

bool has(const nb::dict& dict, const char* key) { return dict.contains(key) && !dict[key].is_none(); }

// Reads the dictionaries; every array it points into is kept in `kept`.
class Reader {
  public:
    Reader(nb::object weights, nb::list kept) : kept_(std::move(kept)) {
        const auto bytes = nb::cast<Array<const uint8_t>>(weights);
        data_ = reinterpret_cast<const std::byte*>(bytes.data());
        size_ = static_cast<int64_t>(bytes.size());
        kept_.append(weights);
    }

    const float* floats(const nb::dict& dict, const char* key, int64_t at_least) {
        if (!has(dict, key)) return nullptr;
        nb::object array = nb::borrow(dict[key]);
        const auto view = nb::cast<Array<const float>>(array);
        if (static_cast<int64_t>(view.size()) < at_least)
            refuse(std::string("'") + key + "' has " + std::to_string(view.size()) + " numbers, not " + std::to_string(at_least));
        kept_.append(array);
        return view.data();
    }

    // {"format", "columns", "depth", "offset"[, "bias"]}
    Linear linear(const nb::dict& dict, const char* key) {
        if (!has(dict, key)) return {};
        return linear(nb::cast<nb::dict>(dict[key]), std::string(key));
    }
    Linear linear(const nb::dict& one, const std::string& name) {
        Linear result;
        const int format = value_of<int>(one, "format");
        if (format < 0 || format > 3) refuse("'" + name + "' has no known weight format");
        result.matrix.format = static_cast<WeightFormat>(format);
        result.matrix.columns = value_of<int64_t>(one, "columns");
        result.matrix.depth = value_of<int64_t>(one, "depth");
        const int64_t offset = value_of<int64_t>(one, "offset");
        if (result.matrix.columns < 1 || result.matrix.depth < 1 || offset < 0 || offset % 64 ||
            offset + result.matrix.bytes() > size_)
            refuse("'" + name + "' does not lie within the packed weights");
        result.matrix.data = data_ + offset;
        result.bias = floats(one, "bias", result.matrix.panels() * kPanelColumns);
        return result;
    }
    std::vector<Linear> linears(const nb::dict& dict, const char* key) {
        std::vector<Linear> result;
        if (has(dict, key))
            for (nb::handle one : nb::cast<nb::list>(dict[key])) result.push_back(linear(nb::cast<nb::dict>(one), std::string(key)));
        return result;
    }

    // {"kind", "eps"[, "weight", "bias"]}
    Norm norm(const nb::dict& dict, const char* key, int64_t width) {
        Norm result;
        if (!has(dict, key)) return result;
        const nb::dict one = nb::cast<nb::dict>(dict[key]);
        result.present = true;
        result.work.kind = static_cast<NormKind>(value_of<int>(one, "kind"));
        result.work.eps = value_of<float>(one, "eps");
        result.work.weight = floats(one, "weight", width);
        result.work.bias = floats(one, "bias", width);
        return result;
    }

    FeedForwardParts feed_forward(const nb::dict& dict, const char* key) {
        const nb::dict one = value_of<nb::dict>(dict, key);
        FeedForwardParts result;
        result.gated = value_of<bool>(one, "gated");
        result.activation = static_cast<Activation>(value_of<int>(one, "activation"));
        result.swiglu_alpha = value_of<float>(one, "swiglu_alpha");
        result.swiglu_limit = value_of<float>(one, "swiglu_limit");
        result.inner = value_of<int64_t>(one, "inner");
        return result;
    }

    BlockParts block(const nb::dict& dict, int64_t hidden) {
        BlockParts result;
        result.placement = static_cast<Placement>(value_of<int>(dict, "placement"));
        result.residual_scale = value_of<float>(dict, "residual_scale");
        result.attention_in = norm(dict, "attention_in", hidden);
        result.attention_out = norm(dict, "attention_out_norm", hidden);
        result.mlp_in = norm(dict, "mlp_in", hidden);
        result.mlp_out = norm(dict, "mlp_out", hidden);

        AttentionShape& shape = result.attention;
        shape.heads = value_of<int64_t>(dict, "heads");
        shape.kv_heads = value_of<int64_t>(dict, "kv_heads");
        shape.dim = value_of<int64_t>(dict, "dim");
        if (shape.kv_heads < 1 || shape.heads % shape.kv_heads || shape.dim < 16 || shape.dim % 16)
            refuse("heads must be a multiple of kv_heads, and the head's dimension one of 16");
        shape.scale = value_of<float>(dict, "scale");
        shape.window_tokens = value_of<int64_t>(dict, "window_tokens");
        shape.chunk_tokens = value_of<int64_t>(dict, "chunk_tokens");
        shape.softcap = value_of<float>(dict, "softcap");
        shape.sinks = floats(dict, "sinks", shape.heads);
        shape.slopes = floats(dict, "slopes", shape.heads);
        result.qkv = linear(dict, "qkv");
        result.out = linear(dict, "out");
        const int64_t projected = (shape.heads + 2 * shape.kv_heads) * shape.dim;
        if (result.qkv.matrix.columns != projected || result.qkv.matrix.depth != hidden ||
            result.out.matrix.depth != shape.heads * shape.dim || result.out.matrix.columns != hidden)
            refuse("the attention's matrices do not have the shapes of its heads");
        result.rope = value_of<int>(dict, "rope");
        result.rotary_dim = value_of<int64_t>(dict, "rotary_dim");
        if (result.rope >= 0 && (result.rotary_dim < 2 || result.rotary_dim % 2 || result.rotary_dim > shape.dim))
            refuse("the rotary dimension does not fit the head's");
        result.has_temperature = value_of<bool>(dict, "has_temperature");
        result.norm_over_head = value_of<bool>(dict, "norm_over_head");
        result.norm_after_rope = value_of<bool>(dict, "norm_after_rope");
        result.query_norm = norm(dict, "query_norm", result.norm_over_head ? shape.dim : shape.heads * shape.dim);
        result.key_norm = norm(dict, "key_norm", result.norm_over_head ? shape.dim : shape.kv_heads * shape.dim);

        result.mlp = feed_forward(dict, "mlp");
        result.experts_up = linears(dict, "experts_up");
        result.experts_down = linears(dict, "experts_down");
        if (result.experts_up.empty()) {
            result.up = linear(dict, "up");
            result.down = linear(dict, "down");
            check_feed_forward(result.up, result.down, result.mlp, hidden);
            return result;
        }
        RouterWork& routing = result.routing;
        routing.experts = static_cast<int64_t>(result.experts_up.size());
        routing.chosen = value_of<int64_t>(dict, "chosen");
        routing.groups = value_of<int64_t>(dict, "groups");
        routing.kept_groups = value_of<int64_t>(dict, "kept_groups");
        routing.sigmoid = value_of<bool>(dict, "sigmoid");
        routing.renormalises = value_of<bool>(dict, "renormalises");
        routing.best_two = value_of<bool>(dict, "best_two");
        routing.scale = value_of<float>(dict, "router_scale");
        routing.correction = floats(dict, "correction", routing.experts);
        if (result.experts_down.size() != result.experts_up.size() || routing.chosen < 1 || routing.chosen > routing.experts ||
            routing.groups < 1 || routing.experts % routing.groups || routing.experts > 4096)
            refuse("the mixture's experts do not fit its router");
        result.router = floats(dict, "router", routing.experts * hidden);
        if (!result.router) refuse("a mixture of experts needs a router");
        result.router_bias = floats(dict, "router_bias", routing.experts);
        result.weighs_input = value_of<bool>(dict, "weighs_input");
        for (size_t expert = 0; expert < result.experts_up.size(); ++expert)
            check_feed_forward(result.experts_up[expert], result.experts_down[expert], result.mlp, hidden);
        result.shared_up = linear(dict, "shared_up");
        result.shared_down = linear(dict, "shared_down");
        if (result.shared_up.present()) {
            result.shared = feed_forward(dict, "shared");
            check_feed_forward(result.shared_up, result.shared_down, result.shared, hidden);
        }
        return result;
    }

  private:
    static void check_feed_forward(const Linear& up, const Linear& down, const FeedForwardParts& parts, int64_t hidden) {
        if (!up.present() || !down.present() || up.matrix.depth != hidden || down.matrix.columns != hidden ||
            up.matrix.columns != parts.inner * (parts.gated ? 2 : 1) || down.matrix.depth > parts.inner ||
            (parts.gated && parts.inner % 32))
            refuse("the feed-forward matrices do not have the shapes of its inner width");
    }

    nb::list kept_;
    const std::byte* data_ = nullptr;
    int64_t size_ = 0;
};

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
                 int64_t l2_bytes) {
        Reader reader(std::move(weights), kept_);
        ModelParts parts = model_parts(reader, model);
        KvLayout layout = layout_of(kv_format, static_cast<int64_t>(parts.blocks.size()), kv_heads, dim, block_tokens);
        for (const BlockParts& block : parts.blocks)
            if (block.attention.kv_heads != kv_heads || block.attention.dim != dim)
                refuse("every block must cache the same number of heads and dimensions");
        decoder_ = std::make_unique<Decoder>(table_named(""), std::move(pool), std::move(parts), layout,
                                             std::move(collective), l2_bytes);
    }

    static KvLayout layout_of(const std::string& format, int64_t layers, int64_t heads, int64_t dim, int64_t block_tokens) {
        KvLayout layout;
        if (format != "bf16" && format != "int8") refuse("the KV format must be bf16 or int8, not " + format);
        if (block_tokens < kTileTokens || block_tokens % kTileTokens) refuse("a KV block must hold a multiple of 16 tokens");
        layout.format = format == "bf16" ? KvFormat::bf16 : KvFormat::int8;
        layout.layers = layers;
        layout.heads = heads;
        layout.dim = dim;
        layout.block_tokens = block_tokens;
        return layout;
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

    void forward(std::optional<Array<const int32_t>> token_ids, std::optional<Array<const float>> hidden,
                 Array<const int64_t> parts, Array<const int32_t> tables, Array<const int32_t> rope_tables,
                 std::optional<Array<const float>> temperatures, Array<uint8_t> kv, Array<const int32_t> logit_rows,
                 Array<const int32_t> logit_tops, std::optional<Array<float>> out_hidden,
                 std::optional<Array<float>> logits, std::optional<Array<int32_t>> tops) {
        const ModelParts& model = decoder_->parts();
        StepInput input;
        StepOutput output;
        if (token_ids.has_value() == hidden.has_value()) refuse("a span takes either token ids or hidden states");
        if (token_ids) {
            if (!model.embedding.data) refuse("this span does not start the model: it takes hidden states");
            input.rows = static_cast<int64_t>(token_ids->size());
            input.token_ids = token_ids->data();
            for (int64_t row = 0; row < input.rows; ++row)
                if (input.token_ids[row] < 0 || input.token_ids[row] >= model.vocab)
                    refuse("token id " + std::to_string(input.token_ids[row]) + " is beyond the vocabulary");
        } else {
            input.rows = static_cast<int64_t>(hidden->size()) / model.hidden;
            input.hidden = hidden->data();
            if (static_cast<int64_t>(hidden->size()) != input.rows * model.hidden) refuse("hidden states have the wrong width");
        }
        const int64_t count = static_cast<int64_t>(parts.size()) / 4;
        if (parts.ndim() != 2 || parts.shape(1) != 4 || !count) refuse("parts must be [parts, 4] and not empty");
        const int64_t extent = decoder_->layout().extent_bytes(), kv_blocks = static_cast<int64_t>(kv.size()) / extent;
        const int64_t per_block = decoder_->layout().block_tokens;
        int64_t ropes = 0;
        for (const BlockParts& block : model.blocks) ropes = std::max<int64_t>(ropes, block.rope + 1);
        if (static_cast<int64_t>(rope_tables.size()) != count * ropes) refuse("rope_tables must be [parts, ropes]");
        int64_t row = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t* one = parts.data() + 4 * i;
            SequencePart part;
            part.row = one[0];
            part.start = one[1];
            part.tokens = one[2];
            const int64_t blocks = part.tokens < 1 ? 0 : (part.start + part.tokens + per_block - 1) / per_block;
            if (part.row != row || part.tokens < 1 || part.start < 0 || one[3] < 0 ||
                one[3] + blocks > static_cast<int64_t>(tables.size()))
                refuse("the parts do not cover the rows in order, or a block table is too short");
            part.table = tables.data() + one[3];
            for (int64_t block = 0; block < blocks; ++block)
                if (part.table[block] < 0 || part.table[block] >= kv_blocks) refuse("a block table names a KV block that is not there");
            for (int64_t rope = 0; rope < ropes; ++rope) {
                const int32_t index = rope_tables.data()[i * ropes + rope];
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
        input.rope_tables.assign(rope_tables.data(), rope_tables.data() + rope_tables.size());
        if (temperatures) {
            if (static_cast<int64_t>(temperatures->size()) != input.rows) refuse("temperatures must be one a row");
            input.temperatures = temperatures->data();
        }
        for (const BlockParts& block : model.blocks)
            if (block.has_temperature && !input.temperatures) refuse("this model needs temperatures");
        input.memory.layout = decoder_->layout();
        input.memory.data = reinterpret_cast<std::byte*>(kv.data());
        if (model.head.present()) {
            input.logit_count = static_cast<int64_t>(logit_rows.size());
            if (logit_tops.size() != logit_rows.size()) refuse("logit_tops must be one for each of logit_rows");
            input.logit_rows = logit_rows.data();
            input.logit_tops = logit_tops.data();
            int64_t full = 0, best = 0, most = 0;
            for (int64_t i = 0; i < input.logit_count; ++i) {
                if (input.logit_rows[i] < 0 || input.logit_rows[i] >= input.rows || input.logit_tops[i] < 0)
                    refuse("a wanted row of logits is not in this step");
                ++(input.logit_tops[i] ? best : full);
                most = std::max<int64_t>(most, input.logit_tops[i]);
            }
            if (full) {
                if (!logits || static_cast<int64_t>(logits->size()) != full * model.head.matrix.columns)
                    refuse("logits must be [rows that want all of them, columns of the head]");
                output.logits = logits->data();
            }
            if (best) {
                if (!tops || tops->ndim() != 3 || static_cast<int64_t>(tops->shape(0)) != best ||
                    static_cast<int64_t>(tops->shape(1)) < most || tops->shape(2) != 2)
                    refuse("tops must be [rows that want the best, the most wanted, 2]");
                output.tops = reinterpret_cast<TopEntry*>(tops->data());
                output.most = static_cast<int64_t>(tops->shape(1));
            }
        } else {
            if (!out_hidden || static_cast<int64_t>(out_hidden->size()) != input.rows * model.hidden)
                refuse("out_hidden must be [rows, hidden]");
            output.hidden = out_hidden->data();
        }
        nb::gil_scoped_release released;
        decoder_->forward(input, output);
    }

    std::string non_finite() const { return decoder_->non_finite(); }
    std::map<std::string, double> seconds() const {
        std::map<std::string, double> result;
        for (size_t i = 0; i < decoder_->seconds().size(); ++i) result[kPhaseNames[i]] = decoder_->seconds()[i];
        return result;
    }

  private:
    nb::list kept_;
    nb::list ropes_;
    std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<BoundDecoder>(m, "Decoder", "A span of blocks on the CPU; see csrc/decoder.h.")
        .def(nb::init<std::shared_ptr<Pool>, nb::object, const nb::dict&, const std::string&, int64_t, int64_t, int64_t,
                      std::shared_ptr<Collective>, int64_t>(),
             nb::arg("pool"), nb::arg("weights"), nb::arg("model"), nb::arg("kv_format"), nb::arg("kv_heads"), nb::arg("dim"),
             nb::arg("block_tokens"), nb::arg("collective").none(), nb::arg("l2_bytes"))
        .def("add_rope_table", &BoundDecoder::add_rope_table)
        .def("set_rope_table", &BoundDecoder::set_rope_table, nb::arg("index"), nb::arg("rope"), nb::arg("cosines"), nb::arg("sines"))
        .def("forward", &BoundDecoder::forward, nb::arg("token_ids").none(), nb::arg("hidden").none(), nb::arg("parts"),
             nb::arg("tables"), nb::arg("rope_tables"), nb::arg("temperatures").none(), nb::arg("kv"), nb::arg("logit_rows"),
             nb::arg("logit_tops"), nb::arg("out_hidden").none(), nb::arg("logits").none(), nb::arg("tops").none())
        .def("non_finite", &BoundDecoder::non_finite)
        .def("seconds", &BoundDecoder::seconds);
    m.def(
        "kv_extent_bytes",
        [](const std::string& format, int64_t layers, int64_t heads, int64_t dim, int64_t block_tokens) {
            return BoundDecoder::layout_of(format, layers, heads, dim, block_tokens).extent_bytes();
        },
        nb::arg("format"), nb::arg("layers"), nb::arg("heads"), nb::arg("dim"), nb::arg("block_tokens"));
}

}  // namespace plait
