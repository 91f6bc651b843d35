#include "cleave/moe_layer.h"

#include <fmt/format.h>

#include "cleave/error.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "moe_layer_check.h"
#include "support/buffer.h"

namespace cleave {
namespace {

/// y[t] += shared(x[t]): one expert, which all tokens go to.
void add_shared(const ExpertBank& shared, MatrixView<const float> x, MatrixView<float> y,
                const ParallelFor& parallel) {
  Routing all;
  all.num_tokens = x.rows;
  all.experts_per_token = 1;
  all.ids.assign(static_cast<std::size_t>(x.rows), 0);
  all.weights.assign(static_cast<std::size_t>(x.rows), 1.0f);
  moe_ffn(shared, all, 1.0f, x, y, parallel);
}

}  // namespace

void check_shared(const char* function, const MoeLayer& layer) {
  const ExpertBank& shared = layer.shared;
  if (shared.rows() == 0) return;
  if (shared.num_experts() != 1)
    throw InvalidArgument(
        fmt::format("{}: the shared experts are {} slices; expected one of all their neurons",
                    function, shared.num_experts()));
  if (shared.d_model != layer.experts.d_model)
    throw InvalidArgument(fmt::format("{}: the shared experts have width D = {}, the others {}",
                                      function, shared.d_model, layer.experts.d_model));
  if (!shared.down_bias.empty())
    throw InvalidArgument(fmt::format(
        "{}: the shared experts have a down_bias; add it to that of the experts", function));
}

void MoeLayer::forward(MatrixView<const float> x, MatrixView<float> y, const ParallelFor& parallel,
                       Routing* routing_out) const {
  const std::int64_t E = experts.num_experts(), D = experts.d_model;
  if (router.num_experts != E || router.d_model != D || x.cols != D || y.cols != D ||
      x.rows != y.rows)
    throw InvalidArgument(fmt::format(
        "MoeLayer::forward: x [{}, {}], y [{}, {}] and router [{}, {}] do not fit {} experts of "
        "width D = {}; expected x and y [T, D] and a router [E, D]",
        x.rows, x.cols, y.rows, y.cols, router.num_experts, router.d_model, E, D));
  Buffer logits(x.rows * E);
  linear(x, router.view(), {}, {logits.data(), x.rows, E}, parallel);
  Routing local;
  Routing& routing = routing_out != nullptr ? *routing_out : local;
  route({logits.data(), x.rows, E}, {.experts_per_token = experts_per_token, .mode = gate}, routing,
        parallel);
  forward_routed(x, routing, y, parallel);
}

void MoeLayer::forward_routed(MatrixView<const float> x, const Routing& routing,
                              MatrixView<float> y, const ParallelFor& parallel) const {
  const std::int64_t D = experts.d_model;
  if (x.cols != D || y.cols != D || y.rows != x.rows || routing.num_tokens != x.rows)
    throw InvalidArgument(fmt::format(
        "MoeLayer::forward_routed: x [{}, {}], y [{}, {}] and a routing of {} tokens do not fit "
        "experts of width D = {}; expected x and y [T, D] and a routing of T tokens",
        x.rows, x.cols, y.rows, y.cols, routing.num_tokens, D));
  check_routing("MoeLayer::forward_routed", routing, experts.num_experts());
  check_shared("MoeLayer::forward_routed", *this);
  moe_ffn(experts, routing, scale, x, y, parallel);
  if (shared.rows() > 0) add_shared(shared, x, y, parallel);
  if (experts.down_bias.empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t)
    isa_kernels().add(experts.down_bias.data(), y.row(t), y.cols);
}

}  // namespace cleave
