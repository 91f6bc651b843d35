#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace cleave::train {

/// Which experts a frozen dense FFN would choose: the prior of the prior-approximate loss.
enum class LabelKind {
  kPerExpert,   ///< each expert alone against the teacher: the K smallest errors (the release)
  kExhaustive,  ///< the K-subset whose weighted sum is closest to the teacher, over all C(E, K)
};

/// How the router is pulled towards that prior.
enum class PaForm {
  kRouterFirst,   ///< KL(p || q), p the router, q the target: the authors' code
  kTargetFirst,   ///< KL(q || p)
  kCrossEntropy,  ///< -sum q log p (kTargetFirst up to a constant; differs in its value)
};

/// K-hot labels, one row a token.
///
///   outputs  [T, E, D]  every expert's output on the token, without gate weight or scale
///   teacher  [T, D]     the frozen dense FFN's output on the same input (without down_bias)
///   alpha               what the sum of the chosen outputs is multiplied by before it is compared
///                       (kExhaustive); kPerExpert compares o_e with teacher / (E / K), real
///                       division
///   returns  [T, E]     0 or 1, K ones a row, no gradient
///
/// kExhaustive uses |alpha sum_S o - t|^2 = alpha^2 sum_{i,j in S} G_ij - 2 alpha sum_{i in S} c_i
/// + |t|^2, with G the Gram matrix of a token's expert outputs and c_i = o_i . t.
/// @throws InvalidArgument  shapes, K outside [1, E], or C(E, K) > 20000 with kExhaustive
/// Source: FactorLLM, arXiv:2408.11855; the exhaustive variant is the release's `get_label`.
at::Tensor prior_labels(const at::Tensor& outputs, const at::Tensor& teacher, std::int64_t k,
                        LabelKind kind, double alpha);

/// softmax of the K-hot labels: the soft target q [T, E] of the release (E = 4, K = 2:
/// .3655/.1345).
at::Tensor prior_allocation(const at::Tensor& labels);

/// Prior-approximate loss: pulls the router towards the experts a frozen dense FFN would choose.
///
///   router_logits  [T, E]  gradient flows here
///   target         [T, E]  rows sum to 1, no gradient; from prior_allocation()
///   mask           [T]     bool, true where the token counts; undefined: all
///   returns        scalar, mean over counted tokens; 0 (with a gradient graph) when none counts
///
/// Source: FactorLLM, arXiv:2408.11855.
at::Tensor prior_approximate_loss(const at::Tensor& router_logits, const at::Tensor& target,
                                  PaForm form, const at::Tensor& mask = {});

enum class BalanceKind {
  kSwitch,  ///< E sum_e f_e P_e, f the share of (token, slot) pairs, P the mean probability;
            ///< 1 when even. Switch Transformer, arXiv:2101.03961 eq. 4, over top-K
  kPaper,   ///< mean(mask * softmax): the released FactorLLM code
};

/// Load-balance loss of one layer.
///   router_logits [T, E]   ids int64 [T, K] the selected experts   mask [T] bool or undefined
at::Tensor balance_loss(const at::Tensor& router_logits, const at::Tensor& ids, BalanceKind kind,
                        const at::Tensor& mask = {});

/// Pulls a router towards the K experts of most energy, by what a wrong choice costs: minus the
/// mean over tokens of sum_e (g_e - g_border) sigmoid((z_e - z_border) / (temperature * spread)),
/// with g the token's energies as shares of their sum, and the borders halfway between its K-th and
/// next share and logit. What train_router (cleave/fit_router.h) ascends, as a loss.
///   router_logits [T, E]   gradient flows here
///   energy        [T, E]   what a token wins by an expert, no gradient: MoeOutputs::energy
/// @throws InvalidArgument  shapes, K outside [1, E], temperature not above 0
at::Tensor router_supervision_loss(const at::Tensor& router_logits, const at::Tensor& energy,
                                   std::int64_t k, double temperature);

/// Mean negative log-likelihood of the next token, in nats.
///   logits [N, V]   targets int64 [N]; -100 marks positions that do not count
at::Tensor language_model_loss(const at::Tensor& logits, const at::Tensor& targets);

/// Mean over positions of KL(teacher || student) over the vocabulary, in nats. Both [N, V]; no
/// gradient into the teacher. Holds one more [N, V], of the student's type: its gradient.
at::Tensor logit_kl(const at::Tensor& student_logits, const at::Tensor& teacher_logits);

}  // namespace cleave::train
