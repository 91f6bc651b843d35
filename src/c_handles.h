#pragma once

#include <vector>

#include "cleave/c_api.h"
#include "cleave/packed.h"

/// Never changes once it is made, so any number of threads may run on it.
struct cleave_experts {
  cleave::PackedExperts packed;
  std::vector<float> w2_bias;      // [E, D], or empty
  std::vector<float> output_bias;  // [D], or empty
};
