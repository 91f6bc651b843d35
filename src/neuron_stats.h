#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cleave/calibrate.h"
#include "symmetric_sum.h"

namespace cleave {

/// What NeuronStats knows of one layer. Sums, not means.
struct LayerStats {
  std::int64_t tokens = 0;                // with a weight above 0
  std::int64_t seen = 0;                  // all of them, to name a token in messages
  double weight = 0.0;                    // sum
  std::vector<double> sum, square, rate;  // [H]; empty: never observed
  std::vector<float> gate_means;          // [samples, H]
  SymmetricSum input_moment;              // D
  SymmetricSum gram, coactivation;        // H
};

struct NeuronStats::Impl {
  NeuronStatsSpec spec;
  std::vector<LayerStats> layers;

  LayerStats& layer(const char* function, std::int64_t l);
  const LayerStats& observed(const char* function, std::int64_t l) const;
  void allocate(LayerStats& layer) const;
};

/// Positions of the `count` largest |row[i]|, largest first; ties to the lower position.
void largest_magnitudes(const float* row, std::int64_t n, std::int64_t count, std::int32_t* ids);

}  // namespace cleave
