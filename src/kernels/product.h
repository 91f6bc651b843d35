#pragma once

#include <cstdint>
#include <span>

#include "cleave/kernels.h"

// Products that other kernels are made of; not public, because dense_ffn() and moe_ffn(), which
// have references, are what callers want.
namespace cleave {

/// Below so many multiply-adds a thread's share is not worth waking it (a few microseconds).
constexpr std::int64_t kGrainMacs = 32 * 1024;

/// y[t] += W x[t] + bias. Otherwise as linear().
void linear_add(MatrixView<const float> x, MatrixView<const float> weight,
                std::span<const float> bias, MatrixView<float> y, const ParallelFor& parallel);

}  // namespace cleave
