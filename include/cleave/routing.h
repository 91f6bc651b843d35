#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/views.h"

namespace cleave {

/// How router logits become the weights of the K selected experts. Selection is always the K
/// largest logits, ties to the lower id.
enum class GateMode {
  kSoftmax,  ///< softmax over the selected logits (sums to 1); what stock MoE classes compute
  kHard,     ///< 1 for each selected expert: FactorLLM's mask (arXiv:2408.11855)
};

/// "softmax", "hard".
const char* gate_mode_name(GateMode mode);

/// Which experts each token goes to, and with what weight.
struct Routing {
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
