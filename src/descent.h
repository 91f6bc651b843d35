#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "cleave/kernels.h"

// What routers that are trained step by step have in common.
namespace cleave {

/// Adam (arXiv:1412.6980) for one block of parameters.
class Adam {
 public:
  explicit Adam(std::size_t size) : mean_(size, 0.0f), square_(size, 0.0f) {}
  /// gradient, parameters: as many as `size`.
  void step(std::span<const float> gradient, double rate, std::span<float> parameters);

 private:
  std::int64_t steps_ = 0;
  std::vector<float> mean_, square_;
};

/// `rate` falling linearly to 0 over all steps.
inline double falling_rate(double rate, std::int64_t step, std::int64_t steps) {
  return rate * (1.0 - static_cast<double>(step) / static_cast<double>(steps));
}

/// Tokens of a step, drawn with replacement.
class TokenBatch {
 public:
  TokenBatch(std::int64_t size, std::int64_t columns);
  void draw(MatrixView<const float> x, std::mt19937_64& rng);
  std::int64_t token(std::int64_t i) const { return tokens_[i]; }
  /// [size, columns], the rows of `x`.
  MatrixView<const float> rows() const { return {rows_.data(), size_, columns_}; }

 private:
  std::int64_t size_, columns_;
  std::vector<std::int64_t> tokens_;  // [size]
  std::vector<float> rows_;           // [size, columns]
};

/// Of a linear layer's weight [out, in], from a batch: slope^T input, written.
///   slope [B, out] of the loss by the layer's result   input [B, in]   gradient [out * in]
void weight_gradient(MatrixView<const float> slope, MatrixView<const float> input,
                     std::span<float> gradient, const ParallelFor& parallel);

}  // namespace cleave
