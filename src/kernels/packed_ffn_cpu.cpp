// moe_ffn and dense_ffn on packed weights: checks, and the choice between the ways to run them.

#include <algorithm>
#include <limits>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"

namespace cleave {
namespace {

/// Rows per expert from which on a second phase pays, with weights unpacked once for all rows or
/// multiplied as pairs.
std::int64_t prefill_rows(const PackedExperts& experts) {
  if (!uses_dots(experts)) return 16;
  return is_narrow(experts) ? 14 : 5;
}

/// Narrow experts' rows per expert from which on they are rounded and multiplied as pairs.
constexpr std::int64_t kPairedRows = 3;
bool decodes_as_pairs(const PackedExperts& experts) {
  return uses_dots(experts) && is_narrow(experts);
}

void check_packed_shapes(const char* function, const PackedExperts& experts,
                         MatrixView<const float> x, MatrixView<float> y) {
  if (x.rows != y.rows || x.cols != experts.d_model() || y.cols != experts.d_model())
    fail_argument("{}: x is [{}, {}] and y [{}, {}]; expected both [T, D] with D = {}", function,
                  x.rows, x.cols, y.rows, y.cols, experts.d_model());
}

/// (token, slot) pairs are counted in 32 bits.
void check_pairs(const char* function, std::int64_t T, std::int64_t K) {
  if (K > 0 && T > std::numeric_limits<std::int32_t>::max() / K)
    fail_argument("{}: {} tokens x {} experts; expected below 2^31 in one call; make several",
                  function, T, K);
}

/// Room that dense_ffn() needs before that of moe_ffn(): ids and weights [T].
std::size_t dense_routing_bytes(std::int64_t T) {
  Carver sizes(nullptr);
  sizes.take<std::int32_t>(T);
  sizes.take<float>(T);
  return sizes.used();
}

}  // namespace

void run_checked(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  if (call.x.rows == 0 || call.k == 0) return;
  const std::int64_t pairs = call.x.rows * call.k, E = call.experts.num_experts();
  if (pairs >= prefill_rows(call.experts) * E)
    run_prefill(call, workspace, parallel);
  else if (decodes_as_pairs(call.experts) && pairs >= kPairedRows * E)
    run_dot_decode(call, workspace, parallel);
  else
    run_decode(call, workspace, parallel);
}

std::size_t moe_ffn_workspace_size(const PackedExperts& experts, std::int64_t num_tokens,
                                   std::int64_t experts_per_token, int threads) {
  const std::int64_t T = num_tokens, k = experts_per_token, parts = std::max(1, threads);
  if (T < 1 || k < 1) return 0;
  // Fewer tokens than these may be run in the other way.
  const std::int64_t decoded = std::min(T, (prefill_rows(experts) * experts.num_experts() - 1) / k);
  const std::size_t decode = std::max(
      decode_bytes(experts, decoded, k, parts),
      decodes_as_pairs(experts) ? dot_decode_bytes(experts, decoded, k, parts) : std::size_t{0});
  return std::max(decode, prefill_bytes(experts, T, k, parts));
}

void moe_ffn(const PackedExperts& experts, const RoutingView& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  check_packed_shapes("moe_ffn", experts, x, y);
  if (routing.num_tokens != x.rows)
    fail_argument("moe_ffn: the routing is of {} tokens, x has {}", routing.num_tokens, x.rows);
  check_pairs("moe_ffn", routing.num_tokens, routing.experts_per_token);
  check_routing("moe_ffn", routing, experts.num_experts());
  run_checked({experts, routing.ids, routing.weights, routing.experts_per_token, scale, x, y},
              workspace, parallel);
}

void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  moe_ffn(experts, checked_view("moe_ffn", routing), scale, x, y, workspace, parallel);
}

std::size_t dense_ffn_workspace_size(const PackedExperts& ffn, std::int64_t num_tokens,
                                     int threads) {
  if (num_tokens < 1) return 0;
  return dense_routing_bytes(num_tokens) + moe_ffn_workspace_size(ffn, num_tokens, 1, threads);
}

void dense_ffn(const PackedExperts& ffn, MatrixView<const float> x, MatrixView<float> y,
               Workspace& workspace, const ParallelFor& parallel) {
  if (ffn.num_experts() != 1)
    fail_argument("dense_ffn: {} experts; a dense FFN is one", ffn.num_experts());
  check_packed_shapes("dense_ffn", ffn, x, y);
  check_pairs("dense_ffn", x.rows, 1);
  const std::int64_t T = x.rows;
  if (T == 0) return;
  const std::size_t bytes = dense_ffn_workspace_size(ffn, T, parallel.threads);
  std::byte* memory = workspace.get(bytes);
  Carver room(memory);
  auto* ids = room.take<std::int32_t>(T);
  auto* ones = room.take<float>(T);
  constexpr std::int64_t kTokensPerRange = 256;
  parallel(T, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    std::fill(ids + begin, ids + end, 0);
    std::fill(ones + begin, ones + end, 1.0f);
  });
  Workspace rest(std::span<std::byte>(memory + room.used(), bytes - room.used()));
  run_checked({ffn, ids, ones, 1, 1.0f, x, y}, rest, parallel);
  if (ffn.down_bias().empty()) return;
  parallel(T, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      isa_kernels().add(ffn.down_bias().data(), y.row(t), y.cols);
  });
}

}  // namespace cleave
