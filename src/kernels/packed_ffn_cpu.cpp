// moe_ffn and dense_ffn on packed weights: checks, and the choice between the two ways to run them.

#include <algorithm>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"

namespace cleave {
namespace {

// From so many rows per expert on, unpacking weights and a second phase are paid for.
constexpr std::int64_t kPrefillRows = 12;

void run(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  if (call.x.rows == 0 || call.k == 0) return;
  if (call.x.rows * call.k >= kPrefillRows * call.experts.num_experts())
    run_prefill(call, workspace, parallel);
  else
    run_decode(call, workspace, parallel);
}

void check_packed_shapes(const char* function, const PackedExperts& experts,
                         MatrixView<const float> x, MatrixView<float> y) {
  if (x.rows != y.rows || x.cols != experts.d_model() || y.cols != experts.d_model())
    fail_argument("{}: x is [{}, {}] and y [{}, {}]; expected both [T, D] with D = {}", function,
                  x.rows, x.cols, y.rows, y.cols, experts.d_model());
}

}  // namespace

void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  check_routing("moe_ffn", routing, experts.num_experts());
  check_packed_shapes("moe_ffn", experts, x, y);
  if (routing.num_tokens != x.rows)
    fail_argument("moe_ffn: the routing is of {} tokens, x has {}", routing.num_tokens, x.rows);
  run({experts, routing.ids.data(), routing.weights.data(), routing.experts_per_token, scale, x, y},
      workspace, parallel);
}

void dense_ffn(const PackedExperts& ffn, MatrixView<const float> x, MatrixView<float> y,
               Workspace& workspace, const ParallelFor& parallel) {
  if (ffn.num_experts() != 1)
    fail_argument("dense_ffn: {} experts; a dense FFN is one", ffn.num_experts());
  check_packed_shapes("dense_ffn", ffn, x, y);
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(x.rows), 0);
  const std::vector<float> ones(static_cast<std::size_t>(x.rows), 1.0f);
  run({ffn, ids.data(), ones.data(), 1, 1.0f, x, y}, workspace, parallel);
  if (ffn.down_bias().empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t)
    isa_kernels().add(ffn.down_bias().data(), y.row(t), y.cols);
}

}  // namespace cleave
