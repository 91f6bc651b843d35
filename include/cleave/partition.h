#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/views.h"

namespace cleave {

/// Which expert owns each hidden neuron. Clustering fills it; so will a trained set of gates.
struct NeuronPartition {
  std::int32_t num_experts = 0;
  std::vector<std::int32_t> expert_of_neuron;   ///< [H], in [0, num_experts), kDropped or kShared
  static constexpr std::int32_t kDropped = -1;  ///< runs for no token
  static constexpr std::int32_t kShared = -2;   ///< runs for every token; see shared_slice()
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

// Partitions with neurons that are always on, and from what the neurons do on a text. All give
// experts of one width, (H - shared) / E; all are described in docs/methods/partitioners.md.

/// The routed experts of a partition: how many, and which neurons they are made of.
struct RoutedSpec {
  std::int32_t num_experts = 8;           ///< E, routed; must divide H - shared.size()
  std::vector<std::int32_t> shared = {};  ///< neurons that are always on, each once, in any order
  std::int64_t width_multiple = 1;        ///< an expert's width must be a multiple, for kernels: 16
  std::int32_t iterations = 25;  ///< rounds of clustering; stops earlier when nothing moves
  std::uint64_t seed = 0;
};

/// Width of the routed experts.
/// @throws InvalidArgument  E < 1, fewer neurons left than experts, E does not divide them (names
/// the
///                          nearest that do), a width that is no multiple, or a shared neuron out
///                          of range or named twice
std::int64_t routed_width(std::int64_t hidden, const RoutedSpec& spec);

/// The `count` neurons of highest score (energy, rate, ...), highest first; ties to the lower id.
/// @throws InvalidArgument  count outside [0, H], or a score that is NaN
std::vector<std::int32_t> highest_neurons(std::span<const float> score, std::int64_t count);

/// partition_neurons() for the neurons that are not shared. Throws as routed_width().
NeuronPartition partition_neurons(const FfnView& ffn, PartitionMethod method,
                                  const RoutedSpec& spec);

/// Neurons dealt out in the order of their importance, one to each expert, then one to each again:
/// every expert gets its share of the important ones. For upcycling, where experts should start as
/// equals.
///   importance [H], any measure: |gate row| * |up row| * |down column| of the dense weights, say
NeuronPartition partition_importance_spread(std::span<const float> importance,
                                            const RoutedSpec& spec);

/// What the neurons do on some tokens of a calibration text.
struct NeuronSample {
  MatrixView<const float> hidden;         ///< [T, H], see hidden_activations()
  std::span<const float> down_norm = {};  ///< [H], see down_norms(); or empty: as if all were 1
};

/// Balanced k-means (Euclidean) on activation profiles: the row of neuron j is |h_tj| * |d_j| over
/// the tokens t of the sample. Neurons that add much to the output for the same tokens come
/// together. Each round assigns exactly; where that stops, swaps of two neurons go on until none
/// gains. Memory: H * (T + H) floats.
/// @throws InvalidArgument  as routed_width(); a sample that is empty, NaN or infinite (names token
///                          and neuron), or in which no routed neuron does anything
NeuronPartition partition_profiles(const NeuronSample& sample, const RoutedSpec& spec,
                                   const ParallelFor& parallel = {});

/// Groups the neurons that fire for the same tokens: raises sum over experts of the sum over pairs
/// i, j in it of A_ij / sqrt(A_ii A_jj), until neither an exact assignment nor a swap of two
/// neurons raises it further.
///   coactivation A [H, H], counts or rates with the neurons' own on the diagonal, as
///                NeuronStats::coactivation() gives them
/// Memory: another H * H floats. @throws InvalidArgument  as routed_width(); A is not square,
/// negative, NaN or infinite, or says that no routed neuron ever fires
NeuronPartition partition_coactivation(MatrixView<const float> coactivation,
                                       const RoutedSpec& spec);

struct CmoeSpec {
  std::int32_t num_experts = 8;     ///< E, routed
  std::int64_t shared_neurons = 0;  ///< S * I in the paper
  std::int64_t top = 10;            ///< Ka, neurons of largest |h| that a token activates
  std::int32_t iterations = 1;      ///< 1 as in the authors' code
  std::int64_t width_multiple = 1;
};
struct CmoePartition {
  NeuronPartition partition;
  /// [E], the member nearest to each expert's mean column: CMoE's router scores an expert by this
  /// neuron's |h|.
  std::vector<std::int32_t> representative;
};
/// CMoE: the neurons that are most often among a token's Ka largest |h_j| (times |d_j| where the
/// sample has it; the paper has not) are shared; the next most active ones are the experts' first
/// centroids; all others go where the 0/1 column over tokens is nearest (L1), balanced exactly.
/// @throws InvalidArgument  as partition_profiles(), or Ka outside [1, H]
/// Source: arXiv:2502.04416, sections 4.1 and 4.2, and the authors' code.
CmoePartition partition_cmoe(const NeuronSample& sample, const CmoeSpec& spec);

/// For any partition, the neuron that stands for each expert: of its neurons the one whose 0/1
/// column over tokens is nearest (L1) to the mean column of the expert; ties to the lower neuron.
///   top  Ka: a token activates its Ka neurons of largest |h_j| (times |d_j| where given)
/// returns [E]. @throws InvalidArgument  as partition_profiles(), Ka outside [1, H], sizes that
/// disagree, or an expert without a neuron
/// Source: CMoE, arXiv:2502.04416, section 4.2.
std::vector<std::int32_t> representative_neurons(const NeuronSample& sample,
                                                 const NeuronPartition& partition,
                                                 std::int64_t top = 10);

struct ExpertWeaverSpec {
  std::int32_t num_experts = 64;  ///< N, shared ones included; must divide H
  std::optional<std::int32_t> shared_experts =
      {};  ///< unset: by the layer's coefficients of variation
  std::int64_t width_multiple = 1;
  std::int32_t iterations = 25;
  std::uint64_t seed = 0;
};
struct ExpertWeaverPartition {
  NeuronPartition partition;        ///< num_experts: the routed ones
  double specialised_share = 0.0;   ///< r, neurons whose coefficient of variation is above 0.6
  std::int32_t shared_experts = 0;  ///< round((0.7 - 0.5 r) N), at most N - 1, unless given
};
/// ExpertWeaver: neurons whose mean gate activation hardly varies between samples of the text are
/// what every input needs; the more of them, the more experts of a layer are shared. The shared
/// neurons are those of largest mean |a|, the rest is clustered by balanced k-means on the columns
/// of a.
///   gate_means a [samples, H], signed; see NeuronStats::gate_means()
/// @throws InvalidArgument  fewer than 2 samples, N does not divide H, shared experts outside [0,
/// N) Source: arXiv:2602.15521 (no code was released; our readings are in partitioners.md).
ExpertWeaverPartition partition_expert_weaver(MatrixView<const float> gate_means,
                                              const ExpertWeaverSpec& spec,
                                              const ParallelFor& parallel = {});

/// What groups the neurons in a conversion to a budget. All but the first are fixed before any
/// router is fitted; the shared neurons are those of most energy unless the method has a way of its
/// own. docs/methods/partitioners.md
enum class BudgetPartition {
  kCaptured,      ///< in turn with the router, by the energy that its choices catch
  kProfiles,      ///< partition_profiles()
  kKMeans,        ///< gate rows, partition_neurons()
  kCoactivation,  ///< partition_coactivation()
  kCmoe,          ///< partition_cmoe(); shared by rate
  kExpertWeaver,  ///< partition_expert_weaver(); shared by mean gate activation
  kImportance,    ///< partition_importance_spread() by |gate row| |up row| |down column|
  kContiguous,    ///< partition_neurons()
  kRandom,        ///< partition_neurons()
};

/// "captured", "profiles", "kmeans", "coactivation", "cmoe", "expertweaver", "importance",
/// "contiguous", "random".
const char* budget_partition_name(BudgetPartition partition);
/// Empty optional for anything else.
std::optional<BudgetPartition> parse_budget_partition(const std::string& name);

}  // namespace cleave
