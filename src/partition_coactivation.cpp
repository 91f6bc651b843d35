// Balanced clustering of the co-activation graph, with A_ij / sqrt(A_ii A_jj) for edges: the
// cosines between the neurons' 0/1 columns over tokens, hence a positive semidefinite matrix.

#include <algorithm>
#include <cmath>
#include <random>

#include "assignment.h"
#include "cleave/partition.h"
#include "fail.h"
#include "graph_clusters.h"
#include "partition_routed.h"
#include "support/random.h"

namespace cleave {
namespace {

/// [routed, routed] cosines; rows of neurons that never fire are 0.
std::vector<float> cosines_of(MatrixView<const float> a, const RoutedNeurons& routed) {
  const std::int64_t n = routed.count();
  std::vector<float> scale;
  bool any = false;
  for (const std::int32_t j : routed.ids) {
    const float own = a(j, j);
    scale.push_back(own > 0.0f ? 1.0f / std::sqrt(own) : 0.0f);
    any |= own > 0.0f;
  }
  if (!any)
    fail_argument(
        "partition_coactivation: the diagonal says that none of {} routed neurons ever fires", n);
  std::vector<float> cosine(static_cast<std::size_t>(n * n));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < n; ++j)
      cosine[i * n + j] = a(routed.ids[i], routed.ids[j]) * scale[i] * scale[j];
  return cosine;
}

/// What is nearest to E neurons, which are drawn apart from each other (k-means++).
std::vector<std::int32_t> first_experts(const std::vector<float>& cosine,
                                        const RoutedNeurons& routed, std::mt19937_64& rng) {
  const std::int64_t n = routed.count(), E = routed.num_experts;
  std::vector<double> distance(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) distance[i] = cosine[i * n + i] > 0.0f ? 1.0 : 0.0;
  std::vector<float> benefit(static_cast<std::size_t>(n * E));
  for (std::int64_t e = 0; e < E; ++e) {
    double total = 0.0;
    for (const double d : distance) total += d;
    std::int64_t chosen = 0;
    if (total <= 0.0) {
      chosen = static_cast<std::int64_t>(bounded_draw(rng, static_cast<std::uint64_t>(n)));
    } else {
      double rest = unit_draw(rng) * total;
      while (chosen + 1 < n && (distance[chosen] <= 0.0 || rest >= distance[chosen]))
        rest -= distance[chosen++];
    }
    const float* to_chosen = cosine.data() + chosen * n;
    for (std::int64_t i = 0; i < n; ++i) {
      benefit[i * E + e] = to_chosen[i];
      distance[i] = std::min(distance[i], std::max(0.0, 1.0 - double{to_chosen[i]}));
    }
    distance[chosen] = 0.0;
  }
  return assign_balanced({benefit.data(), n, E}, routed.capacities());
}

}  // namespace

NeuronPartition partition_coactivation(MatrixView<const float> coactivation,
                                       const RoutedSpec& spec) {
  if (coactivation.rows != coactivation.cols)
    fail_argument("partition_coactivation: the matrix is [{}, {}]; expected [H, H]",
                  coactivation.rows, coactivation.cols);
  const RoutedNeurons routed(coactivation.rows, spec);
  for (std::int64_t i = 0; i < coactivation.rows; ++i)
    for (std::int64_t j = 0; j < coactivation.cols; ++j)
      if (!(coactivation(i, j) >= 0.0f) || !std::isfinite(coactivation(i, j)))
        fail_argument(
            "partition_coactivation: neurons {} and {} fire together {} times; must be finite and "
            "not negative",
            i, j, coactivation(i, j));
  std::vector<float> cosine = cosines_of(coactivation, routed);
  std::mt19937_64 rng(spec.seed);
  auto start = first_experts(cosine, routed, rng);
  return routed.partition(
      improve_clusters(std::move(cosine), spec.num_experts, std::move(start), spec.iterations));
}

}  // namespace cleave
