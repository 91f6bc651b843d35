#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/export.h"
#include "cleave/fit_router.h"
#include "cleave/moe_layer.h"
#include "cleave/partition.h"
#include "cleave/refit.h"
#include "cleave/text.h"

namespace cleave {

/// What the weighted sum of the K selected experts is multiplied by. With an average weight of E /
/// K per expert the sum is unbiased over random K-subsets (FactorLLM); with 1 it is what the dense
/// FFN itself adds up, and usually nearer. Measured: docs/decisions/0004-output-scale.md.
enum class ScalePolicy {
  kFitted,   ///< least squares on calibration tokens, per layer; kExperts without calibration
  kExperts,  ///< average weight E / K: scale E with a softmax gate, E / K with a hard one
  kActive,   ///< average weight 1: scale K with a softmax gate, 1 with a hard one
};

/// "fitted", "experts", "active".
const char* scale_policy_name(ScalePolicy policy);

struct ConvertSpec {
  PartitionSpec partition{};
  std::int64_t experts_per_token = 4;  ///< K
  GateMode gate = GateMode::kSoftmax;
  RouterFitSpec router{};
  ScalePolicy scale = ScalePolicy::kFitted;  ///< without effect for K = E, which is exact
  int threads = 0;                           ///< 0: all cores
};

/// How a conversion to a budget divides the always-on neurons among the layers.
enum class Allocation {
  kUniform,  ///< equally
  kKl,       ///< as many in all, by the end-to-end KL that each layer's conversion costs; of a
             ///< model without a head by Quality::divergence(), as wherever KL is named here
};
/// "uniform", "kl".
const char* allocation_name(Allocation allocation);

/// What each layer of a conversion to a budget is fitted on.
enum class CalibrationMode {
  kSequential,  ///< what the layers converted before it give: what it will really see
  kParallel,    ///< what the dense layers before it give
};
/// "sequential", "parallel".
const char* calibration_mode_name(CalibrationMode mode);

/// One way to divide the shared neurons among the layers.
struct AllocationCandidate {
  std::vector<std::int64_t> shared_widths;  ///< [L], multiples of I; all candidates sum to the same
  double screening_kl = 0.0;                ///< of a quick conversion, on the windows held apart
  std::optional<double> kl;  ///< of the whole conversion, there; unset: it was not made
};

/// How Allocation::kKl chose. KL in nats (or cosine distance) against the dense model, on windows
/// of the calibration text that nothing was fitted on.
struct AllocationChoice {
  std::int64_t windows = 0;         ///< that were held apart
  std::vector<double> layer_kl;     ///< [L], of the model with only this layer converted (quickly)
  std::vector<double> layer_slope;  ///< [L], by how much log(error) falls with each expert's width
  std::vector<AllocationCandidate> candidates;  ///< the first is the uniform one
  std::size_t chosen = 0;  ///< not 0: better than uniform on every window held apart
};

/// A converted model, not yet written.
struct Conversion {
  std::vector<MoeLayer> layers;  ///< [L]
  /// [L] in place of `layers` where a budget is all shared, so that nothing is routed: each FFN's
  /// neurons that are left, as one expert.
  std::vector<ExpertBank> pruned;
  /// How neurons were grouped: "kmeans", ...; of a budget "captured energy", "energy" (nothing is
  /// routed) or budget_partition_name().
  std::string partition;
  std::uint64_t seed = 0;
  /// "zero" (K = E), "ridge", "random"; of a budget router_method_name() or "none"
  std::string router;
  ScalePolicy scale = ScalePolicy::kExperts;  ///< that was applied
  std::int64_t calibration_tokens = 0;        ///< that the statistics were taken from
  /// [L], mean of |MoE(x) - FFN(x)|^2 / |FFN(x)|^2 over calibration tokens; empty without any.
  std::vector<double> layer_error;
  // Of a conversion to a budget, [L] each; empty otherwise.
  std::vector<double> captured_energy;  ///< share of the neurons' energy that runs
  std::vector<double> oracle_energy;    ///< the same with the K experts of most energy per token
  std::vector<double> router_recall;    ///< share of those K that the router chooses
  std::vector<std::vector<double>> expert_load;  ///< [L][E], share of the tokens that chose it
  std::optional<AllocationChoice> allocation;    ///< of Allocation::kKl
  /// What a user should know: too little text for the number of unknowns (which layers), experts
  /// that nobody chose, a budget so small that nothing is routed. Written to cleave.json.
  std::vector<std::string> notices;
};

/// Splits every FFN of a dense model into experts and attaches routers.
///
/// K = E gets a zero router: the model then equals the dense one. Otherwise the routers are fitted
/// on `calibration` (its windows run through the dense model; the first token of each is left out
/// of the statistics), or drawn at random (FactorLLM) without one. A softmax gate's fitted logits
/// are also stretched, per layer, to where its weights come nearest to the dense output. The same
/// spec gives the same conversion for any number of threads up to rounding, and the same partition
/// exactly.
///
/// @param calibration  nullptr: none
/// @param progress     called with (what, done, all)
/// @throws InvalidArgument  E does not divide H, K > E, the model is already a mixture of experts
/// @throws FileError        from reading the checkpoint; an activation is not finite (names layer
///                          and token)
Conversion convert(
    const Checkpoint& source, const ConvertSpec& spec, const TokenWindows* calibration = nullptr,
    const std::function<void(const std::string&, std::int64_t, std::int64_t)>& progress = {});

/// Under a softmax gate a conversion to a budget gives its routers' logits this standard deviation
/// over a token's experts: routers fitted to energies know an order of experts, but no scale.
/// Measured: docs/methods/conversion.md.
inline constexpr double kSoftmaxGateSpread = 1.0 / 16.0;

/// A conversion to a budget: how much of every FFN runs per token.
struct BudgetSpec {
  double active_share = 0.5;       ///< rho: share of the neurons that run for a token, in (0, 1]
  double shared_share = 0.5;       ///< of those neurons, the part that always runs, in [0, 1]
  std::int64_t expert_width = 16;  ///< I; the fine experts of the others
  std::int64_t rounds = 2;         ///< of router and assignment in turn, kCaptured (see docs)
  /// kKl: every layer keeps E, I and K, and its shared slice a width of its own. Takes about four
  /// times as long, and two of the windows (of more than 32, one in 16) are held apart from the
  /// fit.
  Allocation allocation = Allocation::kUniform;
  BudgetPartition partition = BudgetPartition::kCaptured;
  RouterMethod router_method = RouterMethod::kTrained;
  std::int64_t router_rank = 0;  ///< R of kLowRank, at most E; 0: 32, or E / 2 where that is less
  RouterTrainSpec router{};      ///< of kTrained and kLogistic
  /// kHard: chosen experts weigh 1. kSoftmax: K times their softmax weight among the chosen, which
  /// the refit then takes into account.
  GateMode gate = GateMode::kHard;
  /// Of `down`, under the routing that really happens. Without it, too, a layer that has an output
  /// bias gives the mean of what it lost there.
  bool refit = true;
  RefitSpec refit_spec{};
  /// How often `down` is refitted: before each time but the first the router is fitted again, to
  /// the energies that the experts have with the `down` at hand. The split stays.
  std::int64_t refit_rounds = 1;
  /// Which part of what the layers before have lost `down` is asked to give back: 0: `down` aims at
  /// the dense FFN's output; 1: at the dense model's residual stream after the layer. Without
  /// meaning under CalibrationMode::kParallel, where nothing is lost before.
  double correction = 0.5;
  CalibrationMode calibration_mode = CalibrationMode::kSequential;
  /// Windows with tokens that the text lacks, for the first eighth of the layers, as a share
  /// of the text's windows, in [0, 1]: copies of these in which four tokens in ten are such.
  double rare_tokens = 0.0;
  /// Weight of a window's first token against any other in all statistics. It is an attention sink.
  double first_token_weight = 1.0;
  std::uint64_t seed = 0;
  int threads = 0;  ///< 0: all cores
};

/// What becomes of a layer's H neurons; where layers differ (Allocation::kKl), the mean of all.
struct BudgetShares {
  std::int64_t shared = 0;   ///< neurons that always run
  std::int64_t experts = 0;  ///< E, of I neurons each
  std::int64_t active = 0;   ///< K, experts per token; 0: nothing is routed
};
/// @param hidden  H
/// @throws InvalidArgument  a share out of range, a budget below one expert, I that does not
///                          divide H
BudgetShares divide_budget(std::int64_t hidden, const BudgetSpec& spec);

/// Converts a dense model to a budget, layer by layer: each layer is split, its router fitted and
/// its `down` repaired on what the converted layers before it give (CalibrationMode). All layers
/// get the same shapes, but for the shared slices under Allocation::kKl. Chosen experts weigh 1 on
/// average: exactly with GateMode::kHard (scale 1), with kSoftmax and scale K.
///
/// Holds the residual stream of all calibration tokens and one layer's hidden values:
/// T * (5 D + H) floats, T * (4 D + H) without the correction, and as much again by the share of
/// rare tokens.
/// @throws InvalidArgument  the budget is below one expert or leaves none, a text of no tokens, the
///                          model is no dense one; Allocation::kKl without a shared slice beside
///                          experts, or with fewer than 3 windows
/// @throws FileError        as convert()
Conversion convert_to_budget(
    const Checkpoint& source, const BudgetSpec& spec, const TokenWindows& calibration,
    const std::function<void(const std::string&, std::int64_t, std::int64_t)>& progress = {});

/// Writes the conversion as a stock directory: GraniteMoeShared where the layers have a shared
/// slice (write_granite_moe_shared), else Mixtral (write_mixtral); Llama with narrower FFNs where
/// nothing is routed (write_llama_dense). A BERT encoder is written by write_bert_moe, which cleave
/// alone reads, or write_bert_dense, a stock BertModel.
/// @param spec_json  the settings to record in cleave.json, an object
void write_conversion(const std::filesystem::path& out, const Checkpoint& source,
                      const Conversion& conversion, const std::string& spec_json,
                      const WriteSpec& write);

}  // namespace cleave
