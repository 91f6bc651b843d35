#pragma once

#include <ATen/ATen.h>

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

}  // namespace cleave::train
