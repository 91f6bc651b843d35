#include "train/attention.h"

#include <ATen/ATen.h>

namespace cleave::train {
namespace {

/// [B*T, heads * head_dim] -> [B, heads, T, head_dim].
at::Tensor split_heads(const at::Tensor& x, std::int64_t heads, const AttentionContext& context) {
  return x.view({context.batch, context.tokens, heads, -1}).transpose(1, 2);
}

/// Gives every query head its key or value head: [B, kv, T, d] -> [B, heads, T, d].
at::Tensor repeat_heads(const at::Tensor& x, std::int64_t heads) {
  const std::int64_t kv_heads = x.size(1);
  if (kv_heads == heads) return x;
  return x.unsqueeze(2)
      .expand({x.size(0), kv_heads, heads / kv_heads, x.size(2), x.size(3)})
      .reshape({x.size(0), heads, x.size(2), x.size(3)});
}

}  // namespace

AttentionContext attention_context(const ModelConfig& config, std::int64_t batch,
                                   std::int64_t tokens, const at::TensorOptions& options) {
  AttentionContext context;
  context.batch = batch;
  context.tokens = tokens;
  context.rotary = rotary_table(config.rope, config.head_dim, tokens,
                                c10::typeMetaToScalarType(options.dtype()), options.device());
  if (config.sliding_window > 0 && tokens > config.sliding_window) {
    // Query i sees keys i - window + 1 .. i.
    const at::Tensor all = at::ones({tokens, tokens}, options.dtype(at::kBool));
    context.mask = all.tril() & all.triu(1 - config.sliding_window);
  }
  return context;
}

at::Tensor attention(const ModelConfig& config, const DecoderLayer& layer, const at::Tensor& x,
                     const AttentionContext& context) {
  const at::Tensor q = rotate(
      split_heads(at::linear(x, layer.q, layer.q_bias), config.num_heads, context), context.rotary);
  const at::Tensor k =
      rotate(split_heads(at::linear(x, layer.k, layer.k_bias), config.num_kv_heads, context),
             context.rotary);
  const at::Tensor v =
      split_heads(at::linear(x, layer.v, layer.v_bias), config.num_kv_heads, context);
  const std::optional<at::Tensor> mask =
      context.mask.defined() ? std::make_optional(context.mask) : std::nullopt;
  const at::Tensor mixed = at::scaled_dot_product_attention(
      q, repeat_heads(k, config.num_heads), repeat_heads(v, config.num_heads), mask,
      /*dropout_p=*/0.0, /*is_causal=*/!mask.has_value());
  const at::Tensor joined =
      mixed.transpose(1, 2).reshape({context.batch * context.tokens, layer.o.size(1)});
  return at::linear(joined, layer.o, layer.o_bias);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  const at::Tensor scale = (wide.square().mean(-1, /*keepdim=*/true) + epsilon).rsqrt();
  return weight * (wide * scale).to(x.scalar_type());
}

}  // namespace cleave::train
