// Partitioners that cluster rows: activation profiles, and ExpertWeaver's gate means.

#include <algorithm>
#include <cmath>

#include "cleave/partition.h"
#include "exact_kmeans.h"
#include "fail.h"
#include "graph_clusters.h"
#include "partition_routed.h"

namespace cleave {
namespace {

constexpr double kSpecialised = 0.6;  // a coefficient of variation above it; the paper's value
constexpr double kMostShared = 0.7;   // alpha = 0.7 - 0.5 r
constexpr double kSharedSlope = 0.5;
constexpr double kMeanFloor = 1e-8;

/// [routed, T]: |h| * |d| of a neuron over the tokens.
std::vector<float> profiles_of(const NeuronSample& sample, const RoutedNeurons& routed) {
  const std::int64_t T = sample.hidden.rows;
  std::vector<float> rows(static_cast<std::size_t>(routed.count() * T));
  bool any = false;
  for (std::int64_t r = 0; r < routed.count(); ++r) {
    const std::int32_t j = routed.ids[r];
    const float norm = sample.down_norm.empty() ? 1.0f : sample.down_norm[j];
    for (std::int64_t t = 0; t < T; ++t) {
      const float value = std::abs(sample.hidden(t, j)) * norm;
      any |= value > 0.0f;
      rows[r * T + t] = value;
    }
  }
  if (!any)
    fail_argument(
        "partition_profiles: all {} routed neurons are 0 at all {} tokens; use a longer "
        "calibration text, or check that the layer runs",
        routed.count(), T);
  return rows;
}

/// Rows . rows^T: with equal sizes, k-means on the rows is to raise the sum of these products
/// within the clusters.
std::vector<float> products_of(MatrixView<const float> rows, const ParallelFor& parallel) {
  std::vector<float> products(static_cast<std::size_t>(rows.rows * rows.rows));
  linear(rows, rows, {}, {products.data(), rows.rows, rows.rows}, parallel);
  return products;
}

/// k-means, then what single assignments and swaps can still gain: in small clusters a row is a
/// large part of its own centroid, which holds it where it is.
std::vector<std::int32_t> cluster_rows(MatrixView<const float> rows, std::int32_t clusters,
                                       std::int32_t iterations, std::uint64_t seed,
                                       const ParallelFor& parallel) {
  auto start = exact_balanced_kmeans(rows, {clusters, iterations, seed}, parallel).cluster_of_row;
  return improve_clusters(products_of(rows, parallel), clusters, std::move(start), iterations);
}

struct GateSummary {
  std::vector<float> magnitude;    // [H], mean over samples of |a|
  double specialised_share = 0.0;  // r
};

GateSummary summarise(MatrixView<const float> gate_means) {
  GateSummary summary;
  const double n = static_cast<double>(gate_means.rows);
  std::int64_t specialised = 0;
  for (std::int64_t j = 0; j < gate_means.cols; ++j) {
    double sum = 0.0, square = 0.0, magnitude = 0.0;
    for (std::int64_t i = 0; i < gate_means.rows; ++i) {
      const double a = gate_means(i, j);
      sum += a;
      square += a * a;
      magnitude += std::abs(a);
    }
    const double mean = sum / n, variance = std::max(0.0, square / n - mean * mean);
    specialised += std::sqrt(variance) / (std::abs(mean) + kMeanFloor) > kSpecialised;
    summary.magnitude.push_back(static_cast<float>(magnitude / n));
  }
  summary.specialised_share =
      static_cast<double>(specialised) / static_cast<double>(gate_means.cols);
  return summary;
}

void check_expert_weaver(MatrixView<const float> gate_means, const ExpertWeaverSpec& spec) {
  if (gate_means.rows < 2 || gate_means.cols < 1)
    fail_argument(
        "partition_expert_weaver: gate_means is [{}, {}]; needs at least 2 samples of the text to "
        "tell how much a neuron varies",
        gate_means.rows, gate_means.cols);
  for (std::int64_t i = 0; i < gate_means.rows; ++i)
    for (std::int64_t j = 0; j < gate_means.cols; ++j)
      if (!std::isfinite(gate_means(i, j)))
        fail_argument("partition_expert_weaver: neuron {} is {} in sample {}; must be finite", j,
                      gate_means(i, j), i);
  check_divides(spec.num_experts, gate_means.cols);
  if (spec.shared_experts && (*spec.shared_experts < 0 || *spec.shared_experts >= spec.num_experts))
    fail_argument("partition_expert_weaver: {} shared of N = {} experts; must be in [0, N)",
                  *spec.shared_experts, spec.num_experts);
}

}  // namespace

NeuronPartition partition_profiles(const NeuronSample& sample, const RoutedSpec& spec,
                                   const ParallelFor& parallel) {
  const RoutedNeurons routed(sample.hidden.cols, spec);
  check_sample("partition_profiles", sample);
  const std::vector<float> rows = profiles_of(sample, routed);
  return routed.partition(cluster_rows({rows.data(), routed.count(), sample.hidden.rows},
                                       spec.num_experts, spec.iterations, spec.seed, parallel));
}

ExpertWeaverPartition partition_expert_weaver(MatrixView<const float> gate_means,
                                              const ExpertWeaverSpec& spec,
                                              const ParallelFor& parallel) {
  check_expert_weaver(gate_means, spec);
  const std::int64_t N = spec.num_experts, width = gate_means.cols / N;
  const GateSummary summary = summarise(gate_means);
  ExpertWeaverPartition result;
  result.specialised_share = summary.specialised_share;
  const double alpha = kMostShared - kSharedSlope * summary.specialised_share;
  const auto by_rule = static_cast<std::int32_t>(std::lround(alpha * static_cast<double>(N)));
  result.shared_experts =
      spec.shared_experts.value_or(std::min<std::int32_t>(by_rule, spec.num_experts - 1));
  const RoutedSpec routed_spec{
      .num_experts = spec.num_experts - result.shared_experts,
      .shared = highest_neurons(summary.magnitude, result.shared_experts * width),
      .width_multiple = spec.width_multiple,
      .iterations = spec.iterations,
      .seed = spec.seed};
  const RoutedNeurons routed(gate_means.cols, routed_spec);
  std::vector<float> rows;
  for (const std::int32_t j : routed.ids)
    for (std::int64_t i = 0; i < gate_means.rows; ++i) rows.push_back(gate_means(i, j));
  result.partition = routed.partition(
      exact_balanced_kmeans({rows.data(), routed.count(), gate_means.rows},
                            {routed_spec.num_experts, spec.iterations, spec.seed}, parallel)
          .cluster_of_row);
  return result;
}

}  // namespace cleave
