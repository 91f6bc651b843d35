#include "cleave/moe_layer.h"

#include <fmt/format.h>

#include "cleave/error.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"

namespace cleave {

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
  route({logits.data(), x.rows, E}, experts_per_token, gate, routing);
  moe_ffn(experts, routing, scale, x, y, parallel);
  if (experts.down_bias.empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t)
    isa_kernels().add(experts.down_bias.data(), y.row(t), D);
}

}  // namespace cleave
