#pragma once

#include <cstdint>

#include "cleave/views.h"

// What is compiled once per instruction set. Plain structs and function pointers only: this header
// is seen by objects built with -mavx512f, and an inline function with a body here might become the
// copy that the linker keeps for everybody (docs/decisions/0003-eigen-per-instruction-set.md).
namespace cleave {

/// A row-major matrix, as MatrixView but without member functions.
struct ConstMatrix {
  const float* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t stride;  ///< elements between rows
};
struct MutableMatrix {
  float* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t stride;  ///< elements between rows
};

/// Whether a product replaces its result or is added to it.
enum class Store { kOverwrite, kAdd };

/// Two distributions over one vocabulary, compared. Logs are natural.
struct Comparison {
  double kl;  ///< KL(reference || model), in nats
  std::int64_t
      best_of_reference;  ///< position of the largest reference logit, the lowest of equals
  std::int64_t best_of_model;
};

/// The operations of one instruction set, single-threaded. Results must not overlap operands.
struct IsaKernels {
  /// y (+)= x w^T.  x [M, K]   w [N, K]   y [M, N]
  void (*product_nt)(ConstMatrix x, ConstMatrix w, MutableMatrix y, Store store);
  /// y (+)= x w.    x [M, K]   w [K, N]   y [M, N]
  void (*product_nn)(ConstMatrix x, ConstMatrix w, MutableMatrix y, Store store);
  /// h[i] = act(gate[i]) * up[i], or act(up[i]) where gate is nullptr. `h` may be `up` or `gate`.
  void (*activate)(Activation activation, const float* gate, const float* up, float* h,
                   std::int64_t n);
  /// row = softmax(row), in place; n >= 1.
  void (*softmax)(float* row, std::int64_t n);
  /// y = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, std::int64_t n);
  /// y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias; `y` may be `x`.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* y,
                     std::int64_t n);
  /// y += x.
  void (*add)(const float* x, float* y, std::int64_t n);
  /// x *= a.
  void (*scale)(float a, float* x, std::int64_t n);
  /// log(sum(exp(row))), in double.
  double (*log_sum_exp)(const float* row, std::int64_t n);
  Comparison (*compare)(const float* reference_logits, const float* model_logits, std::int64_t n);
};

namespace scalar {
const IsaKernels& kernels();
}
namespace avx2 {
const IsaKernels& kernels();
}
namespace avx512 {
const IsaKernels& kernels();
}
namespace neon {
const IsaKernels& kernels();
}

}  // namespace cleave
