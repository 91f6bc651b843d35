#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/expert.h"
#include "cleave/views.h"

namespace cleave {

/// Which expert owns each hidden neuron. Clustering fills it; so will a trained set of gates.
struct NeuronPartition {
  std::int32_t num_experts = 0;
  std::vector<std::int32_t> expert_of_neuron;  ///< [H], in [0, num_experts), kDropped or kShared
  static constexpr std::int32_t kDropped = -1;
  static constexpr std::int32_t kShared = -2;  ///< always on
};

enum class PartitionMethod { kContiguous, kRandom, kKMeans };

/// "contiguous", "random", "kmeans".
const char* partition_method_name(PartitionMethod method);

struct PartitionSpec {
  PartitionMethod method = PartitionMethod::kKMeans;
  std::int32_t num_experts = 8;  ///< E; must divide H
  std::int32_t iterations = 25;  ///< k-means rounds; stops earlier when nothing moves
  std::uint64_t seed = 0;        ///< same seed, same partition, on every machine
};

/// Cuts the hidden axis of an FFN into E experts of exactly H / E neurons.
///
/// kContiguous  neuron j goes to expert j / (H / E): FactorLLM's released code
/// kRandom      a seeded permutation, then contiguous: FactorLLM's paper
/// kKMeans      balanced k-means on the L2-normalised rows of `gate` (of `up` where there is no
///              gate), exact capacities. MoEfication, arXiv:2110.01786
///
/// @param ffn   read during the call only
/// @throws InvalidArgument  E < 1, E > H, or E does not divide H (names the nearest divisors)
NeuronPartition partition_neurons(const FfnView& ffn, const PartitionSpec& spec);

/// Throws InvalidArgument unless E divides H; the message names the divisors of H nearest to E.
void check_divides(std::int64_t num_experts, std::int64_t hidden);

}  // namespace cleave
