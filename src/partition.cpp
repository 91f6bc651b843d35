#include "cleave/partition.h"

#include <fmt/format.h>

#include <numeric>
#include <random>

#include "cleave/error.h"
#include "kmeans.h"
#include "partition_routed.h"
#include "support/random.h"

namespace cleave {
namespace {

std::int64_t divisor_below(std::int64_t value, std::int64_t hidden) {
  while (hidden % value != 0) --value;
  return value;
}

std::int64_t divisor_above(std::int64_t value, std::int64_t hidden) {
  while (hidden % value != 0) ++value;
  return value;
}

/// order[r] is the neuron at place r; the places are cut into equal runs.
NeuronPartition cut_evenly(const std::vector<std::int32_t>& order, std::int32_t num_experts) {
  NeuronPartition partition{num_experts, std::vector<std::int32_t>(order.size())};
  const std::size_t width = order.size() / static_cast<std::size_t>(num_experts);
  for (std::size_t r = 0; r < order.size(); ++r)
    partition.expert_of_neuron[order[r]] = static_cast<std::int32_t>(r / width);
  return partition;
}

}  // namespace

const char* partition_method_name(PartitionMethod method) {
  switch (method) {
    case PartitionMethod::kContiguous:
      return "contiguous";
    case PartitionMethod::kRandom:
      return "random";
    case PartitionMethod::kKMeans:
      return "kmeans";
  }
  return "unknown";
}

void check_divides(std::int64_t num_experts, std::int64_t hidden) {
  if (hidden < 1)
    throw InvalidArgument(
        fmt::format("partition: H = {} hidden neurons; the FFN must have at least one", hidden));
  if (num_experts >= 1 && num_experts <= hidden && hidden % num_experts == 0) return;
  if (num_experts < 1)
    throw InvalidArgument(fmt::format(
        "partition: E = {} experts; must be at least 1 and divide H = {}", num_experts, hidden));
  if (num_experts > hidden)
    throw InvalidArgument(fmt::format(
        "partition: E = {} experts but only H = {} hidden neurons; nearest divisor is {}",
        num_experts, hidden, hidden));
  throw InvalidArgument(fmt::format(
      "partition: E = {} does not divide H = {}; nearest divisors are {} and {}", num_experts,
      hidden, divisor_below(num_experts, hidden), divisor_above(num_experts, hidden)));
}

NeuronPartition partition_neurons(const FfnView& ffn, const PartitionSpec& spec) {
  check_divides(spec.num_experts, ffn.up.rows);
  std::vector<std::int32_t> order(static_cast<std::size_t>(ffn.up.rows));
  std::iota(order.begin(), order.end(), 0);
  switch (spec.method) {
    case PartitionMethod::kContiguous:
      return cut_evenly(order, spec.num_experts);
    case PartitionMethod::kRandom: {
      std::mt19937_64 rng(spec.seed);
      shuffle(order, rng);
      return cut_evenly(order, spec.num_experts);
    }
    case PartitionMethod::kKMeans: {
      if (spec.iterations < 1)
        throw InvalidArgument(
            fmt::format("partition: {} k-means iterations; must be at least 1", spec.iterations));
      const auto rows = ffn.gate.empty() ? ffn.up : ffn.gate;
      return {spec.num_experts,
              balanced_kmeans(rows, {spec.num_experts, spec.iterations, spec.seed}).cluster_of_row};
    }
  }
  throw InvalidArgument("partition: unknown method");
}

NeuronPartition partition_neurons(const FfnView& ffn, PartitionMethod method,
                                  const RoutedSpec& spec) {
  const RoutedNeurons routed(ffn.up.rows, spec);
  const PartitionSpec own{method, spec.num_experts, spec.iterations, spec.seed};
  const auto rows = ffn.gate.empty() ? ffn.up : ffn.gate;
  std::vector<float> left;  // the rows that k-means looks at; the others look at their number only
  for (const std::int32_t j : routed.ids)
    left.insert(left.end(), rows.row(j), rows.row(j) + rows.cols);
  FfnView rest;
  rest.up = {left.data(), routed.count(), rows.cols};
  return routed.partition(partition_neurons(rest, own).expert_of_neuron);
}

}  // namespace cleave
