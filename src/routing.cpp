#include "cleave/routing.h"

namespace cleave {

const char* gate_mode_name(GateMode mode) {
  switch (mode) {
    case GateMode::kSoftmax:
      return "softmax";
    case GateMode::kHard:
      return "hard";
  }
  return "unknown";
}

}  // namespace cleave
