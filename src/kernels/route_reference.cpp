#include <algorithm>
#include <cmath>
#include <numeric>

#include "cleave/kernels.h"
#include "kernels/check_logits.h"

namespace cleave {

void route_reference(MatrixView<const float> logits, std::int64_t experts_per_token, GateMode mode,
                     Routing& routing) {
  check_experts_per_token("route_reference", experts_per_token, logits.cols);
  const std::int64_t K = experts_per_token;
  routing.num_tokens = logits.rows;
  routing.experts_per_token = K;
  routing.ids.assign(logits.rows * K, 0);
  routing.weights.assign(logits.rows * K, 1.0f);
  for (std::int64_t t = 0; t < logits.rows; ++t) {
    check_logits("route_reference", logits.row(t), logits.cols, t);
    std::vector<std::int32_t> order(logits.cols);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return logits(t, a) > logits(t, b); });
    double sum = 0.0;
    for (std::int64_t k = 0; k < K; ++k)
      sum += std::exp(static_cast<double>(logits(t, order[k])) - logits(t, order[0]));
    for (std::int64_t k = 0; k < K; ++k) {
      routing.ids[t * K + k] = order[k];
      if (mode == GateMode::kSoftmax)
        routing.weights[t * K + k] = static_cast<float>(
            std::exp(static_cast<double>(logits(t, order[k])) - logits(t, order[0])) / sum);
    }
  }
}

}  // namespace cleave
