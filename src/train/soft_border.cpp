#include "train/soft_border.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <tuple>

namespace cleave::train {

at::Tensor row_border(const at::Tensor& values, std::int64_t k) {
  const at::NoGradGuard no_grad;
  const at::Tensor top = std::get<0>(values.detach().topk(k + 1, /*dim=*/1));  // falling
  return top.narrow(1, k - 1, 1).add(top.narrow(1, k, 1)).mul_(0.5);
}

at::Tensor soft_choice(const at::Tensor& logits, std::int64_t k, double temperature) {
  if (k >= logits.size(1)) return at::ones(logits.sizes(), logits.options().requires_grad(false));
  const at::Tensor border = row_border(logits, k);
  const at::Tensor spread =
      logits.detach().var(/*dim=*/1, /*unbiased=*/false).mean().sqrt().clamp_min(1e-12);
  return ((logits - border) / (spread * temperature)).sigmoid();
}

}  // namespace cleave::train
