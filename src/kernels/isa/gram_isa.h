#pragma once

#include <cstdint>

#include "kernels/isa/linear_isa.h"

// What closed-form fits need of one instruction set: products over tokens and Cholesky. As
// linear_isa.h, this header holds no function with a body.
namespace cleave {

/// Single-threaded. Results must not overlap operands.
struct GramKernels {
  /// y += x^T w.   x [T, M]   w [T, N]   y [M, N]
  void (*product_tn)(ConstMatrix x, ConstMatrix w, MutableMatrix y);
  /// The lower triangle of a [n, n] becomes its Cholesky factor L; the rest is not read. False if
  /// the matrix is not positive definite.
  bool (*cholesky)(double* a, std::int64_t n);
  /// Every row of b [rows, n] becomes the solution of L L^T x = row.
  void (*cholesky_solve)(const double* factor, std::int64_t n, double* b, std::int64_t rows);
};

namespace scalar {
const GramKernels& gram_kernels();
}
namespace avx2 {
const GramKernels& gram_kernels();
}
namespace avx512 {
const GramKernels& gram_kernels();
}
namespace neon {
const GramKernels& gram_kernels();
}

}  // namespace cleave
