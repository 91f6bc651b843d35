#include "graph_clusters.h"

#include <algorithm>

#include "assignment.h"

namespace cleave {
namespace {

constexpr double kLeastSwapGain = 1e-5;  // of a row's edge to itself; below it is rounding

class GraphClusters {
 public:
  GraphClusters(std::vector<float> edges, std::int32_t clusters, std::vector<std::int32_t> start)
      : edges_(std::move(edges)), n_(static_cast<std::int64_t>(start.size())), E_(clusters) {
    into_.resize(static_cast<std::size_t>(n_ * E_));
    double own = 0.0;
    for (std::int64_t i = 0; i < n_; ++i) own += edge(i, i);
    least_gain_ = static_cast<float>(kLeastSwapGain * own / static_cast<double>(n_));
    take(std::move(start));
  }

  std::vector<std::int32_t> improve(std::int32_t rounds) {
    const std::vector<std::int64_t> capacity(static_cast<std::size_t>(E_), n_ / E_);
    double best = inside();
    for (std::int32_t round = 0; round < rounds; ++round) {
      const std::vector<std::int32_t> before = cluster_of_;
      take(assign_balanced({into_.data(), n_, E_}, capacity));
      if (inside() < best) take(before);  // by rounding only
      const bool swapped = swap_rows();
      const double now = inside();
      if (!swapped && now <= best) break;
      best = now;
    }
    return std::move(cluster_of_);
  }

 private:
  float edge(std::int64_t i, std::int64_t j) const { return edges_[i * n_ + j]; }
  float into(std::int64_t i, std::int64_t e) const { return into_[i * E_ + e]; }

  void take(std::vector<std::int32_t> cluster_of) {
    cluster_of_ = std::move(cluster_of);
    std::fill(into_.begin(), into_.end(), 0.0f);
    for (std::int64_t i = 0; i < n_; ++i)
      for (std::int64_t j = 0; j < n_; ++j) into_[i * E_ + cluster_of_[j]] += edge(i, j);
  }

  double inside() const {
    double sum = 0.0;
    for (std::int64_t i = 0; i < n_; ++i) sum += into(i, cluster_of_[i]);
    return sum;
  }

  /// One pass over all pairs; takes every swap that gains.
  bool swap_rows() {
    bool any = false;
    for (std::int64_t i = 0; i < n_; ++i)
      for (std::int64_t j = i + 1; j < n_; ++j) {
        const std::int32_t a = cluster_of_[i], b = cluster_of_[j];
        if (a == b) continue;
        const float gain = into(i, b) - into(i, a) + into(j, a) - into(j, b) + edge(i, i) +
                           edge(j, j) - 2.0f * edge(i, j);
        if (gain <= least_gain_) continue;
        for (std::int64_t k = 0; k < n_; ++k) {
          const float moved = edge(i, k) - edge(j, k);
          into_[k * E_ + a] -= moved;
          into_[k * E_ + b] += moved;
        }
        std::swap(cluster_of_[i], cluster_of_[j]);
        any = true;
      }
    return any;
  }

  std::vector<float> edges_;  // [n, n]
  std::int64_t n_, E_;
  float least_gain_ = 0.0f;
  std::vector<float> into_;  // [n, E], sum of a row's edges into a cluster, itself included
  std::vector<std::int32_t> cluster_of_;
};

}  // namespace

std::vector<std::int32_t> improve_clusters(std::vector<float> edges, std::int32_t clusters,
                                           std::vector<std::int32_t> start, std::int32_t rounds) {
  return GraphClusters(std::move(edges), clusters, std::move(start)).improve(rounds);
}

}  // namespace cleave
