#pragma once

#include <cstdint>
#include <vector>

#include "cleave/kernels.h"

namespace cleave {

struct ExactKMeansSpec {
  std::int32_t clusters = 8;  ///< must divide the number of rows
  std::int32_t iterations = 25;
  std::uint64_t seed = 0;
};

struct ExactKMeansResult {
  std::vector<std::int32_t> cluster_of_row;
  std::vector<double> spread;  ///< after each round: sum of |row - centroid of its cluster|^2
};

/// Balanced k-means on rows as they are (Euclidean): every cluster gets rows / clusters of them,
/// and each round's assignment is the best there is for its centroids (assign_balanced), so that no
/// round is worse than the one before. First centroids by k-means++. Rows must be finite and, for
/// squares to be, below 1e15 or so.
ExactKMeansResult exact_balanced_kmeans(MatrixView<const float> rows, const ExactKMeansSpec& spec,
                                        const ParallelFor& parallel);

}  // namespace cleave
