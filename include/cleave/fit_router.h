#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/partition.h"
#include "cleave/routing.h"
#include "cleave/views.h"

namespace cleave {

struct RouterFitSpec {
  double ridge = 0.01;  ///< penalty, relative to the mean diagonal of X^T X
};

/// Fits a linear, bias-free router without gradients: ridge regression of every expert's output
/// norm |expert_e(x)| on the layer's input x, streamed over calibration tokens. The K largest
/// predictions are then the experts that matter most for the token.
///
/// Holds D*D + D*E doubles, however many tokens come. The first token of a window is often an
/// attention sink whose norm drowns all others; the caller leaves it out.
/// Source: MoEfication, arXiv:2110.01786 (predicting expert contribution); D2DMoE,
/// arXiv:2310.04361 (regressing the output norm).
class RouterFit {
 public:
  RouterFit(std::int64_t d_model, std::int64_t num_experts);
  RouterFit(RouterFit&&) noexcept;
  RouterFit& operator=(RouterFit&&) noexcept;
  ~RouterFit();

  /// Adds tokens. input [T, D], target [T, E].
  /// @throws InvalidArgument  shapes disagree or a value is not finite (names the token)
  void observe(MatrixView<const float> input, MatrixView<const float> target);
  std::int64_t num_tokens() const;

  /// @throws InvalidArgument  no token was observed
  LinearRouter solve(const RouterFitSpec& spec = {}) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// |expert_e(x[t])| for every expert and token, what RouterFit regresses on.
///   x [T, D]   norms [T, E], written
void expert_output_norms(const ExpertBank& bank, MatrixView<const float> x, MatrixView<float> norms,
                         const ParallelFor& parallel);

struct RouterTrainSpec {
  std::int64_t steps = 300;  ///< of Adam
  std::int64_t batch = 512;  ///< tokens a step, drawn with replacement
  double rate = 3e-3;        ///< falls to 0 linearly; logits have standard deviation 1
  double temperature = 0.3;  ///< how soft the border between chosen and not is, in logits
  std::uint64_t seed = 0;
};

/// Improves a linear router without the model's gradients: ascends the gain that its K experts
/// collect,
///   sum over t, e of (gain[t,e] - g_t) * sigmoid((logit[t,e] - z_t) / temperature),
/// where z_t and g_t are the borders between the K-th and the next logit and gain of token t. Only
/// experts near the border move it, by what a wrong choice there costs; ridge regression spends
/// itself on all of them alike. The result's logits have a standard deviation of about 1.
///
/// @param x      [T, D] the layer's inputs
/// @param gain   [T, E] what a token wins by an expert (its energy, say), weights included
/// @param start  where it starts from: RouterFit::solve()'s, say
/// @throws InvalidArgument  shapes disagree, K outside [1, E], no token, or a value not finite
/// Source: docs/methods/conversion.md; the aim is D2DMoE's (arXiv:2310.04361), the border ours.
LinearRouter train_router(MatrixView<const float> x, MatrixView<const float> gain,
                          std::int64_t experts_per_token, const LinearRouter& start,
                          const RouterTrainSpec& spec, const ParallelFor& parallel);

/// The same descent on a cost-weighted logistic loss, whose labels are the oracle's sets:
///   sum over t, e of |gain[t,e] - g_t| log(1 + exp(-s[t,e] (logit[t,e] - z_t) / temperature)),
/// s = 1 for the K experts of largest gain and -1 for the others; what a wrong choice costs weighs
/// it. z_t, the token's own border, stands in for a bias: only the order of a token's logits
/// matters, so none is needed. Unlike train_router() it keeps pulling at experts far on the wrong
/// side.
/// Parameters and errors as train_router().
/// Source: cost-sensitive logistic regression, e.g. Elkan 2001; on oracle sets cf. DejaVu,
/// arXiv:2310.17157, whose predictors are trained on who is active.
LinearRouter logistic_router(MatrixView<const float> x, MatrixView<const float> gain,
                             std::int64_t experts_per_token, const LinearRouter& start,
                             const RouterTrainSpec& spec, const ParallelFor& parallel);

/// The router of rank R whose logits are nearest to the given one's over the tokens of x: with
/// Z = X W^T and V [E, R] the R largest eigenvectors of Z^T Z, W_R = V V^T W, stored as one
/// matrix. Of the ridge solution it is reduced-rank regression: fewer numbers to learn, R (D + E)
/// in place of D E.
///   x [T, D]   router W [E, D]
/// @throws InvalidArgument  shapes disagree, no token, R outside [1, E], a logit not finite
/// Source: Izenman 1975; with a penalty, Mukherjee and Zhu 2011 (whose projection also counts the
/// penalty's rows; ours counts tokens alone).
LinearRouter low_rank_router(MatrixView<const float> x, const LinearRouter& router,
                             std::int64_t rank, const ParallelFor& parallel);

/// Row e = mean of the rows of `gate` (of `up` where there is no gate) of expert e's neurons: an
/// expert is chosen where its gates are open on average. Needs no text.
/// @throws InvalidArgument  sizes disagree, or an expert has no neuron
/// Source: ExpertWeaver, arXiv:2602.15521.
LinearRouter mean_gate_router(const FfnView& ffn, const NeuronPartition& partition);

/// Row e = the gate row (up row without a gate) of one neuron that stands for expert e; see
/// representative_neurons(). CMoE scores an expert by that neuron's |act(g x) (u x)|, which is not
/// linear and which no stock class computes; this is the linear part, its gate.
///   representative [E], neurons
/// @throws InvalidArgument  no neuron, or one outside [0, H)
/// Source: CMoE, arXiv:2502.04416, section 4.2.
LinearRouter representative_router(const FfnView& ffn,
                                   std::span<const std::int32_t> representative);

/// How the router of a conversion to a budget is made. docs/methods/routers.md
enum class RouterMethod {
  kTrained,         ///< train_router() on the experts' energies
  kRidge,           ///< ridge regression on their amplitudes
  kLogistic,        ///< logistic_router() on the oracle's sets
  kLowRank,         ///< low_rank_router() of the ridge solution
  kMeanGate,        ///< mean_gate_router()
  kRepresentative,  ///< representative_router()
};

/// "trained", "ridge", "logistic", "low-rank", "mean-gate", "representative".
const char* router_method_name(RouterMethod method);
/// Empty optional for anything else.
std::optional<RouterMethod> parse_router_method(const std::string& name);

/// A router of independent normal entries (mean 0, given standard deviation), as FactorLLM starts.
LinearRouter random_router(std::int64_t num_experts, std::int64_t d_model, std::uint64_t seed,
                           double std_dev = 0.02);

/// All logits 0: every expert weighs the same. With K = E the layer is then exactly the dense FFN.
LinearRouter zero_router(std::int64_t num_experts, std::int64_t d_model);

}  // namespace cleave
