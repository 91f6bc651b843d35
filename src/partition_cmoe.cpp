// CMoE's partitioner, arXiv:2502.04416.

#include <algorithm>
#include <cmath>

#include "assignment.h"
#include "cleave/partition.h"
#include "fail.h"
#include "neuron_stats.h"
#include "partition_routed.h"

namespace cleave {
namespace {

/// For each neuron the tokens that activate it: its 0/1 column.
std::vector<std::vector<std::int32_t>> active_tokens(const NeuronSample& sample, std::int64_t top) {
  const std::int64_t H = sample.hidden.cols;
  std::vector<std::vector<std::int32_t>> tokens(static_cast<std::size_t>(H));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(top));
  std::vector<float> scaled(static_cast<std::size_t>(H));
  for (std::int64_t t = 0; t < sample.hidden.rows; ++t) {
    const float* row = sample.hidden.row(t);
    if (!sample.down_norm.empty()) {
      for (std::int64_t j = 0; j < H; ++j) scaled[j] = row[j] * sample.down_norm[j];
      row = scaled.data();
    }
    largest_magnitudes(row, H, top, ids.data());
    for (const std::int32_t j : ids)
      if (row[j] != 0.0f) tokens[j].push_back(static_cast<std::int32_t>(t));
  }
  return tokens;
}

class CmoeClusters {
 public:
  CmoeClusters(const std::vector<std::vector<std::int32_t>>& columns, const RoutedNeurons& routed,
               std::int64_t tokens)
      : columns_(columns), routed_(routed), E_(routed.num_experts) {
    means_.assign(static_cast<std::size_t>(tokens * E_), 0.0f);
  }

  /// Centroids that are the columns of single neurons.
  void start_at(const std::vector<std::int32_t>& neurons) {
    for (std::int64_t e = 0; e < E_; ++e)
      for (const std::int32_t t : columns_[neurons[e]]) means_[t * E_ + e] = 1.0f;
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
std::vector<std::int32_t> nearest_to_means(const std::vector<std::vector<std::int32_t>>& columns,
                                           std::int64_t tokens, const NeuronPartition& partition) {
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
    mean.assign(static_cast<std::size_t>(tokens), 0.0);
    for (const std::int32_t j : members[e])
      for (const std::int32_t t : columns[j])
        mean[t] += 1.0 / static_cast<double>(members[e].size());
    double shortest = 0.0;
    nearest.push_back(-1);
    for (const std::int32_t j : members[e]) {
      double distance = 0.0;  // but for the sum over the mean, which is the same for all members
      for (const std::int32_t t : columns[j]) distance += 1.0 - 2.0 * mean[t];
      if (nearest.back() >= 0 && distance >= shortest) continue;
      nearest.back() = j;
      shortest = distance;
    }
  }
  return nearest;
}

}  // namespace

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
  return nearest_to_means(active_tokens(sample, top), sample.hidden.rows, partition);
}

CmoePartition partition_cmoe(const NeuronSample& sample, const CmoeSpec& spec) {
  const std::int64_t H = sample.hidden.cols;
  check_sample("partition_cmoe", sample);
  if (spec.top < 1 || spec.top > H)
    fail_argument("partition_cmoe: Ka = {} neurons a token; must be in [1, H = {}]", spec.top, H);
  if (spec.shared_neurons < 0 || spec.shared_neurons > H)
    fail_argument("partition_cmoe: {} shared neurons of H = {}", spec.shared_neurons, H);
  const auto columns = active_tokens(sample, spec.top);
  std::vector<float> rate;
  for (const auto& tokens : columns) rate.push_back(static_cast<float>(tokens.size()));
  const auto order = highest_neurons(rate, H);
  if (rate[order[0]] == 0.0f)
    fail_argument("partition_cmoe: all {} neurons are 0 at all {} tokens; does the layer run?", H,
                  sample.hidden.rows);
  const auto first_routed = order.begin() + spec.shared_neurons;
  const RoutedSpec routed_spec{.num_experts = spec.num_experts,
                               .shared = {order.begin(), first_routed},
                               .width_multiple = spec.width_multiple,
                               .iterations = spec.iterations};
  const RoutedNeurons routed(H, routed_spec);
  CmoeClusters clusters(columns, routed, sample.hidden.rows);
  clusters.start_at({first_routed, first_routed + spec.num_experts});
  std::vector<std::int32_t> expert_of;
  for (std::int32_t round = 0; round < spec.iterations; ++round) {
    auto next = clusters.assign();
    if (next == expert_of) break;
    expert_of = std::move(next);
    clusters.update(expert_of);
  }
  CmoePartition result{routed.partition(expert_of), {}};
  result.representative = nearest_to_means(columns, sample.hidden.rows, result.partition);
  return result;
}

}  // namespace cleave
