// route on the CPU. Definition: route_reference.cpp.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cleave/error.h"
#include "cleave/kernels.h"
#include "kernels/check_logits.h"

namespace cleave {
namespace {

// Keeps the best K so far in order and inserts from the end: K is small, and a strict comparison
// leaves equal logits in the order of their ids.
void select_largest(const float* logits, std::int64_t num_experts, std::int64_t K,
                    std::int32_t* ids) {
  std::int64_t found = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (found == K && !(logits[e] > logits[ids[K - 1]])) continue;
    std::int64_t place = found < K ? found++ : K - 1;
    for (; place > 0 && logits[e] > logits[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = static_cast<std::int32_t>(e);
  }
}

void softmax_selected(const float* logits, const std::int32_t* ids, std::int64_t K,
                      float* weights) {
  float sum = 0.0f;
  for (std::int64_t k = 0; k < K; ++k) {
    weights[k] = std::exp(logits[ids[k]] - logits[ids[0]]);
    sum += weights[k];
  }
  for (std::int64_t k = 0; k < K; ++k) weights[k] /= sum;
}

}  // namespace

void check_experts_per_token(const char* function, std::int64_t experts_per_token,
                             std::int64_t num_experts) {
  if (experts_per_token < 1 || experts_per_token > num_experts)
    throw InvalidArgument(
        fmt::format("{}: K = {} experts per token of E = {}; K must be from 1 to E", function,
                    experts_per_token, num_experts));
}

void check_logits(const char* function, const float* logits, std::int64_t num_experts,
                  std::int64_t token) {
  for (std::int64_t e = 0; e < num_experts; ++e)
    if (!std::isfinite(logits[e]))
      throw InvalidArgument(fmt::format(
          "{}: the logit of expert {} for token {} is {}; expected finite numbers; look for NaN in "
          "the router's weights or its input",
          function, e, token, logits[e]));
}

void route(MatrixView<const float> logits, std::int64_t experts_per_token, GateMode mode,
           std::int32_t* ids, float* weights) {
  check_experts_per_token("route", experts_per_token, logits.cols);
  const std::int64_t K = experts_per_token;
  for (std::int64_t t = 0; t < logits.rows; ++t) {
    check_logits("route", logits.row(t), logits.cols, t);
    select_largest(logits.row(t), logits.cols, K, ids + t * K);
    if (mode == GateMode::kSoftmax)
      softmax_selected(logits.row(t), ids + t * K, K, weights + t * K);
    else
      std::fill_n(weights + t * K, K, 1.0f);
  }
}

void route(MatrixView<const float> logits, std::int64_t experts_per_token, GateMode mode,
           Routing& routing) {
  check_experts_per_token("route", experts_per_token, logits.cols);
  routing.num_tokens = logits.rows;
  routing.experts_per_token = experts_per_token;
  routing.ids.resize(logits.rows * experts_per_token);
  routing.weights.resize(logits.rows * experts_per_token);
  route(logits, experts_per_token, mode, routing.ids.data(), routing.weights.data());
}

}  // namespace cleave
