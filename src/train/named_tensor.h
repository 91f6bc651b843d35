#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cleave/export.h"

namespace cleave::train {

/// `tensor` times `factor`, to be written under `name`: copied to float32 on the CPU when its turn
/// comes, so that a model is never in memory twice.
inline NamedTensor named(std::string name, const at::Tensor& tensor, double factor = 1.0) {
  return {std::move(name), tensor.sizes().vec(), [tensor, factor] {
            const at::Tensor values =
                (tensor.detach().to(at::kCPU, at::kFloat) * factor).contiguous();
            const float* data = values.const_data_ptr<float>();
            return std::vector<float>(data, data + values.numel());
          }};
}

/// Two tensors side by side along `axis`, as one.
inline NamedTensor named_pair(std::string name, const at::Tensor& first, const at::Tensor& second,
                              std::int64_t axis) {
  std::vector<std::int64_t> shape = first.sizes().vec();
  shape[static_cast<std::size_t>(axis)] += second.size(axis);
  return {std::move(name), std::move(shape), [first, second, axis] {
            const at::Tensor both =
                at::cat({first.detach(), second.detach()}, axis).to(at::kCPU, at::kFloat);
            const float* data = both.const_data_ptr<float>();
            return std::vector<float>(data, data + both.numel());
          }};
}

}  // namespace cleave::train
