#include "budget_notices.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace cleave {
namespace {

/// Tokens per unknown below which a notice is given (docs/methods/conversion.md, "Which settings").
constexpr double kEnoughTokens = 4.0;

/// Neurons of rows [begin, end) that are no padding.
std::int64_t neurons_of(const ExpertBank& bank, std::int64_t begin, std::int64_t end) {
  const auto row = bank.neuron_order.begin();
  return (end - begin) - std::count(row + begin, row + end, ExpertBank::kPadding);
}

bool has_neuron(const ExpertBank& bank, std::int64_t expert) {
  return neurons_of(bank, bank.begin[expert], bank.begin[expert + 1]) > 0;
}

bool is_short(const FitText& fit) {
  return fit.seen < kEnoughTokens * static_cast<double>(fit.running);
}

/// "layer 3", "layers 0 to 2, 5".
std::string layer_list(const std::vector<std::int64_t>& layers) {
  std::string text;
  for (std::size_t i = 0, last = 0; i < layers.size(); i = last + 1) {
    for (last = i; last + 1 < layers.size() && layers[last + 1] == layers[last] + 1;) ++last;
    text += (i == 0 ? "" : ", ") + std::to_string(layers[i]);
    if (last > i) text += " to " + std::to_string(layers[last]);
  }
  return (layers.size() == 1 ? "layer " : "layers ") + text;
}

}  // namespace

FitText fit_text(const BudgetRows& rows, const Routing& routing, std::int64_t tokens,
                 std::int64_t layer) {
  const auto shared = static_cast<std::int64_t>(rows.shared.neuron_order.size());
  FitText fit{layer, tokens, static_cast<double>(tokens), !routing.ids.empty(),
              neurons_of(rows.shared, 0, shared)};
  if (!fit.routed) return fit;
  double pairs = 0.0, neurons = 0.0;  // (token, neuron), and neurons, both routed
  const std::int64_t E = rows.experts.num_experts();
  const std::vector<double> load = expert_loads(routing, E);
  for (std::int64_t e = 0; e < E; ++e) {
    const auto width = static_cast<double>(
        neurons_of(rows.experts, rows.experts.begin[e], rows.experts.begin[e + 1]));
    neurons += width;
    pairs += width * std::round(load[e] * static_cast<double>(tokens));
  }
  fit.seen = pairs / std::max(neurons, 1.0);
  fit.running += static_cast<std::int64_t>(pairs / static_cast<double>(tokens) + 0.5);
  return fit;
}

std::optional<std::string> text_notice(const std::vector<FitText>& layers) {
  std::vector<std::int64_t> few;
  const FitText* worst = nullptr;
  for (const FitText& fit : layers) {
    if (!is_short(fit)) continue;
    few.push_back(fit.layer);
    if (worst == nullptr || fit.seen * static_cast<double>(worst->running) <
                                worst->seen * static_cast<double>(fit.running))
      worst = &fit;
  }
  if (worst == nullptr) return std::nullopt;
  return fmt::format(
      "{} under-determined: in layer {} a {}neuron sees {:.0f} of the {} calibration tokens{}, "
      "fewer "
      "than {} for each of the {} neurons that run; the ridge penalty keeps its row of `down` near "
      "the dense weights; more text would repair more",
      layer_list(few) + (few.size() == 1 ? " is" : " are"), worst->layer,
      worst->routed ? "routed " : "", worst->seen, worst->tokens,
      worst->routed ? " on average" : "", kEnoughTokens, worst->running);
}

std::vector<double> expert_loads(const Routing& routing, std::int64_t num_experts) {
  std::vector<double> load(static_cast<std::size_t>(num_experts), 0.0);
  for (const std::int32_t id : routing.ids)
    load[id] += 1.0 / static_cast<double>(routing.num_tokens);
  return load;
}

std::optional<std::string> unused_notice(const BudgetRows& rows, const std::vector<double>& load,
                                         std::int64_t layer) {
  std::int64_t unused = 0;
  for (std::int64_t e = 0; e < rows.experts.num_experts(); ++e)
    unused += load[e] == 0.0 && has_neuron(rows.experts, e) ? 1 : 0;
  if (unused == 0) return std::nullopt;
  return fmt::format(
      "layer {}: no calibration token chose {} of the {} experts; their weights stay as they were",
      layer, unused, rows.experts.num_experts());
}

}  // namespace cleave
