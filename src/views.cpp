#include "cleave/views.h"

#include <cmath>
#include <numbers>

#include "fail.h"

namespace cleave {
namespace {

/// Bytes of one block and how many values it holds; a plain type is a block of one.
struct BlockLayout {
  const char* name;
  std::int64_t bytes;
  std::int64_t values;
};

BlockLayout layout_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {"F32", 4, 1};
    case DType::kF16:
      return {"F16", 2, 1};
    case DType::kBF16:
      return {"BF16", 2, 1};
    case DType::kF64:
      return {"F64", 8, 1};
    case DType::kI8:
      return {"I8", 1, 1};
    case DType::kU8:
      return {"U8", 1, 1};
    case DType::kI16:
      return {"I16", 2, 1};
    case DType::kI32:
      return {"I32", 4, 1};
    case DType::kI64:
      return {"I64", 8, 1};
    case DType::kBool:
      return {"BOOL", 1, 1};
    case DType::kQ8_0:
      return {"Q8_0", 2 + 32, 32};  // half scale, 32 signed bytes
    case DType::kQ4_0:
      return {"Q4_0", 2 + 16, 32};  // half scale, 32 nibbles
    case DType::kQ4_1:
      return {"Q4_1", 2 + 2 + 16, 32};  // half scale, half minimum, 32 nibbles
  }
  fail_argument("dtype_name: {} is no element type", static_cast<int>(dtype));
}

}  // namespace

const char* dtype_name(DType dtype) { return layout_of(dtype).name; }

std::int64_t dtype_bytes(DType dtype, std::int64_t num_elements) {
  const BlockLayout layout = layout_of(dtype);
  if (num_elements < 0 || num_elements % layout.values != 0)
    fail_argument("dtype_bytes: {} elements of {}; expected a multiple of {}", num_elements,
                  layout.name, layout.values);
  return num_elements / layout.values * layout.bytes;
}

const char* activation_name(Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return "silu";
    case Activation::kGelu:
      return "gelu";
    case Activation::kGeluTanh:
      return "gelu_pytorch_tanh";
    case Activation::kRelu:
      return "relu";
    case Activation::kRelu2:
      return "relu2";
    case Activation::kIdentity:
      return "linear";
  }
  fail_argument("activation_name: {} is no activation", static_cast<int>(activation));
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGelu:  // erfc keeps the digits of the left tail that 1 + erf loses
      return 0.5 * x * std::erfc(-x * std::numbers::sqrt2 / 2.0);
    case Activation::kGeluTanh: {  // Hendrycks and Gimpel, arXiv:1606.08415
      const double root = std::sqrt(2.0 * std::numbers::inv_pi);
      return 0.5 * x * (1.0 + std::tanh(root * (x + 0.044715 * x * x * x)));
    }
    case Activation::kRelu:
      return x > 0.0 ? x : 0.0;
    case Activation::kRelu2:
      return x > 0.0 ? x * x : 0.0;
    case Activation::kIdentity:
      return x;
  }
  fail_argument("activate: {} is no activation", static_cast<int>(activation));
}

}  // namespace cleave
