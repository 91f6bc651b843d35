#include <ATen/ATen.h>
#include <fmt/format.h>

#include <string_view>

#include "cleave/train/recipes.h"
#include "train/recipes/common.h"
#include "train/require.h"

// Which weights of a layer learn, by name.
namespace cleave::train {
namespace {

constexpr std::pair<const char*, bool DistillParts::*> kPartNames[] = {
    {"router", &DistillParts::router},
    {"experts", &DistillParts::experts},
    {"shared", &DistillParts::shared},
    {"norms", &DistillParts::norms},
    {"attention", &DistillParts::attention}};

}  // namespace

DistillParts parse_distill_parts(const std::string& text) {
  DistillParts parts{false, false, false, false, false};
  std::string_view rest = text;
  while (true) {
    const std::string_view word = rest.substr(0, rest.find(','));
    bool known = false;
    for (const auto& [name, member] : kPartNames) {
      const bool ffn = member != &DistillParts::norms && member != &DistillParts::attention;
      if (word != name && !(word == "ffn" && ffn)) continue;
      parts.*member = true;
      known = true;
    }
    require(known, "distill: '{}' is none of ffn, router, experts, shared, norms, attention", word);
    if (word.size() == rest.size()) return parts;
    rest.remove_prefix(word.size() + 1);
  }
}

std::vector<std::string> part_names(const DistillParts& parts) {
  std::vector<std::string> names;
  for (const auto& [name, member] : kPartNames)
    if (parts.*member) names.emplace_back(name);
  return names;
}

void collect_layer_parameters(const DistillParts& parts, std::int64_t index,
                              const DecoderLayer& layer, std::vector<Parameter>& all) {
  const std::string prefix = fmt::format("layers.{}.", index);
  const auto add = [&](bool wanted, const char* name, const at::Tensor& tensor, bool decay,
                       const char* hint = "no loss reaches it; give distill_weight above 0") {
    if (wanted && tensor.defined()) all.push_back({prefix + name, tensor, decay, hint});
  };
  add(parts.norms, "input_norm", layer.input_norm, false);
  add(parts.norms, "post_attention_norm", layer.post_attention_norm, false);
  add(parts.attention, "q", layer.q, true);
  add(parts.attention, "k", layer.k, true);
  add(parts.attention, "v", layer.v, true);
  add(parts.attention, "o", layer.o, true);
  if (layer.moe.is_empty()) return;
  const MoeFfnImpl& moe = *layer.moe;
  add(parts.router && moe.spec.experts_per_token < moe.spec.num_experts, "router", moe.w_router,
      false,
      "with a hard gate it learns from router_weight above 0 or the soft border, with a softmax "
      "gate and K = 1 from router_weight alone");
  add(parts.experts, "experts.gate", moe.w_gate, true);
  add(parts.experts, "experts.up", moe.w_up, true);
  add(parts.experts, "experts.down", moe.w_down, true);
  if (moe.shared.is_empty()) return;
  add(parts.shared, "shared.gate", moe.shared->gate, true);
  add(parts.shared, "shared.up", moe.shared->up, true);
  add(parts.shared, "shared.down", moe.shared->down, true);
}

void set_soft_border(MoeFfnImpl& moe, double temperature) {
  const bool border = temperature > 0.0 && moe.spec.gate.mode == GateMode::kHard;
  moe.spec.gate.straight_through = false;
  moe.spec.gate.border_temperature = border ? temperature : 0.0;
  if (border) moe.spec.execution = Execution::kMaskedHidden;
}

}  // namespace cleave::train
