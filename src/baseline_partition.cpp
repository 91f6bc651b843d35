#include "baseline_partition.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

#include "kmeans.h"
#include "support/random.h"

namespace cleave {
namespace {

constexpr std::int64_t kHiddenGrain = 16;  // neurons worth a thread

void split_rest(const FfnView& ffn, const LayerMoments& moments, std::uint64_t seed,
                const std::vector<std::int32_t>& rest, BaselinePartition& partition) {
  const SplitKey& key = partition.key;
  const auto n = static_cast<std::int64_t>(rest.size());
  std::vector<std::int32_t> order = rest, expert(rest.size());
  for (std::int64_t i = 0; i < n; ++i)
    expert[i] = static_cast<std::int32_t>(i * key.num_experts / n);
  if (key.split == BaselineSplit::kRandom) {
    std::mt19937_64 rng(seed);
    shuffle(order, rng);
  } else if (key.split == BaselineSplit::kKMeans) {
    const MatrixView<const float> rows = ffn.gate.empty() ? ffn.up : ffn.gate;
    std::vector<float> gathered;
    for (const std::int32_t j : rest)
      gathered.insert(gathered.end(), rows.row(j), rows.row(j) + rows.cols);
    expert = balanced_kmeans({gathered.data(), n, rows.cols},
                             {.clusters = static_cast<std::int32_t>(key.num_experts), .seed = seed})
                 .cluster_of_row;
  } else if (key.split == BaselineSplit::kCmoe) {
    RoutedSpec spec{.num_experts = static_cast<std::int32_t>(key.num_experts), .iterations = 1};
    for (std::size_t j = 0; j < partition.expert_of_neuron.size(); ++j)
      if (partition.expert_of_neuron[j] == BaselineLayer::kShared)
        spec.shared.push_back(static_cast<std::int32_t>(j));
    CmoePartition split = cmoe_clusters(moments.columns, spec);
    for (std::int64_t i = 0; i < n; ++i) expert[i] = split.partition.expert_of_neuron[rest[i]];
    partition.representatives = std::move(split.representative);
  }
  for (std::int64_t i = 0; i < n; ++i) partition.expert_of_neuron[order[i]] = expert[i];
}

}  // namespace

void LayerMoments::add(MatrixView<const float> h, const ParallelFor& parallel) {
  parallel(h.cols, kHiddenGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < h.rows; ++t)
      for (std::int64_t j = begin; j < end; ++j) {
        const double value = h(t, j);
        sum[j] += value;
        square[j] += value * value;
      }
  });
  tokens += h.rows;
}

double LayerMoments::score(BaselineScore score, std::int64_t j) const {
  switch (score) {
    case BaselineScore::kEnergy:
      return square[j] * down[j] * down[j];
    case BaselineScore::kFluctuation:
      return (square[j] - static_cast<double>(tokens) * mean(j) * mean(j)) * down[j] * down[j];
    case BaselineScore::kTopRate:
      return columns.tokens.empty() ? 0.0 : static_cast<double>(columns.tokens[j].size());
  }
  return 0.0;
}

SplitKey key_of(const BaselineSpec& spec) {
  return {spec.split, spec.score, spec.shared, spec.num_experts, spec.seed};
}

BaselinePartition make_partition(const SplitKey& key, const FfnView& ffn,
                                 const LayerMoments& moments, std::int64_t layer) {
  const std::int64_t H = ffn.up.rows;
  BaselinePartition partition{key, std::vector<std::int32_t>(H, BaselineLayer::kOff), {}};
  std::vector<std::int32_t> order(static_cast<std::size_t>(H));
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> score(static_cast<std::size_t>(H));
  for (std::int64_t j = 0; j < H; ++j) score[j] = moments.score(key.score, j);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return score[a] > score[b]; });
  for (std::int64_t i = 0; i < key.shared; ++i)
    partition.expert_of_neuron[order[i]] = BaselineLayer::kShared;
  std::vector<std::int32_t> rest(order.begin() + key.shared, order.end());
  std::sort(rest.begin(), rest.end());
  // As convert(): layers must not share a permutation.
  if (key.split != BaselineSplit::kNone)
    split_rest(ffn, moments, key.seed + static_cast<std::uint64_t>(layer), rest, partition);
  return partition;
}

}  // namespace cleave
