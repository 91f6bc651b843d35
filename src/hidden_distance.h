#pragma once

#include "cleave/views.h"

// How far hidden states are from a reference's, where they are what a model gives.
namespace cleave {

/// 1 - cos(a, b), in [0, 2]. Zeros: 0 from zeros, 1 from anything else. NaN where a value is.
///   a, b [n]
double cosine_distance(const float* a, const float* b, std::int64_t n);

/// Sum over the tokens. reference, states [T, D]
double summed_distance(MatrixView<const float> reference, MatrixView<const float> states);

/// Of the means over the tokens: of what a sentence encoder gives for the window. (It also scales
/// them to length 1, which no angle sees.)
double pooled_distance(MatrixView<const float> reference, MatrixView<const float> states);

}  // namespace cleave
