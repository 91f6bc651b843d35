#pragma once

#include "cleave/kernels.h"
#include "cleave/routing.h"

namespace cleave {

/// Divides the router by the standard deviation of its logits over a token's experts, on some of
/// the tokens of x. Choices stay; a hard gate's export and training both want logits of that size.
void normalise_logits(MatrixView<const float> x, LinearRouter& router, const ParallelFor& parallel);

}  // namespace cleave
