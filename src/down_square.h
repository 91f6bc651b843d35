#pragma once

#include <cstdint>
#include <vector>

namespace cleave {

/// |d_j|^2 of each neuron's output row: down_t [rows, d_model] to [rows].
inline std::vector<float> down_squares(const std::vector<float>& down_t, std::int64_t d_model) {
  std::vector<float> squares(down_t.size() / static_cast<std::size_t>(d_model), 0.0f);
  const float* row = down_t.data();
  for (float& square : squares) {
    for (std::int64_t d = 0; d < d_model; ++d) square += row[d] * row[d];
    row += d_model;
  }
  return squares;
}

}  // namespace cleave
