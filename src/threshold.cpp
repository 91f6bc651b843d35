#include "cleave/threshold.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "cleave/evaluate.h"
#include "cleave/kernels.h"
#include "fail.h"

namespace cleave {

float calibrate_threshold(MatrixView<const float> logits, std::int64_t most, double average) {
  const std::int64_t T = logits.rows, E = logits.cols;
  if (T < 1 || most < 1 || most > E)
    fail_argument("calibrate_threshold: logits [{}, {}], K = {}; expected a token and K in [1, E]",
                  T, E, most);
  if (!(average >= 1.0 && average <= static_cast<double>(most)))
    fail_argument("calibrate_threshold: {} experts on average; must be in [1, K = {}]", average,
                  most);
  std::vector<double> behind;  // how far each of the others lies behind the token's largest, <= 0
  behind.reserve(static_cast<std::size_t>(T * (most - 1)));
  std::vector<float> row;
  for (std::int64_t t = 0; t < T; ++t) {
    row.assign(logits.row(t), logits.row(t) + E);
    for (const float z : row)
      if (!std::isfinite(z))
        fail_argument("calibrate_threshold: a logit of token {} is {}; must be finite", t, z);
    std::partial_sort(row.begin(), row.begin() + most, row.end(), std::greater<>());
    for (std::int64_t k = 1; k < most; ++k) behind.push_back(static_cast<double>(row[k]) - row[0]);
  }
  const auto kept = std::llround((average - 1.0) * static_cast<double>(T));
  if (kept >= static_cast<long long>(behind.size())) return 0.0f;  // all K, always
  const auto next = behind.begin() + kept;
  std::nth_element(behind.begin(), next, behind.end(), std::greater<>());
  const double last = kept > 0 ? *std::min_element(behind.begin(), next) : 0.0;
  return static_cast<float>(std::exp(0.5 * (last + *next)));
}

namespace {

std::vector<LinearRouter> routers_of(const Model& model) {
  std::vector<LinearRouter> routers(static_cast<std::size_t>(model.config().num_layers));
  for (std::size_t l = 0; l < routers.size(); ++l)
    if (model.num_experts(static_cast<std::int64_t>(l)) > 0)
      routers[l] = model.moe_layer(static_cast<std::int64_t>(l)).router;
  return routers;
}

/// [L][tokens, E], the logits of all layers as the model runs now.
std::vector<std::vector<float>> logits_on(Model& model, const std::vector<LinearRouter>& routers,
                                          const TokenWindows& text) {
  std::vector<std::vector<float>> logits(routers.size());
  ForwardHooks hooks;
  hooks.ffn_input = [&](std::int64_t layer, MatrixView<const float> x) {
    const LinearRouter& router = routers[layer];
    if (router.num_experts == 0) return;
    const std::size_t before = logits[layer].size();
    logits[layer].resize(before + static_cast<std::size_t>(x.rows * router.num_experts));
    linear(x, router.view(), {}, {logits[layer].data() + before, x.rows, router.num_experts},
           model.parallel());
  };
  hidden_states(model, text, hooks);
  return logits;
}

void set_thresholds(Model& model, const std::vector<LinearRouter>& routers,
                    const std::vector<float>& thresholds) {
  for (std::size_t l = 0; l < thresholds.size(); ++l)
    if (routers[l].num_experts > 0)
      model.set_router_threshold(static_cast<std::int64_t>(l), thresholds[l]);
}

}  // namespace

std::vector<float> calibrate_thresholds(Model& model, const TokenWindows& text, double average) {
  const std::int64_t most = model.config().experts_per_token;
  if (!model.config().is_moe())
    fail_argument("calibrate_thresholds: the model has no experts; convert it first");
  if (text.context < 2 || text.count() < 1)
    fail_argument(
        "calibrate_thresholds: {} tokens in windows of {}; needs at least one window of "
        "2 or more",
        text.tokens.size(), text.context);
  if (!(average >= 1.0 && average <= static_cast<double>(most)))
    fail_argument("calibrate_thresholds: {} experts on average; must be in [1, K = {}]", average,
                  most);
  const std::vector<LinearRouter> routers = routers_of(model);
  std::vector<float> thresholds(routers.size(), 0.0f);
  set_thresholds(model, routers, thresholds);
  model.set_active_experts(std::llround(average));
  for (int pass = 0; pass < 2; ++pass) {
    const auto logits = logits_on(model, routers, text);
    for (std::size_t l = 0; l < routers.size(); ++l) {
      const std::int64_t E = routers[l].num_experts;
      if (E > 0)
        thresholds[l] = calibrate_threshold(
            {logits[l].data(), static_cast<std::int64_t>(logits[l].size()) / E, E},
            std::min(most, E), average);
    }
    model.set_active_experts(most);
    set_thresholds(model, routers, thresholds);
  }
  return thresholds;
}

}  // namespace cleave
