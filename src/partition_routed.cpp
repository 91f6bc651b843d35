#include "partition_routed.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "fail.h"

namespace cleave {
namespace {

/// The divisor of `count` nearest to `value` in the direction of `step`; 0 if there is none.
std::int64_t nearest_divisor(std::int64_t count, std::int64_t value, std::int64_t step) {
  for (std::int64_t d = value; d >= 1 && d <= count; d += step)
    if (count % d == 0) return d;
  return step < 0 ? 1 : count;
}

void check_shared(std::int64_t hidden, const std::vector<std::int32_t>& shared) {
  std::vector<char> seen(static_cast<std::size_t>(hidden), 0);
  for (const std::int32_t j : shared) {
    if (j < 0 || j >= hidden)
      fail_argument("partition: shared neuron {}; must be in [0, H = {})", j, hidden);
    if (seen[j] != 0) fail_argument("partition: shared neuron {} is named twice", j);
    seen[j] = 1;
  }
}

}  // namespace

std::int64_t routed_width(std::int64_t hidden, const RoutedSpec& spec) {
  const std::int64_t E = spec.num_experts;
  check_shared(hidden, spec.shared);
  const std::int64_t left = hidden - static_cast<std::int64_t>(spec.shared.size());
  if (E < 1) fail_argument("partition: E = {} routed experts; must be at least 1", E);
  if (spec.width_multiple < 1)
    fail_argument("partition: width_multiple = {}; must be at least 1", spec.width_multiple);
  if (spec.iterations < 1)
    fail_argument("partition: {} rounds of clustering; must be at least 1", spec.iterations);
  if (left < E)
    fail_argument(
        "partition: {} shared neurons leave {} of H = {} for E = {} routed experts, less than one "
        "each; share fewer neurons or use fewer experts",
        spec.shared.size(), left, hidden, E);
  if (left % E != 0)
    fail_argument(
        "partition: E = {} does not divide the {} neurons that {} shared ones leave of H = {}; "
        "nearest divisors are {} and {}, or share {} neurons more",
        E, left, spec.shared.size(), hidden, nearest_divisor(left, E, -1),
        nearest_divisor(left, E, 1), left % E);
  const std::int64_t width = left / E;
  if (width % spec.width_multiple != 0)
    fail_argument(
        "partition: {} neurons in E = {} experts make experts of {}, no multiple of {}; choose E "
        "and the number of shared neurons ({}) so that {} * E divides H minus shared",
        left, E, width, spec.width_multiple, spec.shared.size(), spec.width_multiple);
  return width;
}

RoutedNeurons::RoutedNeurons(std::int64_t hidden_in, const RoutedSpec& spec)
    : hidden(hidden_in), width(routed_width(hidden_in, spec)), num_experts(spec.num_experts) {
  std::vector<char> shared(static_cast<std::size_t>(hidden), 0);
  for (const std::int32_t j : spec.shared) shared[j] = 1;
  for (std::int64_t j = 0; j < hidden; ++j)
    if (shared[j] == 0) ids.push_back(static_cast<std::int32_t>(j));
}

NeuronPartition RoutedNeurons::partition(const std::vector<std::int32_t>& expert_of) const {
  NeuronPartition result{num_experts, std::vector<std::int32_t>(static_cast<std::size_t>(hidden),
                                                                NeuronPartition::kShared)};
  for (std::size_t r = 0; r < ids.size(); ++r) result.expert_of_neuron[ids[r]] = expert_of[r];
  return result;
}

void check_sample(const char* function, const NeuronSample& sample) {
  const auto& hidden = sample.hidden;
  if (hidden.empty())
    fail_argument("{}: the sample is empty; expected hidden [T, H] with at least one token",
                  function);
  if (!sample.down_norm.empty() &&
      static_cast<std::int64_t>(sample.down_norm.size()) != hidden.cols)
    fail_argument("{}: {} norms of `down` for H = {} neurons", function, sample.down_norm.size(),
                  hidden.cols);
  for (std::size_t j = 0; j < sample.down_norm.size(); ++j)
    if (!(sample.down_norm[j] >= 0.0f) || !std::isfinite(sample.down_norm[j]))
      fail_argument("{}: the norm of `down` of neuron {} is {}; must be finite and not negative",
                    function, j, sample.down_norm[j]);
  for (std::int64_t t = 0; t < hidden.rows; ++t)
    for (std::int64_t j = 0; j < hidden.cols; ++j)
      if (!std::isfinite(hidden(t, j)))
        fail_argument("{}: neuron {} is {} at token {}; must be finite", function, j, hidden(t, j),
                      t);
}

std::vector<std::int32_t> highest_neurons(std::span<const float> score, std::int64_t count) {
  const auto hidden = static_cast<std::int64_t>(score.size());
  if (count < 0 || count > hidden)
    fail_argument("highest_neurons: {} of H = {} neurons", count, hidden);
  for (std::size_t j = 0; j < score.size(); ++j)
    if (std::isnan(score[j])) fail_argument("highest_neurons: the score of neuron {} is NaN", j);
  std::vector<std::int32_t> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return score[a] > score[b]; });
  order.resize(static_cast<std::size_t>(count));
  return order;
}

NeuronPartition partition_importance_spread(std::span<const float> importance,
                                            const RoutedSpec& spec) {
  const RoutedNeurons routed(static_cast<std::int64_t>(importance.size()), spec);
  std::vector<float> of_routed;
  for (const std::int32_t j : routed.ids) of_routed.push_back(importance[j]);
  const auto order = highest_neurons(of_routed, routed.count());
  std::vector<std::int32_t> expert_of(order.size());
  for (std::size_t rank = 0; rank < order.size(); ++rank)
    expert_of[order[rank]] = static_cast<std::int32_t>(rank % spec.num_experts);
  return routed.partition(expert_of);
}

}  // namespace cleave
