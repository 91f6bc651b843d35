#include "hook.h"

#include <llama-graph.h>  // of llama.cpp's sources; no public header

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace {

// What two sums in another order may differ by, as a share of the sum of |terms|: n terms lose n
// epsilon each; a dot product over D, twice, their product, a sum over the active neurons. 1.15
// bounds the slope of SiLU, 16 the single products and the few ulp of an exponential.
double allowed_share(std::int64_t D, std::int64_t neurons) {
  return 2.0 * 1.15 * static_cast<double>(2 * D + neurons + 16) *
         std::numeric_limits<float>::epsilon();
}

struct Beside {
  FfnHook* hook;
  std::int64_t layer;
};

// y = theirs; and how far ours is from it. Sources: theirs, ours, x, router logits if any.
void compare(ggml_tensor* y, int ith, int /*nth*/, void* userdata) {
  if (ith != 0) return;
  const auto& [hook, layer] = *static_cast<const Beside*>(userdata);
  const auto* theirs = static_cast<const float*>(y->src[0]->data);
  const auto* ours = static_cast<const float*>(y->src[1]->data);
  const std::int64_t T = y->ne[1], D = y->ne[0];
  std::copy_n(theirs, T * D, static_cast<float*>(y->data));
  cleave::Routing routing;
  (*hook->ops)[layer].route(y->src[3], T, routing);
  const cleave::ExpertBank& bank = (*hook->banks)[layer];
  std::vector<float> exact(T * D), terms(T * D);
  cleave::moe_ffn_reference(bank, routing, 1.0f, {static_cast<float*>(y->src[2]->data), T, D},
                            {exact.data(), T, D}, {terms.data(), T, D});
  const double share = allowed_share(D, routing.experts_per_token * bank.width(0));
  for (std::int64_t i = 0; i < T * D; ++i) {
    const double difference = std::abs(static_cast<double>(theirs[i]) - ours[i]);
    if (difference == 0.0) continue;
    const double of_allowed = difference / (share * terms[i]);
    // A NaN must not pass as the smaller of two.
    hook->worst.share = std::isnan(of_allowed) ? std::numeric_limits<double>::infinity()
                                               : std::max(hook->worst.share, of_allowed);
    hook->worst.difference = std::max(hook->worst.difference, difference);
  }
  hook->worst.outputs += T * D;
}

bool is_ours(llm_ffn_op_type activation) {
  return active_hook != nullptr && activation == LLM_FFN_SILU;
}

/// Our node for layer `il`; with kCompare, `build_theirs` beside it.
template <typename Build>
ggml_tensor* build(const llm_graph_context& graph, ggml_tensor* x, ggml_tensor* logits, int il,
                   const Build& build_theirs) {
  FfnHook& hook = *active_hook;
  ++hook.nodes;
  ggml_tensor* ours = (*hook.ops)[il].add(graph.ctx0, x, logits);
  if (hook.mode == FfnHook::Mode::kCleave) return ours;
  // Graphs are built rarely and their nodes live as long as the program.
  static std::vector<std::unique_ptr<Beside>> comparisons;
  comparisons.push_back(std::make_unique<Beside>(Beside{&hook, il}));
  ggml_tensor* operands[] = {build_theirs(), ours, x, logits};
  return ggml_custom_4d(graph.ctx0, GGML_TYPE_F32, x->ne[0], x->ne[1], 1, 1, operands,
                        logits != nullptr ? 4 : 3, &compare, 1, comparisons.back().get());
}

}  // namespace

// llm_graph_context::build_ffn and the shorter build_moe_ffn, under the names that the linker knows
// them by (CMakeLists.txt). Another version of llama.cpp may have other parameters: then those
// names do not exist, and nothing links.
using Tensor = ggml_tensor*;
Tensor own_build_ffn(const llm_graph_context* graph, Tensor x, Tensor up, Tensor up_bias,
                     Tensor up_scale, Tensor gate, Tensor gate_bias, Tensor gate_scale, Tensor down,
                     Tensor down_bias, Tensor down_scale, Tensor act_scales,
                     llm_ffn_op_type activation, llm_ffn_gate_type kind,
                     int il) asm("__real_" BUILD_FFN);
