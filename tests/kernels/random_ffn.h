#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cleave/kernels.h"
#include "cleave/packed.h"
#include "kernels/dispatch.h"
#include "quants.h"

// Random matrices, banks and routings for kernel tests. Same seed, same values.
namespace cleave::testing {

inline constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

struct OwnedMatrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<float> values;
  MatrixView<float> view() { return {values.data(), rows, cols}; }
  MatrixView<const float> view() const { return {values.data(), rows, cols}; }
};

inline std::int64_t pick(std::mt19937& rng, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(rng() % static_cast<unsigned>(high - low + 1));
}

inline std::vector<float> draw_values(std::mt19937& rng, std::int64_t n) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(n);
  for (float& value : values) value = uniform(rng);
  return values;
}

inline OwnedMatrix random_matrix(std::mt19937& rng, std::int64_t rows, std::int64_t cols) {
  return {rows, cols, draw_values(rng, rows * cols)};
}

/// Numbers that bfloat16 holds: what AVX512-BF16 kernels make of x where rows are many.
inline OwnedMatrix random_bf16_matrix(std::mt19937& rng, std::int64_t rows, std::int64_t cols) {
  OwnedMatrix m = random_matrix(rng, rows, cols);
  for (float& v : m.values) v = bf16_to_float(float_to_bf16(v));
  return m;
}

/// What such kernels lose of a hidden value: it is rounded to 8 bits, and has a rough sigmoid
/// before.
inline constexpr double kRoundedHidden = 0x1p-8 + 7e-5;
/// The same, as a multiple of the sum of |terms|.
inline double hidden_bound(WeightType type) {
  return type == WeightType::kBF16 && panel_kernels().dots != nullptr ? kRoundedHidden : 0.0;
}

/// Experts of uneven widths; H >= E rows in all.
inline ExpertBank random_bank(std::mt19937& rng, std::int64_t D, std::int64_t H, std::int64_t E,
                              bool gated, bool biases, Activation activation) {
  ExpertBank bank;
  bank.d_model = D;
  bank.dense_hidden = H;
  bank.activation = activation;
  std::vector<std::int64_t> cuts(H - 1);
  std::iota(cuts.begin(), cuts.end(), 1);
  std::shuffle(cuts.begin(), cuts.end(), rng);
  bank.begin.assign(cuts.begin(), cuts.begin() + (E - 1));
  bank.begin.push_back(0);
  bank.begin.push_back(H);
  std::sort(bank.begin.begin(), bank.begin.end());
  bank.neuron_order.resize(H);
  std::iota(bank.neuron_order.begin(), bank.neuron_order.end(), 0);
  if (gated) bank.gate = draw_values(rng, H * D);
  bank.up = draw_values(rng, H * D);
  bank.down_t = draw_values(rng, H * D);
  if (biases && gated) bank.gate_bias = draw_values(rng, H);
  if (biases) bank.up_bias = draw_values(rng, H);
  return bank;
}

inline Routing random_routing(std::mt19937& rng, std::int64_t T, std::int64_t E, std::int64_t K) {
  Routing routing;
  route(random_matrix(rng, T, E).view(), K, GateMode::kSoftmax, routing);
  return routing;
}

/// Takes about a third of the slots out of use, anywhere and whole tokens too.
inline void drop_slots(std::mt19937& rng, Routing& routing) {
  for (std::size_t i = 0; i < routing.ids.size(); ++i) {
    if (rng() % 3 != 0) continue;
    routing.ids[i] = Routing::kUnused;
    routing.weights[i] = 0.0f;
  }
}

/// What a dot product over D, twice, a product of the two and a sum over H may be off by, as a
/// multiple of the sum of |terms|: n terms lose at most n * eps; 1.1 bounds the slope of SiLU and
/// GELU, 16 covers the single products between and the few ulp of a vector exp or tanh.
inline double ffn_bound(std::int64_t D, std::int64_t H) {
  return 1.15 * static_cast<double>(2 * D + H + 16) * kEpsilon;
}

/// What a sum of n products may be off by, as a multiple of the sum of |terms|.
inline double sum_bound(std::int64_t n) { return static_cast<double>(n) * kEpsilon; }

inline constexpr Activation kActivations[] = {Activation::kSilu,     Activation::kGelu,
                                              Activation::kGeluTanh, Activation::kRelu,
                                              Activation::kRelu2,    Activation::kIdentity};

inline void expect_near(const OwnedMatrix& actual, const OwnedMatrix& expected,
                        const OwnedMatrix& magnitude, double bound) {
  for (std::size_t i = 0; i < expected.values.size(); ++i)
    ASSERT_NEAR(actual.values[i], expected.values[i], bound * magnitude.values[i])
        << "token " << i / expected.cols << " column " << i % expected.cols;
}

inline DenseFfn random_dense(std::mt19937& rng, std::int64_t D, std::int64_t H, bool gated,
                             bool biases, Activation activation) {
  DenseFfn ffn;
  ffn.hidden = H;
  ffn.d_model = D;
  ffn.activation = activation;
  if (gated) ffn.gate = draw_values(rng, H * D);
  ffn.up = draw_values(rng, H * D);
  ffn.down = draw_values(rng, H * D);
  if (biases && gated) ffn.gate_bias = draw_values(rng, H);
  if (biases) ffn.up_bias = draw_values(rng, H), ffn.down_bias = draw_values(rng, D);
  return ffn;
}

}  // namespace cleave::testing
