#include "train/residual_stream.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "cleave/train/data.h"
#include "train/attention.h"

namespace cleave::train {

ResidualStream::ResidualStream(Transformer model, const TokenWindows& text, std::int64_t batch)
    : model_(std::move(model)), windows_(text.count()), context_(text.context), batch_(batch) {
  const at::NoGradGuard no_grad;
  std::vector<std::int64_t> ids(static_cast<std::size_t>(windows_));
  std::iota(ids.begin(), ids.end(), std::int64_t{0});
  const at::Tensor& table = model_->embedding();
  rows_ = at::embedding(table, batch_tokens(text, ids).flatten().to(table.device()));
}

void ResidualStream::attend(std::int64_t layer) {
  const at::NoGradGuard no_grad;
  const ModelConfig& config = model_->config();
  const DecoderLayer& weights = model_->layers()[static_cast<std::size_t>(layer)];
  for (std::int64_t first = 0; first < windows_; first += batch_) {
    const std::int64_t count = std::min(batch_, windows_ - first);
    at::Tensor part = rows_.narrow(0, first * context_, count * context_);
    part.add_(attention(config, weights, rms_norm(part, weights.input_norm, config.rms_norm_eps),
                        attention_context(config, count, context_, rows_.options())));
  }
}

at::Tensor ResidualStream::ffn_input(std::int64_t layer, std::int64_t first,
                                     std::int64_t count) const {
  const at::NoGradGuard no_grad;
  const DecoderLayer& weights = Transformer(model_)->layers()[static_cast<std::size_t>(layer)];
  return rms_norm(rows_.narrow(0, first, count), weights.post_attention_norm,
                  model_->config().rms_norm_eps);
}

}  // namespace cleave::train