Tensor hooked_build_ffn(const llm_graph_context* graph, Tensor x, Tensor up, Tensor up_bias,
                        Tensor up_scale, Tensor gate, Tensor gate_bias, Tensor gate_scale,
                        Tensor down, Tensor down_bias, Tensor down_scale, Tensor act_scales,
                        llm_ffn_op_type activation, llm_ffn_gate_type kind,
                        int il) asm("__wrap_" BUILD_FFN);
Tensor own_build_moe_ffn(const llm_graph_context* graph, Tensor x, Tensor router, Tensor up,
                         Tensor gate, Tensor down, Tensor probs_bias, std::int64_t E,
                         std::int64_t K, llm_ffn_op_type activation, bool normed, float scale,
                         llama_expert_gating_func_type gating, int il, Tensor probs, Tensor gate_up,
                         Tensor up_scale, Tensor gate_scale, Tensor down_scale,
                         Tensor selected) asm("__real_" BUILD_MOE_FFN);
Tensor hooked_build_moe_ffn(const llm_graph_context* graph, Tensor x, Tensor router, Tensor up,
                            Tensor gate, Tensor down, Tensor probs_bias, std::int64_t E,
                            std::int64_t K, llm_ffn_op_type activation, bool normed, float scale,
                            llama_expert_gating_func_type gating, int il, Tensor probs,
                            Tensor gate_up, Tensor up_scale, Tensor gate_scale, Tensor down_scale,
                            Tensor selected) asm("__wrap_" BUILD_MOE_FFN);

Tensor hooked_build_ffn(const llm_graph_context* graph, Tensor x, Tensor up, Tensor up_bias,
                        Tensor up_scale, Tensor gate, Tensor gate_bias, Tensor gate_scale,
                        Tensor down, Tensor down_bias, Tensor down_scale, Tensor act_scales,
                        llm_ffn_op_type activation, llm_ffn_gate_type kind, int il) {
  const auto theirs = [&] {
    return own_build_ffn(graph, x, up, up_bias, up_scale, gate, gate_bias, gate_scale, down,
                         down_bias, down_scale, act_scales, activation, kind, il);
  };
  const bool plain = kind == LLM_FFN_PAR && up_bias == nullptr && gate_bias == nullptr &&
                     down_bias == nullptr && act_scales == nullptr;
  if (!is_ours(activation) || !plain) return theirs();
  return build(*graph, x, nullptr, il, theirs);
}

Tensor hooked_build_moe_ffn(const llm_graph_context* graph, Tensor x, Tensor router, Tensor up,
                            Tensor gate, Tensor down, Tensor probs_bias, std::int64_t E,
                            std::int64_t K, llm_ffn_op_type activation, bool normed, float scale,
                            llama_expert_gating_func_type gating, int il, Tensor probs,
                            Tensor gate_up, Tensor up_scale, Tensor gate_scale, Tensor down_scale,
                            Tensor selected) {
  const auto theirs = [&] {
    return own_build_moe_ffn(graph, x, router, up, gate, down, probs_bias, E, K, activation, normed,
                             scale, gating, il, probs, gate_up, up_scale, gate_scale, down_scale,
                             selected);
  };
  // A softmax over the selected logits, which is what Mixtral routes by.
  const bool plain = gating == LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX && normed &&
                     (scale == 0.0f || scale == 1.0f) && probs == nullptr &&
                     probs_bias == nullptr && gate_up == nullptr && selected == nullptr;
  if (!is_ours(activation) || !plain) return theirs();
  return build(*graph, x, graph->build_lora_mm(router, x), il, theirs);
}
