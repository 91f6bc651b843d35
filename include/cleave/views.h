#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

namespace cleave {

// The matrix convention of the whole library, stated once: row-major, columns contiguous, rows
// `row_stride` elements apart. Shapes use one alphabet, always in this order:
//   T tokens   D model width   H hidden neurons of the dense FFN   E experts   S shared experts
//   K routed experts per token   I = H / E width of one expert   V vocabulary   L layers
// A linear layer's weight is [out, in], as checkpoints store it; y = x W^T.

/// A matrix that somebody else owns. Copying the view copies no element.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  ///< elements, not bytes

  MatrixView() = default;
  MatrixView(T* data_in, std::int64_t rows_in, std::int64_t cols_in)
      : MatrixView(data_in, rows_in, cols_in, cols_in) {}
  MatrixView(T* data_in, std::int64_t rows_in, std::int64_t cols_in, std::int64_t row_stride_in)
      : data(data_in), rows(rows_in), cols(cols_in), row_stride(row_stride_in) {}
  /// A mutable view is also a constant one.
  template <typename U>
  requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
      MatrixView(const MatrixView<U>& other)  // NOLINT(google-explicit-constructor)
      : MatrixView(other.data, other.rows, other.cols, other.row_stride) {}

  T* row(std::int64_t r) const { return data + r * row_stride; }
  T& operator()(std::int64_t r, std::int64_t c) const { return data[r * row_stride + c]; }
  bool empty() const { return data == nullptr || rows == 0 || cols == 0; }
  /// Rows [begin, begin + count).
  MatrixView slice_rows(std::int64_t begin, std::int64_t count) const {
    return {data + begin * row_stride, count, cols, row_stride};
  }
};

/// Element types of stored tensors. The quantised ones are GGUF blocks of 32 values.
enum class DType {
  kF32,
  kF16,
  kBF16,
  kF64,
  kI8,
  kU8,
  kI16,
  kI32,
  kI64,
  kBool,
  kQ8_0,
  kQ4_0,
  kQ4_1
};

/// "F32", "BF16", "Q4_1": the spelling of safetensors and GGUF.
const char* dtype_name(DType dtype);

/// Bytes that `num_elements` of this type occupy; quantised types need a multiple of 32.
std::int64_t dtype_bytes(DType dtype, std::int64_t num_elements);

/// Elementwise non-linearity between an FFN's two products.
enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity };

/// The name Transformers uses in `hidden_act`: "silu", "gelu", "gelu_pytorch_tanh", "relu",
/// "relu2", "linear".
const char* activation_name(Activation activation);

/// One value through the activation, in double. The definition that kernels are tested against.
double activate(Activation activation, double x);

}  // namespace cleave
