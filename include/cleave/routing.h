#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/views.h"

namespace cleave {

/// How router logits become the weights of the selected experts. Selection is always by the largest
/// logits, ties to the lower id.
enum class GateMode {
  kSoftmax,  ///< softmax over the selected logits (sums to 1); what stock MoE classes compute
  kHard,     ///< 1 for each selected expert: FactorLLM's mask (arXiv:2408.11855)
};

/// "softmax", "hard".
const char* gate_mode_name(GateMode mode);

/// How a token's experts are chosen and weighed.
struct RouteSpec {
  std::int64_t experts_per_token = 1;  ///< K: as many, or at most so many with a threshold
  GateMode mode = GateMode::kSoftmax;
  /// In [0, 1]: of the K largest, only experts with p_e >= threshold * p_max are used, where p is
  /// the softmax over all E experts, so that p_e / p_max = exp(logit_e - logit_max). The largest
  /// always is; 0 keeps all K; 1 only those that tie with it. D2DMoE's rule (arXiv:2310.04361).
  float threshold = 0.0f;
  /// kSoftmax: whether the weights of the experts in use sum to 1. false: they are the p_e
  /// themselves, as in stock classes without `norm_topk_prob`.
  bool normalise = true;
};

/// Which experts each token goes to, and with what weight.
struct Routing {
  /// In place of an id: this slot of the token is not in use. Its weight is 0.
  static constexpr std::int32_t kUnused = -1;

  std::int64_t num_tokens = 0;         ///< T
  std::int64_t experts_per_token = 0;  ///< K
  std::vector<std::int32_t> ids;       ///< [T, K], distinct within a token, by falling logit
  std::vector<float> weights;          ///< [T, K]
};

/// A routing that somebody else owns.
struct RoutingView {
  std::int64_t num_tokens = 0;         ///< T
  std::int64_t experts_per_token = 0;  ///< K
  const std::int32_t* ids = nullptr;   ///< [T, K], distinct within a token
  const float* weights = nullptr;      ///< [T, K]
};

/// A linear, bias-free router: logits = W x. (A bias is not representable in most export targets.)
struct LinearRouter {
  std::int64_t num_experts = 0;  ///< E
  std::int64_t d_model = 0;      ///< D
  std::vector<float> weight;     ///< [E, D]
  MatrixView<const float> view() const { return {weight.data(), num_experts, d_model}; }
};

}  // namespace cleave
