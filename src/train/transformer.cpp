#include "cleave/train/transformer.h"

#include <ATen/ATen.h>

#include "train/attention.h"
#include "train/require.h"
#include "train/tensor_text.h"

namespace cleave::train {

at::Tensor TransformerImpl::forward(const at::Tensor& tokens) {
  require(tokens.defined() && tokens.dim() == 2 && tokens.scalar_type() == at::kLong,
          "Transformer: tokens is {}; expected int64 [B, T]", shape_text(tokens));
  const std::int64_t batch = tokens.size(0), length = tokens.size(1);
  if (tokens.numel() > 0) {
    const auto low = tokens.min().item<std::int64_t>(), high = tokens.max().item<std::int64_t>();
    require(low >= 0 && high < config_.vocab_size,
            "Transformer: token ids lie in [{}, {}]; expected [0, {}); is it this model's "
            "tokenizer?",
            low, high, config_.vocab_size);
  }
  const AttentionContext context =
      attention_context(config_, batch, length, embedding_.options().requires_grad(false));
  at::Tensor x = at::embedding(embedding_, tokens.reshape({-1}).to(embedding_.device()));
  for (DecoderLayer& layer : layers_) {
    x = x + attention(config_, layer, rms_norm(x, layer.input_norm, config_.rms_norm_eps), context);
    const at::Tensor input = rms_norm(x, layer.post_attention_norm, config_.rms_norm_eps);
    x = x + (layer.moe.is_empty() ? layer.dense->forward(input) : layer.moe->forward(input));
  }
  const at::Tensor logits = at::linear(rms_norm(x, final_norm_, config_.rms_norm_eps), head_);
  return logits.view({batch, length, config_.vocab_size});
}

std::vector<MoeFfn> TransformerImpl::moe_layers() const {
  std::vector<MoeFfn> found;
  for (const DecoderLayer& layer : layers_) {
    if (!layer.moe.is_empty()) found.push_back(layer.moe);
  }
  return found;
}

}  // namespace cleave::train
