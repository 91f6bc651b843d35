#include "train/tensor_activation.h"

#include <ATen/ATen.h>

#include "train/require.h"

namespace cleave::train {

at::Tensor activate(Activation activation, const at::Tensor& x) {
  switch (activation) {
    case Activation::kSilu:
      return at::silu(x);
    case Activation::kGelu:
      return at::gelu(x, "none");
    case Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case Activation::kRelu:
      return at::relu(x);
    case Activation::kRelu2:
      return at::relu(x).square();
    case Activation::kIdentity:
      return x;
  }
  throw InvalidArgument("activate: unknown activation");
}

at::Tensor activate_backward(Activation activation, const at::Tensor& grad, const at::Tensor& x) {
  switch (activation) {
    case Activation::kSilu:
      return at::silu_backward(grad, x);
    case Activation::kGelu:
      return at::gelu_backward(grad, x, "none");
    case Activation::kGeluTanh:
      return at::gelu_backward(grad, x, "tanh");
    case Activation::kRelu:
      return at::threshold_backward(grad, x, 0.0);
    case Activation::kRelu2:
      return grad * 2.0 * at::relu(x);
    case Activation::kIdentity:
      return grad;
  }
  throw InvalidArgument("activate_backward: unknown activation");
}

}  // namespace cleave::train
