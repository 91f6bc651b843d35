// CMoE's partitioner, arXiv:2502.04416.
#include "partition_cmoe.h"

#include <algorithm>
#include <utility>

#include "assignment.h"
#include "fail.h"
#include "neuron_stats.h"
#include "partition_routed.h"

namespace cleave {
namespace {

class CmoeClusters {
 public:
  CmoeClusters(const ActivationColumns& columns, const RoutedNeurons& routed)
      : columns_(columns.tokens), routed_(routed), E_(routed.num_experts) {
    means_.assign(static_cast<std::size_t>(columns.num_tokens * E_), 0.0f);
  }

  /// The columns of the E most active neurons.
  void start() {
    std::vector<float> rate;
    for (const std::int32_t j : routed_.ids) rate.push_back(static_cast<float>(columns_[j].size()));
    const auto most = highest_neurons(rate, E_);
    for (std::int64_t e = 0; e < E_; ++e)
      for (const std::int32_t t : columns_[routed_.ids[most[e]]]) means_[t * E_ + e] = 1.0f;
  }

  std::vector<std::int32_t> assign() {
    const std::vector<float> benefit = closeness();
    return assign_balanced({benefit.data(), routed_.count(), E_}, routed_.capacities());
  }

  void update(const std::vector<std::int32_t>& expert_of) {
    std::fill(means_.begin(), means_.end(), 0.0f);
    const float share = 1.0f / static_cast<float>(routed_.width);
    for (std::int64_t r = 0; r < routed_.count(); ++r)
      for (const std::int32_t t : columns_[routed_.ids[r]]) means_[t * E_ + expert_of[r]] += share;
  }

 private:
  /// [routed, E], minus the L1 distance: sum over t of m_t, and 1 - 2 m_t more for each token that
  /// the neuron is active for.
  std::vector<float> closeness() const {
    std::vector<double> total(static_cast<std::size_t>(E_));
    for (std::size_t i = 0; i < means_.size(); ++i) total[i % E_] += means_[i];
    std::vector<float> benefit;
    benefit.reserve(static_cast<std::size_t>(routed_.count() * E_));
    std::vector<double> distance;
    for (const std::int32_t j : routed_.ids) {
      distance = total;
      for (const std::int32_t t : columns_[j])
        for (std::int64_t e = 0; e < E_; ++e)
          distance[e] += 1.0 - 2.0 * static_cast<double>(means_[t * E_ + e]);
      for (const double d : distance) benefit.push_back(static_cast<float>(-d));
    }
    return benefit;
  }

  const std::vector<std::vector<std::int32_t>>& columns_;
  const RoutedNeurons& routed_;
  std::int64_t E_;
  std::vector<float> means_;  // [T, E]
};

/// Of each expert's neurons the one whose column is nearest (L1) to their mean.
std::vector<std::int32_t> nearest_to_means(const ActivationColumns& columns,
                                           const NeuronPartition& partition) {
  const auto E = static_cast<std::size_t>(partition.num_experts);
  std::vector<std::vector<std::int32_t>> members(E);
  for (std::size_t j = 0; j < partition.expert_of_neuron.size(); ++j) {
    const std::int32_t e = partition.expert_of_neuron[j];
    if (e >= 0) members[static_cast<std::size_t>(e)].push_back(static_cast<std::int32_t>(j));
  }
  std::vector<std::int32_t> nearest;
  std::vector<double> mean;
  for (std::size_t e = 0; e < E; ++e) {
    if (members[e].empty())
      fail_argument("representative_neurons: expert {} of {} has no neuron", e, E);
    mean.assign(static_cast<std::size_t>(columns.num_tokens), 0.0);
    for (const std::int32_t j : members[e])
      for (const std::int32_t t : columns.tokens[j])
        mean[t] += 1.0 / static_cast<double>(members[e].size());
    double shortest = 0.0;
    nearest.push_back(-1);
    for (const std::int32_t j : members[e]) {
      double distance = 0.0;  // but for the sum over the mean, which is the same for all members
      for (const std::int32_t t : columns.tokens[j]) distance += 1.0 - 2.0 * mean[t];
      if (nearest.back() >= 0 && distance >= shortest) continue;
      nearest.back() = j;
      shortest = distance;
    }
  }
  return nearest;
}

}  // namespace

void add_activations(MatrixView<const float> h, std::span<const float> down_norm, std::int64_t top,
                     ActivationColumns& columns) {
  const std::int64_t H = h.cols;
  columns.tokens.resize(static_cast<std::size_t>(H));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(top));
  std::vector<float> scaled(static_cast<std::size_t>(H));
  for (std::int64_t t = 0; t < h.rows; ++t) {
    const float* row = h.row(t);
    if (!down_norm.empty()) {
      for (std::int64_t j = 0; j < H; ++j) scaled[j] = row[j] * down_norm[j];
      row = scaled.data();
    }
    largest_magnitudes(row, H, top, ids.data());
    const auto token = static_cast<std::int32_t>(columns.num_tokens++);
    for (const std::int32_t j : ids)
      if (row[j] != 0.0f) columns.tokens[j].push_back(token);
  }
}

