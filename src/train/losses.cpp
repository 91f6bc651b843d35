#include "cleave/train/losses.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "train/require.h"
#include "train/soft_border.h"
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

/// Sum over rows of KL(softmax(teacher) || softmax(student)). `gradient`, where defined, receives
/// (softmax(student) - softmax(teacher)) * share.
double kl_of_rows(const at::Tensor& student, const at::Tensor& teacher, double share,
                  const at::Tensor& gradient) {
  const auto shifted = [](const at::Tensor& logits) {
    const at::Tensor wide = at_least_float(logits);
    return wide - wide.amax(-1, /*keepdim=*/true);
  };
  const at::Tensor s = shifted(student), t = shifted(teacher);
  at::Tensor p = s.exp(), q = t.exp();
  const at::Tensor p_sum = p.sum(-1, /*keepdim=*/true), q_sum = q.sum(-1, /*keepdim=*/true);
  q.div_(q_sum);
  // log q - log p = t - s - log(q_sum / p_sum), and the q of a row sum to 1.
  const double sum = (q * (t - s)).sum(at::kDouble).item<double>() +
                     (p_sum.log() - q_sum.log()).sum(at::kDouble).item<double>();
  if (gradient.defined()) at::Tensor(gradient).copy_(p.div_(p_sum).sub_(q).mul_(share));
  return sum;
}

/// Over a vocabulary of 50 000, [N, V] is hundreds of megabytes, and plain autograd keeps four of
/// them. Here a few rows at a time stay in the cache, and what is kept is the gradient alone.
class LogitKl : public torch::autograd::Function<LogitKl> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& student,
                            const at::Tensor& teacher, bool with_gradient) {
    constexpr std::int64_t kElements = std::int64_t{1} << 18;  // five of their kind: 5 MB
    const std::int64_t rows = student.size(0), width = std::max<std::int64_t>(1, student.size(1));
    const std::int64_t chunk =
        std::max<std::int64_t>(1, student.is_cpu() ? kElements / width : rows);
    const std::int64_t chunks = (rows + chunk - 1) / chunk;
    const double share = 1.0 / static_cast<double>(std::max<std::int64_t>(1, rows));
    const at::Tensor gradient = with_gradient ? at::empty_like(student) : at::Tensor();
    std::vector<double> sums(static_cast<std::size_t>(chunks));  // added in order: repeatable
    at::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
      const at::NoGradGuard no_grad;  // of this thread
      for (std::int64_t c = begin; c < end; ++c) {
        const auto part = [first = c * chunk, count = std::min(chunk, rows - c * chunk)](
                              const at::Tensor& all) { return all.narrow(0, first, count); };
        sums[static_cast<std::size_t>(c)] = kl_of_rows(
            part(student), part(teacher), share, with_gradient ? part(gradient) : at::Tensor());
      }
    });
    if (with_gradient) ctx->save_for_backward({gradient});
    const auto type = student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
    return at::scalar_tensor(sum * share, student.options().dtype(type).requires_grad(false));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor gradient = ctx->get_saved_variables().front();
    return {gradient * grads[0].to(gradient.scalar_type()), at::Tensor(), at::Tensor()};
  }
};

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

at::Tensor router_supervision_loss(const at::Tensor& router_logits, const at::Tensor& energy,
                                   std::int64_t k, double temperature) {
  require_matrix("router_supervision_loss", "router_logits", router_logits);
  require(energy.defined() && energy.sizes() == router_logits.sizes(),
          "router_supervision_loss: energy is {} but router_logits is {}; expected equal shapes",
          shape_text(energy), shape_text(router_logits));
  require(k >= 1 && k <= router_logits.size(1) && temperature > 0.0,
          "router_supervision_loss: K = {}, temperature {}; expected 1 to {} and above 0", k,
          temperature, router_logits.size(1));
  const at::Tensor logits = at_least_float(router_logits);
  if (k == logits.size(1)) return logits.sum() * 0.0;  // nothing to choose
  const at::Tensor gain = energy.detach().to(logits.options().requires_grad(false));
  const at::Tensor share = gain / gain.sum(1, /*keepdim=*/true).clamp_min(1e-30);
  const at::Tensor advantage = share - row_border(share, k);
  return -(advantage * soft_choice(logits, k, temperature)).sum(1).mean();
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
  const bool with_gradient = at::GradMode::is_enabled() && student_logits.requires_grad();
  return LogitKl::apply(student_logits, teacher_logits.detach(), with_gradient);
}

}  // namespace cleave::train
