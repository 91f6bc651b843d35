#pragma once

#include "cleave/kernels.h"
#include "cleave/routing.h"

namespace cleave {

/// Scales the router so that its logits over a token's experts have a standard deviation of
/// `spread`, on some of the tokens of x. Choices stay; a hard gate's export and training both want
/// logits of size 1.
void normalise_logits(MatrixView<const float> x, LinearRouter& router, double spread,
                      const ParallelFor& parallel);

}  // namespace cleave
