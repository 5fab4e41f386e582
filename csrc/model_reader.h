// Reads the dictionaries that describe a model to the extension. For bind_*.cc only.

#pragma once

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "decoder.h"

namespace plait {

namespace nb = nanobind;

template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

[[noreturn]] inline void refuse(const std::string& sentence) { throw nb::value_error(sentence.c_str()); }

template <class T> T value_of(const nb::dict& dict, const char* key) {
    if (!dict.contains(key)) refuse(std::string("the description of the model lacks '") + key + "'");
    return nb::cast<T>(dict[key]);
}

inline bool has(const nb::dict& dict, const char* key) { return dict.contains(key) && !dict[key].is_none(); }

// Reads the dictionaries; every array it points into is kept in `kept`.
class Reader {
  public:
    explicit Reader(nb::list kept) : kept_(std::move(kept)) {}
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

    AttentionShape attention(const nb::dict& dict) {
        AttentionShape shape;
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
        return shape;
    }

    BlockParts block(const nb::dict& dict, int64_t hidden) {
        BlockParts result;
        result.placement = static_cast<Placement>(value_of<int>(dict, "placement"));
        result.residual_scale = value_of<float>(dict, "residual_scale");
        result.attention_in = norm(dict, "attention_in", hidden);
        result.attention_out = norm(dict, "attention_out_norm", hidden);
        result.mlp_in = norm(dict, "mlp_in", hidden);
        result.mlp_out = norm(dict, "mlp_out", hidden);

        result.attention = attention(dict);
        const AttentionShape& shape = result.attention;
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

// One part of an attention, (most, weight, summed) float64 of so many rows times heads.
inline PartialRows read_part(nb::handle one, int64_t pairs, int64_t dim) {
    const nb::tuple part = nb::cast<nb::tuple>(one);
    if (part.size() != 3) refuse("a part is (most, weight, summed)");
    // Not converted: what is pointed at must be the arrays themselves.
    const auto most = nb::cast<Array<double>>(part[0], false), weight = nb::cast<Array<double>>(part[1], false);
    const auto summed = nb::cast<Array<double>>(part[2], false);
    if (static_cast<int64_t>(most.size()) != pairs || static_cast<int64_t>(weight.size()) != pairs ||
        static_cast<int64_t>(summed.size()) != pairs * dim)
        refuse("a part is (most, weight, summed) of [rows, heads] and [rows, heads, dim]");
    return {most.data(), weight.data(), summed.data()};
}

inline KvLayout layout_of(const std::string& format, int64_t layers, int64_t heads, int64_t dim,
                          int64_t block_tokens) {
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

}  // namespace plait
