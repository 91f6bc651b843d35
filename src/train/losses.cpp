#include "cleave/train/losses.h"

#include <ATen/ATen.h>

#include "train/require.h"
#include "train/tensor_text.h"

namespace cleave::train {
namespace {

// The released code clips both sides of its KL to this; ours clips the target alone, so that a
// target with a zero (a K-hot one, say) costs much instead of infinitely much.
constexpr double kSmallestProbability = 1e-7;

/// Half precision has too few bits for a softmax that is summed over thousands of tokens.
at::Tensor at_least_float(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
}

void require_matrix(const char* function, const char* name, const at::Tensor& t) {
  require(t.defined() && t.dim() == 2 && t.is_floating_point(),
          "{}: {} is {}; expected a floating-point matrix", function, name, shape_text(t));
}

/// The rows that count. Selecting them, rather than multiplying by zero, keeps a NaN in a row that
/// does not count out of the value and out of the gradient.
at::Tensor counted_rows(const char* function, const at::Tensor& rows, const at::Tensor& mask) {
  if (!mask.defined()) return rows;
  require(mask.dim() == 1 && mask.size(0) == rows.size(0) && mask.scalar_type() == at::kBool,
          "{}: mask is {} of {}; expected bool [{}], true where the token counts", function,
          shape_text(mask), c10::toString(mask.scalar_type()), rows.size(0));
  return rows.index_select(0, mask.nonzero().squeeze(1));
}

/// Sum over experts of a * (log a - log b), with 0 log 0 = 0.
at::Tensor divergence(const at::Tensor& a, const at::Tensor& log_a, const at::Tensor& log_b) {
  return (a * (log_a - log_b)).sum(-1);
}

at::Tensor per_token_loss(const at::Tensor& log_p, const at::Tensor& q, PaForm form) {
  if (form == PaForm::kCrossEntropy) return -(q * log_p).sum(-1);
  const at::Tensor log_q = q.clamp_min(kSmallestProbability).log();
  if (form == PaForm::kTargetFirst) return divergence(q, log_q, log_p);
  return divergence(log_p.exp(), log_p, log_q);
}

}  // namespace

at::Tensor prior_approximate_loss(const at::Tensor& router_logits, const at::Tensor& target,
                                  PaForm form, const at::Tensor& mask) {
  require_matrix("prior_approximate_loss", "router_logits", router_logits);
  require(target.defined() && target.sizes() == router_logits.sizes(),
          "prior_approximate_loss: target is {} but router_logits is {}; expected equal shapes",
          shape_text(target), shape_text(router_logits));
  const at::Tensor logits =
      at_least_float(counted_rows("prior_approximate_loss", router_logits, mask));
  if (logits.size(0) == 0) return logits.sum();  // zero, with a graph
  const at::Tensor q = counted_rows("prior_approximate_loss", target, mask)
                           .detach()
                           .to(logits.options().requires_grad(false));
  return per_token_loss(logits.log_softmax(-1), q, form).mean();
}

at::Tensor balance_loss(const at::Tensor& router_logits, const at::Tensor& ids, BalanceKind kind,
                        const at::Tensor& mask) {
  require_matrix("balance_loss", "router_logits", router_logits);
  require(ids.defined() && ids.dim() == 2 && ids.size(0) == router_logits.size(0) &&
              ids.scalar_type() == at::kLong,
          "balance_loss: ids is {}; expected int64 [{}, K]", shape_text(ids),
          router_logits.size(0));
  const at::Tensor logits = at_least_float(counted_rows("balance_loss", router_logits, mask));
  if (logits.size(0) == 0) return logits.sum();
  const at::Tensor chosen = counted_rows("balance_loss", ids, mask);
  const at::Tensor p = logits.softmax(-1);
  const at::Tensor selected = at::zeros_like(p).scatter(1, chosen, 1.0);  // no gradient: 0 or 1
  if (kind == BalanceKind::kPaper) return (selected * p).mean();
  const auto num_experts = static_cast<double>(p.size(1));
  const at::Tensor share = selected.mean(0) / static_cast<double>(chosen.size(1));  // f_e
  return num_experts * (share * p.mean(0)).sum();
}

at::Tensor language_model_loss(const at::Tensor& logits, const at::Tensor& targets) {
  constexpr std::int64_t kIgnored = -100;
  require_matrix("language_model_loss", "logits", logits);
  require(targets.defined() && targets.dim() == 1 && targets.size(0) == logits.size(0) &&
              targets.scalar_type() == at::kLong,
          "language_model_loss: targets is {}; expected int64 [{}]", shape_text(targets),
          logits.size(0));
  // Sum and count apart: the built-in mean is NaN where nothing counts.
  const at::Tensor sum =
      at::cross_entropy_loss(at_least_float(logits), targets, {}, at::Reduction::Sum, kIgnored);
  return sum / targets.ne(kIgnored).sum().clamp_min(1);
}

at::Tensor logit_kl(const at::Tensor& student_logits, const at::Tensor& teacher_logits) {
  require_matrix("logit_kl", "student_logits", student_logits);
  require(teacher_logits.defined() && teacher_logits.sizes() == student_logits.sizes(),
          "logit_kl: teacher_logits is {} but student_logits is {}; expected equal shapes",
          shape_text(teacher_logits), shape_text(student_logits));
  const at::Tensor log_p = at_least_float(student_logits).log_softmax(-1);
  const at::Tensor log_q = at_least_float(teacher_logits).detach().log_softmax(-1);
  const auto rows = static_cast<double>(std::max<std::int64_t>(1, log_p.size(0)));
  return at::kl_div(log_p, log_q, at::Reduction::Sum, /*log_target=*/true) / rows;
}

}  // namespace cleave::train
