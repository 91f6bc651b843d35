#include "baseline_refit.h"

#include <utility>

#include "budget_layer.h"

namespace cleave {

void refit_baseline(Model& dense, const TokenWindows& calibration, const BaselineProgress& progress,
                    Baseline& baseline) {
  const std::int64_t H = dense.config().intermediate_size, kept = baseline.spec.shared;
  BudgetSpec spec;
  spec.active_share = static_cast<double>(kept) / static_cast<double>(H);
  spec.shared_share = 1.0;
  spec.expert_width = 1;  // any number of neurons
  const std::vector<std::int64_t> widths(baseline.layers.size(), kept);
  const auto say = [&](const std::string&, std::int64_t done, std::int64_t all) {
    if (progress) progress("preparing " + baseline.spec.method, done, all);
  };
  Conversion conversion =
      convert_layers(dense, spec, widths, calibration, say,
                     baseline.spec.score == BaselineScore::kFluctuation ? StaticScore::kFluctuation
                                                                        : StaticScore::kEnergy);
  for (std::size_t l = 0; l < baseline.layers.size(); ++l) {
    BaselineLayer& layer = baseline.layers[l];
    ExpertBank& bank = conversion.pruned[l];
    layer.expert_of_neuron.assign(static_cast<std::size_t>(H), BaselineLayer::kOff);
    for (const std::int32_t j : bank.neuron_order)
      layer.expert_of_neuron[j] = BaselineLayer::kShared;
    layer.down_t = std::move(bank.down_t);
    layer.down_bias = std::move(bank.down_bias);
  }
}

}  // namespace cleave
