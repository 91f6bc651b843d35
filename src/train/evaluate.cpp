#include "cleave/train/evaluate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cleave/train/data.h"
#include "cleave/train/losses.h"

namespace cleave::train {
namespace {

/// Logits of all positions but the last, as rows: [B * (T - 1), V].
at::Tensor predicting_rows(const at::Tensor& logits) {
  const std::int64_t positions = logits.size(1) - 1;
  return logits.narrow(1, 0, positions).reshape({-1, logits.size(2)});
}

}  // namespace

HeldOutQuality evaluate(TransformerImpl& model, const TokenWindows& text, std::int64_t max_tokens,
                        std::int64_t batch, TransformerImpl* reference) {
  const at::NoGradGuard no_grad;
  std::int64_t windows = text.count();
  if (max_tokens > 0)
    windows = std::min(windows, std::max<std::int64_t>(1, max_tokens / text.context));
  const at::Device device = model.layers().front().input_norm.device();
  HeldOutQuality quality;
  quality.has_kl = reference != nullptr;
  double nll_sum = 0.0;
  double kl_sum = 0.0;
  for (std::int64_t begin = 0; begin < windows; begin += batch) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(std::min(batch, windows - begin)));
    std::iota(ids.begin(), ids.end(), begin);
    const at::Tensor tokens = batch_tokens(text, ids).to(device);
    const at::Tensor rows = predicting_rows(model.forward(tokens));
    const at::Tensor targets = tokens.narrow(1, 1, tokens.size(1) - 1).reshape({-1});
    const auto count = static_cast<double>(targets.numel());
    nll_sum += language_model_loss(rows, targets).item<double>() * count;
    if (reference != nullptr)
      kl_sum += logit_kl(rows, predicting_rows(reference->forward(tokens))).item<double>() * count;
    quality.predicted_tokens += targets.numel();
  }
  quality.mean_nll = nll_sum / static_cast<double>(quality.predicted_tokens);
  quality.perplexity = std::exp(quality.mean_nll);
  quality.kl = kl_sum / static_cast<double>(quality.predicted_tokens);
  return quality;
}

}  // namespace cleave::train
