#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "cleave/train/losses.h"
#include "train/require.h"
#include "train/tensor_text.h"

namespace cleave::train {
namespace {

constexpr std::int64_t kMaxSubsets = 20000;
// Subsets are scored in blocks whose pair matrix [block, E * E] holds at most so many doubles.
constexpr std::int64_t kPairBlock = std::int64_t{1} << 21;

/// C(n, k), or limit + 1 where it is larger than `limit`.
std::int64_t subset_count(std::int64_t n, std::int64_t k, std::int64_t limit) {
  k = std::min(k, n - k);
  std::int64_t count = 1;
  for (std::int64_t i = 1; i <= k; ++i) {
    count = count * (n - k + i) / i;  // exact: a product of i successive numbers
    if (count > limit) return limit + 1;
  }
  return count;
}

/// Every K-subset of E experts as a row of zeros and ones, in lexicographic order: [C(E, K), E].
at::Tensor all_subsets(std::int64_t num_experts, std::int64_t k, std::int64_t count) {
  at::Tensor subsets = at::zeros({count, num_experts}, at::kDouble);
  auto cells = subsets.accessor<double, 2>();
  std::vector<std::int64_t> chosen(k);
  std::iota(chosen.begin(), chosen.end(), 0);
  for (std::int64_t s = 0; s < count; ++s) {
    for (const std::int64_t e : chosen) cells[s][e] = 1.0;
    std::int64_t i = k - 1;
    while (i >= 0 && chosen[i] == num_experts - k + i) --i;
    if (i < 0) break;
    ++chosen[i];
    for (std::int64_t j = i + 1; j < k; ++j) chosen[j] = chosen[j - 1] + 1;
  }
  return subsets;
}

/// FactorLLM's released rule: each expert alone against teacher / (E / K), the K smallest errors.
/// Real division: the release's N // K gives 1 for E = 4, K = 3 instead of 4/3. Ties: lower id.
at::Tensor per_expert_labels(const at::Tensor& outputs, const at::Tensor& teacher, std::int64_t k) {
  const double ratio = static_cast<double>(outputs.size(1)) / static_cast<double>(k);
  const at::Tensor error = (outputs - (teacher / ratio).unsqueeze(1)).square().mean(2);
  const at::Tensor order =
      std::get<1>(error.sort(/*stable=*/true, /*dim=*/1, /*descending=*/false));
  return at::zeros_like(error).scatter_(1, order.narrow(1, 0, k), 1.0);
}

/// The subset with the smallest |alpha sum_S o - t|^2. |t|^2 is common to all and left out; the
/// sum over pairs in S is one matrix product of the flattened Gram matrix with the subsets' pairs.
at::Tensor exhaustive_labels(const at::Tensor& outputs, const at::Tensor& teacher, std::int64_t k,
                             double alpha, std::int64_t count) {
  const std::int64_t tokens = outputs.size(0), num_experts = outputs.size(1);
  const at::Tensor gram = outputs.bmm(outputs.transpose(1, 2)).to(at::kDouble);  // [T, E, E]
  const at::Tensor cross = outputs.bmm(teacher.unsqueeze(2)).squeeze(2).to(at::kDouble);  // [T, E]
  const at::Tensor pairs_gram = gram.reshape({tokens, num_experts * num_experts});
  const at::Tensor subsets = all_subsets(num_experts, k, count).to(outputs.device());
  const std::int64_t block = std::max<std::int64_t>(1, kPairBlock / (num_experts * num_experts));

  at::Tensor best_cost, best;
  for (std::int64_t begin = 0; begin < count; begin += block) {
    const at::Tensor part = subsets.narrow(0, begin, std::min(block, count - begin));
    const at::Tensor pairs =
        (part.unsqueeze(2) * part.unsqueeze(1)).reshape({part.size(0), num_experts * num_experts});
    const at::Tensor cost =
        alpha * alpha * pairs_gram.mm(pairs.t()) - 2.0 * alpha * cross.mm(part.t());
    auto [low, at_low] = cost.min(1);
    at_low = at_low + begin;
    if (best.defined()) {
      const at::Tensor better = low < best_cost;
      best = at::where(better, at_low, best);
      best_cost = at::where(better, low, best_cost);
    } else {
      best = at_low;
      best_cost = low;
    }
  }
  return subsets.index_select(0, best).to(outputs.scalar_type());
}

}  // namespace

at::Tensor prior_labels(const at::Tensor& outputs, const at::Tensor& teacher, std::int64_t k,
                        LabelKind kind, double alpha) {
  require(outputs.defined() && outputs.dim() == 3 && teacher.defined() && teacher.dim() == 2 &&
              teacher.size(0) == outputs.size(0) && teacher.size(1) == outputs.size(2),
          "prior_labels: outputs is {} and teacher is {}; expected [T, E, D] and [T, D]",
          shape_text(outputs), shape_text(teacher));
  const std::int64_t num_experts = outputs.size(1);
  require(k >= 1 && k <= num_experts, "prior_labels: K = {}; expected 1 to E = {}", k, num_experts);
  const at::NoGradGuard no_grad;
  const auto type = outputs.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor o = outputs.detach().to(type), t = teacher.detach().to(type);
  if (kind == LabelKind::kPerExpert) return per_expert_labels(o, t, k);
  const std::int64_t count = subset_count(num_experts, k, kMaxSubsets);
  require(count <= kMaxSubsets,
          "prior_labels: more than {} subsets of {} out of {} experts; use "
          "LabelKind::kPerExpert",
          kMaxSubsets, k, num_experts);
  if (outputs.size(0) == 0) return at::zeros({0, num_experts}, o.options());
  return exhaustive_labels(o, t, k, alpha, count);
}

at::Tensor prior_allocation(const at::Tensor& labels) {
  require(labels.defined() && labels.dim() == 2 && labels.is_floating_point(),
          "prior_allocation: labels is {}; expected [T, E], 0 or 1", shape_text(labels));
  return labels.detach().softmax(-1);
}

}  // namespace cleave::train
