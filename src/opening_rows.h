#pragma once

#include "cleave/expert.h"

namespace cleave {

/// What decides whether a neuron fires: its gate, or `up` where there is none. [H, D]
inline MatrixView<const float> opening_rows(const FfnView& ffn) {
  return ffn.gate.empty() ? ffn.up : ffn.gate;
}

}  // namespace cleave
