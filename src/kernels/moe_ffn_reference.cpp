#include <cmath>
#include <vector>

#include "cleave/kernels.h"
#include "kernels/check_routing.h"

namespace cleave {
namespace {

struct Dot {
  double value;
  double magnitude;  // sum of |terms|
};

Dot dot(const float* a, const float* b, std::int64_t n, double bias) {
  Dot result{bias, std::abs(bias)};
  for (std::int64_t i = 0; i < n; ++i) {
    const double term = static_cast<double>(a[i]) * b[i];
    result.value += term;
    result.magnitude += std::abs(term);
  }
  return result;
}

double at(std::span<const float> bias, std::int64_t j) { return bias.empty() ? 0.0 : bias[j]; }

// One hidden neuron. Every activation has |act(a)| <= |a| but ReLU^2, whose error grows with its
// slope 2a; (1 + magnitude) bounds that as well.
Dot hidden_neuron(MatrixView<const float> gate, MatrixView<const float> up,
                  std::span<const float> gate_bias, std::span<const float> up_bias,
                  Activation activation, const float* x, std::int64_t j) {
  const Dot u = dot(up.row(j), x, up.cols, at(up_bias, j));
  const bool gated = !gate.empty();
  const Dot g = gated ? dot(gate.row(j), x, up.cols, at(gate_bias, j)) : u;
  const double slope = activation == Activation::kRelu2 ? 1.0 + g.magnitude : 1.0;
  const double value = activate(activation, g.value) * (gated ? u.value : 1.0);
  return {value, slope * g.magnitude * (gated ? u.magnitude : 1.0)};
}

}  // namespace

void moe_ffn_reference(const ExpertBank& bank, const Routing& routing, float scale,
                       MatrixView<const float> x, MatrixView<float> y,
                       MatrixView<float> magnitude) {
  check_routing("moe_ffn_reference", routing, bank.num_experts());
  std::vector<double> sum(y.cols), bound(y.cols);
  for (std::int64_t t = 0; t < routing.num_tokens; ++t) {
    for (std::int64_t c = 0; c < y.cols; ++c) bound[c] = std::abs(sum[c] = y(t, c));
    for (std::int64_t k = 0; k < routing.experts_per_token; ++k) {
      const std::int64_t pair = t * routing.experts_per_token + k;
      if (routing.ids[pair] == Routing::kUnused) continue;
      const ExpertView e = bank.expert(routing.ids[pair]);
      const double weight = static_cast<double>(scale) * e.scale * routing.weights[pair];
      for (std::int64_t j = 0; j < e.up.rows; ++j) {
        const Dot h =
            hidden_neuron(e.gate, e.up, e.gate_bias, e.up_bias, e.activation, x.row(t), j);
        for (std::int64_t c = 0; c < y.cols; ++c) {
          sum[c] += weight * h.value * e.down_t(j, c);
          bound[c] += std::abs(weight * h.magnitude * e.down_t(j, c));
        }
      }
    }
    for (std::int64_t c = 0; c < y.cols; ++c) {
      y(t, c) = static_cast<float>(sum[c]);
      if (!magnitude.empty()) magnitude(t, c) = static_cast<float>(bound[c]);
    }
  }
}

void dense_ffn_reference(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> y,
                         MatrixView<float> magnitude) {
  std::vector<double> sum(y.cols), bound(y.cols);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t c = 0; c < y.cols; ++c) {
      sum[c] = y(t, c) + at(ffn.down_bias, c);
      bound[c] = std::abs(y(t, c)) + std::abs(at(ffn.down_bias, c));
    }
    for (std::int64_t j = 0; j < ffn.up.rows; ++j) {
      const Dot h =
          hidden_neuron(ffn.gate, ffn.up, ffn.gate_bias, ffn.up_bias, ffn.activation, x.row(t), j);
      for (std::int64_t c = 0; c < y.cols; ++c) {
        sum[c] += h.value * ffn.down(c, j);
        bound[c] += std::abs(h.magnitude * ffn.down(c, j));
      }
    }
    for (std::int64_t c = 0; c < y.cols; ++c) {
      y(t, c) = static_cast<float>(sum[c]);
      if (!magnitude.empty()) magnitude(t, c) = static_cast<float>(bound[c]);
    }
  }
}

}  // namespace cleave
