#pragma once

#include <span>

#include "cleave/kernels.h"

// Products that other kernels are made of; not public, because dense_ffn() and moe_ffn(), which
// have references, are what callers want.
namespace cleave {

/// y[t] += W x[t] + bias. Otherwise as linear().
void linear_add(MatrixView<const float> x, MatrixView<const float> weight,
                std::span<const float> bias, MatrixView<float> y, const ParallelFor& parallel);

}  // namespace cleave
