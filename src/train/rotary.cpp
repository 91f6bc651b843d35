#include "train/rotary.h"

#include <ATen/ATen.h>

#include <cmath>
#include <numbers>
#include <vector>

namespace cleave::train {
namespace {

/// Llama 3.1's stretching: long wavelengths are divided by `factor`, short ones kept, those between
/// blended by how often they fit into the original context.
double llama3_frequency(const RopeConfig& rope, double frequency) {
  const double turns = static_cast<double>(rope.original_max_position_embeddings) * frequency /
                       (2.0 * std::numbers::pi);
  if (turns < rope.low_freq_factor) return frequency / rope.factor;
  if (turns > rope.high_freq_factor) return frequency;
  const double smooth =
      (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

double frequency_of(const RopeConfig& rope, std::int64_t i, std::int64_t head_dim) {
  const double frequency =
      std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
  switch (rope.type) {
    case RopeConfig::Type::kDefault:
      return frequency;
    case RopeConfig::Type::kLinear:
      return frequency / rope.factor;
    case RopeConfig::Type::kLlama3:
      return llama3_frequency(rope, frequency);
  }
  return frequency;
}

}  // namespace

RotaryTable rotary_table(const RopeConfig& rope, std::int64_t head_dim, std::int64_t tokens,
                         at::ScalarType dtype, at::Device device) {
  std::vector<float> frequencies;
  for (std::int64_t i = 0; i < head_dim / 2; ++i) {
    frequencies.push_back(static_cast<float>(frequency_of(rope, i, head_dim)));
  }
  // float32 products, as the reference implementation forms them: at position 10^4 a double would
  // be off from it by more than the tolerance of the logits.
  const at::Tensor half = at::outer(at::arange(tokens, at::kFloat),
                                    at::from_blob(frequencies.data(), {head_dim / 2}, at::kFloat));
  const at::Tensor angles = at::cat({half, half}, 1);
  return {angles.cos().to(device, dtype), angles.sin().to(device, dtype)};
}

at::Tensor rotate(const at::Tensor& x, const RotaryTable& table) {
  const std::int64_t half = x.size(-1) / 2;
  const at::Tensor turned = at::cat({-x.narrow(-1, half, half), x.narrow(-1, 0, half)}, -1);
  return x * table.cos + turned * table.sin;
}

}  // namespace cleave::train
