// route on the CPU. Definition: route_reference.cpp.

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cleave/error.h"
#include "cleave/kernels.h"
#include "kernels/check_logits.h"
#include "kernels/dispatch.h"

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

// With many of few experts selected, insertion moves most of them several times; counting compares
// each with all, a vector at a time.
void select_by_rank(const float* logits, std::int64_t num_experts, std::int64_t K,
                    std::int32_t* ids) {
  std::int32_t rank[kMostRanked], by_rank[kMostRanked];
  if (row_kernels().rank(logits, num_experts, rank)) {
    for (std::int64_t e = 0; e < num_experts; ++e) by_rank[rank[e]] = static_cast<std::int32_t>(e);
  } else {
    std::fill(by_rank, by_rank + num_experts, Routing::kUnused);
    for (std::int64_t e = 0; e < num_experts; ++e) {
      std::int64_t place = rank[e];
      while (by_rank[place] != Routing::kUnused) ++place;  // equal logits, lower ids
      by_rank[place] = static_cast<std::int32_t>(e);
    }
  }
  std::copy_n(by_rank, K, ids);
}

void select(const float* logits, std::int64_t num_experts, std::int64_t K, std::int32_t* ids) {
  constexpr std::int64_t kFew = 4;
  if (K > kFew && num_experts <= kMostRanked)
    select_by_rank(logits, num_experts, K, ids);
  else
    select_largest(logits, num_experts, K, ids);
}

/// How many of the K selected, by falling logit, reach the threshold; `lowest` is its logarithm.
std::int64_t count_used(const float* logits, const std::int32_t* ids, std::int64_t K,
                        double lowest) {
  if (lowest == -std::numeric_limits<double>::infinity()) return K;
  std::int64_t used = 1;
  while (used < K && static_cast<double>(logits[ids[used]]) - logits[ids[0]] >= lowest) ++used;
  return used;
}

void softmax_selected(const float* logits, std::int64_t num_experts, const std::int32_t* ids,
                      std::int64_t used, bool normalise, float* weights) {
  constexpr std::int64_t kMostInBlock = 128;
  if (normalise && used <= kMostInBlock) {
    float block[kMostInBlock];
    for (std::int64_t k = 0; k < used; ++k) block[k] = logits[ids[k]];
    SoftmaxState state{-std::numeric_limits<float>::infinity(), 0.0f};
    row_kernels().softmax_block(block, used, &state);
    const float scale = 1.0f / state.sum;
    for (std::int64_t k = 0; k < used; ++k) weights[k] = block[k] * scale;
    return;
  }
  float sum = 0.0f;
  for (std::int64_t k = 0; k < used; ++k) {
    weights[k] = std::exp(logits[ids[k]] - logits[ids[0]]);
    sum += weights[k];
  }
  if (!normalise) {
    sum = 0.0f;
    for (std::int64_t e = 0; e < num_experts; ++e) sum += std::exp(logits[e] - logits[ids[0]]);
  }
  for (std::int64_t k = 0; k < used; ++k) weights[k] /= sum;
}

/// Tokens [begin, end), whose ids and weights are given.
void route_tokens(MatrixView<const float> logits, std::int64_t begin, std::int64_t end,
                  const RouteSpec& spec, std::int32_t* ids, float* weights) {
  const std::int64_t K = spec.experts_per_token;
  const double lowest = std::log(static_cast<double>(spec.threshold));
  for (std::int64_t t = begin; t < end; ++t, ids += K, weights += K) {
    check_logits("route", logits.row(t), logits.cols, t);
    select(logits.row(t), logits.cols, K, ids);
    const std::int64_t used = count_used(logits.row(t), ids, K, lowest);
    std::fill(weights, weights + used, 1.0f);
    if (spec.mode == GateMode::kSoftmax)
      softmax_selected(logits.row(t), logits.cols, ids, used, spec.normalise, weights);
    std::fill(ids + used, ids + K, Routing::kUnused);
    std::fill(weights + used, weights + K, 0.0f);
  }
}

}  // namespace

void check_route_spec(const char* function, const RouteSpec& spec, std::int64_t num_experts) {
  if (spec.experts_per_token < 1 || spec.experts_per_token > num_experts)
    throw InvalidArgument(
        fmt::format("{}: K = {} experts per token of E = {}; K must be from 1 to E", function,
                    spec.experts_per_token, num_experts));
  if (!(spec.threshold >= 0.0f && spec.threshold <= 1.0f))  // NaN as well
    throw InvalidArgument(
        fmt::format("{}: threshold {}; expected a share of the largest gate probability, from 0 "
                    "(all K experts) to 1",
                    function, spec.threshold));
}

void check_logits(const char* function, const float* logits, std::int64_t num_experts,
                  std::int64_t token) {
  // Without a way out, so that it runs by vectors: the bits of a magnitude grow with it, up to
  // those of infinity and NaN.
  std::int32_t most = 0;
  for (std::int64_t e = 0; e < num_experts; ++e)
    most = std::max(most, std::bit_cast<std::int32_t>(logits[e]) & 0x7fffffff);
  if (most < std::bit_cast<std::int32_t>(std::numeric_limits<float>::infinity())) return;
  for (std::int64_t e = 0; e < num_experts; ++e)
    if (!std::isfinite(logits[e]))
      throw InvalidArgument(fmt::format(
          "{}: the logit of expert {} for token {} is {}; expected finite numbers; look for NaN in "
          "the router's weights or its input",
          function, e, token, logits[e]));
}

void route(MatrixView<const float> logits, const RouteSpec& spec, Routing& routing,
           const ParallelFor& parallel) {
  check_route_spec("route", spec, logits.cols);
  const std::int64_t K = spec.experts_per_token;
  routing.num_tokens = logits.rows;
  routing.experts_per_token = K;
  routing.ids.resize(logits.rows * K);
  routing.weights.resize(logits.rows * K);
  // A token takes some 3 ns per expert; to hand out ranges takes less than a microsecond.
  const std::int64_t tokens_per_range = 1 + 256 / logits.cols;
  parallel(logits.rows, tokens_per_range, [&](std::int64_t begin, std::int64_t end) {
    route_tokens(logits, begin, end, spec, routing.ids.data() + begin * K,
                 routing.weights.data() + begin * K);
  });
}

void route(MatrixView<const float> logits, const RouteSpec& spec, Routing& routing) {
  route(logits, spec, routing, ParallelFor());
}

void route(MatrixView<const float> logits, const RouteSpec& spec, std::int32_t* ids,
           float* weights) {
  check_route_spec("route", spec, logits.cols);
  route_tokens(logits, 0, logits.rows, spec, ids, weights);
}

void route(MatrixView<const float> logits, std::int64_t experts_per_token, GateMode mode,
           Routing& routing) {
  route(logits, {.experts_per_token = experts_per_token, .mode = mode}, routing);
}

}  // namespace cleave
