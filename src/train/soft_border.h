#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace cleave::train {

/// Halfway between the K-th and the next largest value of every row: what K of them lie above.
///   values [T, E], K < E   returns [T, 1], no gradient
at::Tensor row_border(const at::Tensor& values, std::int64_t k);

/// sigmoid((z_e - border) / (temperature * spread)): how far inside the choice each expert is. The
/// spread is the root mean square over the tokens of the logits' standard deviation over the
/// experts, so that the temperature means the same for a router of any size. Border and spread are
/// constants to the gradient.
///   logits [T, E]   returns [T, E], with gradient; all 1, without one, for K = E
at::Tensor soft_choice(const at::Tensor& logits, std::int64_t k, double temperature);

}  // namespace cleave::train
