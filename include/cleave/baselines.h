#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cleave/evaluate.h"
#include "cleave/mass_router.h"
#include "cleave/model.h"
#include "cleave/regression_router.h"
#include "cleave/routing.h"
#include "cleave/text.h"

namespace cleave {

// What a conversion has to be compared with: pruning, published splits and oracles at the same
// budget. A baseline is the dense FFN whose hidden activations h are multiplied by 0 or 1 per token
// and neuron before `down`. So a row costs what the dense model costs, and nothing is written. Only
// rows that are refitted have weights of their own: the `down` of the neurons that are left.

enum class BaselineSet { kNone, kQuick, kAll };
/// "none", "quick", "all"; empty optional for anything else.
std::optional<BaselineSet> parse_baseline_set(const std::string& name);

/// How the neurons that are not always on are grouped into experts of equal width.
enum class BaselineSplit {
  kNone,        ///< not at all: they are off (a static mask)
  kContiguous,  ///< in the order of the checkpoint: FactorLLM's release
  kRandom,      ///< a seeded permutation
  kKMeans,      ///< balanced k-means on L2-normalised gate rows: MoEfication, arXiv:2110.01786
  kCmoe,        ///< balanced around the most active neurons: CMoE, arXiv:2502.04416
};

/// Who chooses the K experts of a token. Oracles see the experts' outputs and cannot be deployed.
enum class BaselineRouter {
  kNone,            ///< nobody: a static mask
  kOracleNorm,      ///< the K largest |expert_e(x)|
  kOracleLabel,     ///< the K smallest |expert_e(x) - FFN(x) / max(1, E / K, rounded down)|^2: the
                    ///< label rule of FactorLLM's release (arXiv:2408.11855)
  kOracleNeuron,    ///< no experts: the neurons with the largest |h_j| * |d_j|
  kRandom,          ///< a linear router of random normal weights
  kRidge,           ///< RouterFit on |expert_e(x)| relative to the token's mean
  kRidgeBias,       ///< the same with a bias (a constant input)
  kRegression,      ///< fit_regression_router() on |expert_e(x)|: D2DMoE, arXiv:2310.04361
  kMass,            ///< fit_mass_router() of BaselineSpec::rank
  kRepresentative,  ///< the K largest |h_R| of one neuron per expert: CMoE
};

/// By what the neurons that are always on are chosen, the largest first. d_j: column j of `down`.
enum class BaselineScore {
  kEnergy,       ///< E[h_j^2] |d_j|^2
  kFluctuation,  ///< Var(h_j) |d_j|^2: FLAP, arXiv:2312.11983, uniform over layers
  kTopRate,      ///< share of tokens whose 10 largest |h| include j: CMoE
};

struct BaselineSpec {
  std::string method = {};  ///< what a table calls it
  double rho = 1.0;         ///< share of the H neurons that runs per token
  /// false: an oracle, or a router that no stock class holds (kRegression, kMass)
  bool deployable = true;
  BaselineSplit split = BaselineSplit::kNone;
  BaselineRouter router = BaselineRouter::kNone;
  BaselineScore score = BaselineScore::kEnergy;
  std::int64_t shared = 0;             ///< neurons that are always on
  std::int64_t num_experts = 0;        ///< E; divides H - shared
  std::int64_t experts_per_token = 0;  ///< K
  /// A neuron that is off gives its mean instead of 0: over all tokens where nothing is routed
  /// (FLAP's bias), else over the calibration tokens that do not choose its expert.
  bool compensate = false;
  /// Where nothing is routed: `down` is refitted layer by layer as convert_to_budget() does it,
  /// with its defaults, and the neurons are chosen there too, by kEnergy or kFluctuation: on the
  /// stream of the layers that are pruned already, tokens weighted as there.
  bool refit = false;
  bool scale_up = false;                ///< the chosen experts are multiplied by E / K, else by 1
  std::int64_t rank = 0;                ///< of kMass; an expert's width where that is less
  std::int64_t calibration_tokens = 0;  ///< use only the first so many; 0: all
  std::uint64_t seed = 0;
};

/// The rows for a model with H hidden neurons. Budgets and expert counts that do not divide are
/// rounded to ones that do; `rho` of a row is then its own.
///   quick  static mask and FLAP-style pruning, both also refitted; contiguous and random split
///          with a ridge router; shared + k-means + ridge + compensation; neuron oracle
///   all    every row of docs/benchmarks.md
/// @throws InvalidArgument  rho outside (0, 1], or H < 32
std::vector<BaselineSpec> baseline_specs(BaselineSet set, std::int64_t hidden, double rho,
                                         std::uint64_t seed = 0);

/// One layer of a baseline: which neurons are on for a token.
struct BaselineLayer {
  static constexpr std::int32_t kShared = -2;  ///< always on
  static constexpr std::int32_t kOff = -1;     ///< never on
  std::vector<std::int32_t> expert_of_neuron;  ///< [H]: an expert, kShared or kOff
  std::vector<float> off_value;                ///< [H] what h_j is while off; empty: 0
  /// [neurons that are on, D], in their order: rows in place of the dense FFN's columns of `down`,
  /// where that was refitted; empty: it was not.
  std::vector<float> down_t;
  std::vector<float>
      down_bias;        ///< [D], in the dense FFN's place where that was refitted and has one
  LinearRouter router;  ///< kRandom, kRidge, kRidgeBias
  std::vector<float> router_bias;             ///< [E], kRidgeBias
  RegressionRouter regression;                ///< kRegression
  MassRouter mass;                            ///< kMass
  std::vector<std::int32_t> representatives;  ///< [E] neurons, kRepresentative
  /// Of a router beside the oracle kOracleNorm of its experts: on the calibration text, without
  /// first tokens of windows. Empty where nothing is routed, or the row is such an oracle.
  std::optional<RouterQuality> quality = {};
};

/// A baseline with what it learned from the calibration text. A few numbers per neuron; D of them
/// for every neuron that is on where it was refitted.
struct Baseline {
  BaselineSpec spec;
  std::vector<BaselineLayer> layers;  ///< [L]
};

using BaselineProgress = std::function<void(const std::string&, std::int64_t, std::int64_t)>;

/// Fits all baselines of all budgets in one go over the calibration text, layer by layer on the
/// dense model's stream: one forward pass, the products of the experts' outputs for the routers,
/// and where a routed row compensates, one more look at h. Moments and rates are over
/// all tokens, as their papers take them; routers and the means of what they switch off leave out
/// the first token of each window, an attention sink with up to 96 % of a layer's energy. Rows that
/// are refitted take a conversion each (see convert_to_budget()).
///
/// Holds 2 * tokens * D floats, tokens * E a fitted partition, and tokens * H where that is below
/// half a gigabyte (else h is computed again). The same input gives the same result for any number
/// of threads up to rounding.
///
/// @param progress  called with (what, done, all)
/// @throws InvalidArgument  the model holds experts, the text has no window of 2 tokens, a spec
///                          does not fit H
/// @throws FileError        an activation is not finite (names layer and token)
std::vector<Baseline> prepare_baselines(Model& dense, const TokenWindows& calibration,
                                        std::span<const BaselineSpec> specs,
                                        const BaselineProgress& progress = {});

/// Final norm outputs of the masked model: one forward pass, with a third more for the oracles.
HiddenStates baseline_states(Model& dense, const Baseline& baseline, const TokenWindows& text);

/// Multiply-adds of a row's FFN and router over those of the dense FFN. What an oracle would cost
/// is not counted. @param matrices  of the dense FFN: 3, or 2 without a gate
double baseline_active_share(const BaselineSpec& spec, std::int64_t hidden, std::int64_t d_model,
                             std::int64_t matrices = 3);

/// One line of a quality table.
struct QualityRow : Quality {
  std::string method;
  double rho = 1.0;           ///< share of the FFN's neurons that runs per token
  double active_share = 1.0;  ///< multiply-adds of FFN and router over the dense FFN's
  bool deployable = true;     ///< false: an oracle, or `stock` is false
  bool stock = true;          ///< false: no stock class holds its router
  bool routed = false;        ///< false: the same neurons for every token
  bool ours = false;          ///< a conversion that a report is about; false: a baseline
  /// Of a routed row: on the calibration text, mean over layers; 1 and 1 of an oracle that takes
  /// the experts with the largest outputs.
  std::optional<RouterQuality> router = {};
  /// Multiply-adds of the router over the dense FFN's, in active_share; of an oracle 0: not counted
  double router_share = 0.0;
};

/// Evaluates baselines on a text: one forward pass a row; the dense model's logits come from
/// `dense_states` by its head alone.
/// @param dense_states  hidden_states(dense, text)
std::vector<QualityRow> measure_baselines(Model& dense, std::span<const Baseline> baselines,
                                          const TokenWindows& text,
                                          const HiddenStates& dense_states,
                                          const BaselineProgress& progress = {});

}  // namespace cleave
