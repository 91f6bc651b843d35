#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cleave/model_config.h"

namespace cleave::train {

/// cos and sin of every (position, dimension) angle, the two halves of a head alike.
struct RotaryTable {
  at::Tensor cos, sin;  ///< [T, head_dim]
};

/// Angles for positions 0 .. tokens - 1, formed in float32 and rounded to `dtype`.
RotaryTable rotary_table(const RopeConfig& rope, std::int64_t head_dim, std::int64_t tokens,
                         at::ScalarType dtype, at::Device device);

/// Rotates x [B, heads, T, head_dim]; half-split order (dimension i pairs with i + head_dim / 2).
at::Tensor rotate(const at::Tensor& x, const RotaryTable& table);

}  // namespace cleave::train
