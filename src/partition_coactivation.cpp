// Balanced clustering of the co-activation graph.
//
// With A_ij / sqrt(A_ii A_jj) for edges - the cosines between the neurons' 0/1 columns over tokens,
// hence a positive semidefinite matrix - the sum within experts is a convex function of the
// assignment. Its linearisation at an assignment, sum of each neuron's edges into each expert, is a
// lower bound that touches it there; so the exact assignment that maximises the linearisation never
// lowers the sum. Where that stops (each neuron's own 1 holds it back in small experts), swaps of
// two neurons go on.

#include <algorithm>
#include <cmath>
#include <random>

#include "assignment.h"
#include "cleave/partition.h"
#include "fail.h"
#include "partition_routed.h"
#include "support/random.h"

namespace cleave {
namespace {

constexpr float kLeastSwapGain = 1e-5f;  // of edges up to 1; below it is rounding

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

class GraphClusters {
 public:
  GraphClusters(std::vector<float> cosine, const RoutedNeurons& routed)
      : cosine_(std::move(cosine)), routed_(routed), n_(routed.count()), E_(routed.num_experts) {}

  /// First experts: what is nearest to E neurons, which are drawn apart from each other
  /// (k-means++).
  void start(std::mt19937_64& rng) {
    std::vector<double> distance(static_cast<std::size_t>(n_));
    for (std::int64_t i = 0; i < n_; ++i) distance[i] = edge(i, i) > 0.0f ? 1.0 : 0.0;
    into_.assign(static_cast<std::size_t>(n_ * E_), 0.0f);
    for (std::int64_t e = 0; e < E_; ++e) {
      double total = 0.0;
      for (const double d : distance) total += d;
      std::int64_t chosen = 0;
      if (total <= 0.0) {
        chosen = static_cast<std::int64_t>(bounded_draw(rng, static_cast<std::uint64_t>(n_)));
      } else {
        double rest = unit_draw(rng) * total;
        while (chosen + 1 < n_ && (distance[chosen] <= 0.0 || rest >= distance[chosen]))
          rest -= distance[chosen++];
      }
      for (std::int64_t i = 0; i < n_; ++i) {
        into_[i * E_ + e] = edge(i, chosen);
        distance[i] = std::min(distance[i], std::max(0.0, 1.0 - double{edge(i, chosen)}));
      }
      distance[chosen] = 0.0;
    }
    take(assign_balanced({into_.data(), n_, E_}, routed_.capacities()));
  }

  void improve(std::int32_t rounds) {
    double best = inside();
    for (std::int32_t round = 0; round < rounds; ++round) {
      const std::vector<std::int32_t> before = expert_of_;
      take(assign_balanced({into_.data(), n_, E_}, routed_.capacities()));
      if (inside() < best) take(before);  // by rounding only
      const bool swapped = swap_neurons();
      const double now = inside();
      if (!swapped && now <= best) break;
      best = now;
    }
  }

  const std::vector<std::int32_t>& expert_of() const { return expert_of_; }

 private:
  float edge(std::int64_t i, std::int64_t j) const { return cosine_[i * n_ + j]; }
  float into(std::int64_t i, std::int64_t e) const { return into_[i * E_ + e]; }

  void take(std::vector<std::int32_t> expert_of) {
    expert_of_ = std::move(expert_of);
    std::fill(into_.begin(), into_.end(), 0.0f);
    for (std::int64_t i = 0; i < n_; ++i)
      for (std::int64_t j = 0; j < n_; ++j) into_[i * E_ + expert_of_[j]] += edge(i, j);
  }

  double inside() const {
    double sum = 0.0;
    for (std::int64_t i = 0; i < n_; ++i) sum += into(i, expert_of_[i]);
    return sum;
  }

  /// One pass over all pairs; takes every swap that gains.
  bool swap_neurons() {
    bool any = false;
    for (std::int64_t i = 0; i < n_; ++i)
      for (std::int64_t j = i + 1; j < n_; ++j) {
        const std::int32_t a = expert_of_[i], b = expert_of_[j];
        if (a == b) continue;
        const float gain = into(i, b) - into(i, a) + into(j, a) - into(j, b) + edge(i, i) +
                           edge(j, j) - 2.0f * edge(i, j);
        if (gain <= kLeastSwapGain) continue;
        for (std::int64_t k = 0; k < n_; ++k) {
          const float moved = edge(k, i) - edge(k, j);
          into_[k * E_ + a] -= moved;
          into_[k * E_ + b] += moved;
        }
        std::swap(expert_of_[i], expert_of_[j]);
        any = true;
      }
    return any;
  }

  std::vector<float> cosine_;  // [n, n]
  const RoutedNeurons& routed_;
  std::int64_t n_, E_;
  std::vector<float> into_;  // [n, E], sum of a neuron's edges into an expert, its own 1 included
  std::vector<std::int32_t> expert_of_;
};

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
  GraphClusters clusters(cosines_of(coactivation, routed), routed);
  std::mt19937_64 rng(spec.seed);
  clusters.start(rng);
  clusters.improve(spec.iterations);
  return routed.partition(clusters.expert_of());
}

}  // namespace cleave
