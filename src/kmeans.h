#pragma once

#include <cstdint>
#include <vector>

#include "cleave/views.h"

namespace cleave {

struct KMeansSpec {
  std::int32_t clusters = 8;     ///< must divide the number of rows
  std::int32_t iterations = 25;  ///< rounds; stops earlier when nothing moves
  std::uint64_t seed = 0;
};

struct KMeansResult {
  std::vector<std::int32_t> cluster_of_row;  ///< exactly rows / clusters of each
  double start_objective = 0.0;              ///< of the greedy start, before any improvement
  double objective = 0.0;  ///< sum over rows of <row, centroid of its cluster>; larger is tighter
  std::int32_t rounds = 0;
};

/// Balanced k-means on L2-normalised rows: every cluster gets exactly rows / clusters of them. Zero
/// and duplicate rows are allowed. The same seed gives the same result on every machine.
KMeansResult balanced_kmeans(MatrixView<const float> rows, const KMeansSpec& spec);

}  // namespace cleave
