#pragma once

#include <ATen/core/Tensor.h>

#include "cleave/views.h"

namespace cleave::train {

/// Elementwise activation of a tensor; same functions as cleave::activate.
at::Tensor activate(Activation activation, const at::Tensor& x);

/// grad times the activation's derivative at x.
at::Tensor activate_backward(Activation activation, const at::Tensor& grad, const at::Tensor& x);

}  // namespace cleave::train
