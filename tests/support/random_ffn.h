#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cleave/expert.h"

// Random weights for tests of splitting and routing.
namespace cleave::testing {

inline std::vector<float> random_values(std::int64_t count, std::uint64_t seed,
                                        double std_dev = 1.0) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(std_dev));
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

struct RandomFfnSpec {
  std::int64_t hidden = 24;  ///< H
  std::int64_t d_model = 8;  ///< D
  bool gated = true;
  bool biases = false;
  Activation activation = Activation::kSilu;
  std::uint64_t seed = 0;
};

/// Weights of standard deviation 1/sqrt(fan in), as trained ones about have.
inline DenseFfn random_ffn(const RandomFfnSpec& s) {
  DenseFfn ffn;
  ffn.hidden = s.hidden;
  ffn.d_model = s.d_model;
  ffn.activation = s.activation;
  const double in = 1.0 / std::sqrt(static_cast<double>(s.d_model));
  const double out = 1.0 / std::sqrt(static_cast<double>(s.hidden));
  if (s.gated) ffn.gate = random_values(s.hidden * s.d_model, s.seed * 8 + 1, in);
  ffn.up = random_values(s.hidden * s.d_model, s.seed * 8 + 2, in);
  ffn.down = random_values(s.d_model * s.hidden, s.seed * 8 + 3, out);
  if (s.biases) {
    if (s.gated) ffn.gate_bias = random_values(s.hidden, s.seed * 8 + 4, 0.5);
    ffn.up_bias = random_values(s.hidden, s.seed * 8 + 5, 0.5);
    ffn.down_bias = random_values(s.d_model, s.seed * 8 + 6, 0.5);
  }
  return ffn;
}

/// The FFN's definition in double, without any of the library's kernels. x [D] -> y [D].
inline std::vector<double> ffn_in_double(const DenseFfn& ffn, const float* x) {
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  std::vector<double> y(static_cast<std::size_t>(D));
  for (std::int64_t d = 0; d < D && !ffn.down_bias.empty(); ++d) y[d] = ffn.down_bias[d];
  for (std::int64_t j = 0; j < H; ++j) {
    double up = ffn.up_bias.empty() ? 0.0 : ffn.up_bias[j];
    double gate = ffn.gate_bias.empty() ? 0.0 : ffn.gate_bias[j];
    for (std::int64_t d = 0; d < D; ++d) {
      up += static_cast<double>(ffn.up[j * D + d]) * x[d];
      if (!ffn.gate.empty()) gate += static_cast<double>(ffn.gate[j * D + d]) * x[d];
    }
    const double h =
        ffn.gate.empty() ? activate(ffn.activation, up) : activate(ffn.activation, gate) * up;
    for (std::int64_t d = 0; d < D; ++d) y[d] += h * ffn.down[d * H + j];
  }
  return y;
}

}  // namespace cleave::testing