CmoePartition cmoe_clusters(const ActivationColumns& columns, const RoutedSpec& spec) {
  const RoutedNeurons routed(static_cast<std::int64_t>(columns.tokens.size()), spec);
  CmoeClusters clusters(columns, routed);
  clusters.start();
  std::vector<std::int32_t> expert_of;
  for (std::int32_t round = 0; round < spec.iterations; ++round) {
    auto next = clusters.assign();
    if (next == expert_of) break;
    expert_of = std::move(next);
    clusters.update(expert_of);
  }
  CmoePartition result{routed.partition(expert_of), {}};
  result.representative = nearest_to_means(columns, result.partition);
  return result;
}

std::vector<std::int32_t> representative_neurons(const NeuronSample& sample,
                                                 const NeuronPartition& partition,
                                                 std::int64_t top) {
  const std::int64_t H = sample.hidden.cols;
  check_sample("representative_neurons", sample);
  if (top < 1 || top > H)
    fail_argument("representative_neurons: Ka = {} neurons a token; must be in [1, H = {}]", top,
                  H);
  if (static_cast<std::int64_t>(partition.expert_of_neuron.size()) != H)
    fail_argument("representative_neurons: the partition has {} neurons, the sample {}",
                  partition.expert_of_neuron.size(), H);
  for (std::int64_t j = 0; j < H; ++j)
    if (partition.expert_of_neuron[j] >= partition.num_experts)
      fail_argument("representative_neurons: neuron {} is in expert {} of E = {}", j,
                    partition.expert_of_neuron[j], partition.num_experts);
  ActivationColumns columns;
  add_activations(sample.hidden, sample.down_norm, top, columns);
  return nearest_to_means(columns, partition);
}

CmoePartition partition_cmoe(const NeuronSample& sample, const CmoeSpec& spec) {
  const std::int64_t H = sample.hidden.cols;
  check_sample("partition_cmoe", sample);
  if (spec.top < 1 || spec.top > H)
    fail_argument("partition_cmoe: Ka = {} neurons a token; must be in [1, H = {}]", spec.top, H);
  if (spec.shared_neurons < 0 || spec.shared_neurons > H)
    fail_argument("partition_cmoe: {} shared neurons of H = {}", spec.shared_neurons, H);
  ActivationColumns columns;
  add_activations(sample.hidden, sample.down_norm, spec.top, columns);
  std::vector<float> rate;
  for (const auto& tokens : columns.tokens) rate.push_back(static_cast<float>(tokens.size()));
  const auto shared = highest_neurons(rate, spec.shared_neurons);
  if (*std::max_element(rate.begin(), rate.end()) == 0.0f)
    fail_argument("partition_cmoe: all {} neurons are 0 at all {} tokens; does the layer run?", H,
                  sample.hidden.rows);
  return cmoe_clusters(columns, {.num_experts = spec.num_experts,
                                 .shared = shared,
                                 .width_multiple = spec.width_multiple,
                                 .iterations = spec.iterations});
}

}  // namespace cleave
