#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace cleave::train {

/// "[4, 8]", or "undefined": for messages.
inline std::string shape_text(const at::Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  std::string text = "[";
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

}  // namespace cleave::train
