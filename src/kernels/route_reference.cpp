#include <algorithm>
#include <cmath>
#include <numeric>

#include "cleave/kernels.h"
#include "kernels/check_logits.h"

namespace cleave {

void route_reference(MatrixView<const float> logits, const RouteSpec& spec, Routing& routing) {
  check_route_spec("route_reference", spec, logits.cols);
  const std::int64_t K = spec.experts_per_token;
  routing.num_tokens = logits.rows;
  routing.experts_per_token = K;
  routing.ids.assign(logits.rows * K, Routing::kUnused);
  routing.weights.assign(logits.rows * K, 0.0f);
  for (std::int64_t t = 0; t < logits.rows; ++t) {
    check_logits("route_reference", logits.row(t), logits.cols, t);
    std::vector<std::int32_t> order(logits.cols);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return logits(t, a) > logits(t, b); });
    // p_e / p_max = exp(this); the threshold is compared as a logarithm, where nothing underflows.
    const auto log_ratio = [&](std::int32_t e) {
      return static_cast<double>(logits(t, e)) - logits(t, order[0]);
    };
    double sum_used = 0.0, sum_all = 0.0;
    for (const std::int32_t e : order) sum_all += std::exp(log_ratio(e));
    for (std::int64_t k = 0; k < K; ++k) {
      if (log_ratio(order[k]) < std::log(static_cast<double>(spec.threshold))) continue;
      routing.ids[t * K + k] = order[k];
      sum_used += std::exp(log_ratio(order[k]));
    }
    for (std::int64_t k = 0; k < K; ++k) {
      const std::int32_t e = routing.ids[t * K + k];
      if (e == Routing::kUnused) continue;
      const double p = std::exp(log_ratio(e)) / (spec.normalise ? sum_used : sum_all);
      routing.weights[t * K + k] = spec.mode == GateMode::kHard ? 1.0f : static_cast<float>(p);
    }
  }
}

}  // namespace cleave
