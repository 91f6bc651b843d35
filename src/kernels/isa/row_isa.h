#pragma once

#include <cstdint>

// Operations on one row of numbers, compiled once per instruction set. Plain structs only, as in
// linear_isa.h.
namespace cleave {

/// What a softmax over keys that come block by block has seen so far (arXiv:1805.02867).
struct SoftmaxState {
  float largest;  ///< of all scores; -infinity before the first
  float sum;      ///< of exp(score - largest)
};

struct RowKernels {
  /// scores[i] = exp(scores[i] - largest) for i < n, where `largest` counts these scores too; the
  /// state follows. Elements from n up to the next multiple of 16 are overwritten with zeros. A
  /// score of -infinity becomes 0.
  /// Returns exp(largest before - largest now): what earlier weighted sums have to be multiplied
  /// by.
  float (*softmax_block)(float* scores, std::int64_t n, SoftmaxState* state);
  /// y += a * x.
  void (*add_scaled)(float a, const float* x, float* y, std::int64_t n);
  /// y += x, for rows of n floats that are so far apart; x_stride 0 adds one row to all.
  void (*add_rows)(const float* x, std::int64_t x_stride, float* y, std::int64_t y_stride,
                   std::int64_t rows, std::int64_t n);
  /// Position of the largest, the lowest of equals; -1 if one is NaN or +infinity, or n is 0.
  std::int64_t (*largest)(const float* row, std::int64_t n);
  /// rank[i] = how many of the row's numbers are larger than row[i]; n at most kMostRanked. Finite
  /// numbers only. Returns whether they are all different.
  bool (*rank)(const float* row, std::int64_t n, std::int32_t* rank);
};
inline constexpr std::int64_t kMostRanked = 128;

namespace scalar {
const RowKernels& row_kernels();
}
namespace avx2 {
const RowKernels& row_kernels();
}
namespace avx512 {
const RowKernels& row_kernels();
}
namespace neon {
const RowKernels& row_kernels();
}

}  // namespace cleave
