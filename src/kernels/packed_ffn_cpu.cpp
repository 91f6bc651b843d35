// moe_ffn and dense_ffn on packed weights: checks, and the choice between the ways to run them.

#include <algorithm>
#include <functional>
#include <limits>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/check_logits.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"

namespace cleave {
namespace {

/// An FFN that memory gives in a tenth of a millisecond or so: to wait for other threads costs it
/// a per cent each time.
bool is_small(const PackedExperts& experts) { return experts.bytes() <= (std::int64_t{8} << 20); }

/// The most tokens, with K experts each, that do not run as a prompt. A second phase pays from so
/// many rows per expert on, with weights unpacked once for all rows or multiplied as pairs; and
/// where the sums of parts, [T, D] each, would be much beside the weights.
std::int64_t few_tokens(const ActiveExperts& a) {
  const PackedExperts& experts = a.experts;
  const std::int64_t E = experts.num_experts();
  const auto below = [&](std::int64_t rows) {
    return std::max<std::int64_t>(0, (rows * E - 1) / a.k);
  };
  if (!uses_dots(experts)) return below(16);
  const bool narrow = is_narrow(experts);
  // A product has 12 rows, but rows vary; and more of them hold up the reading of large weights.
  std::int64_t most = below(narrow ? 14 : !is_small(experts) ? 7 : E == 1 ? 13 : 10);
  // Of kDotRows tokens no expert has more rows than a product: then as many rows as of small FFNs.
  if (!narrow && E > 1) most = std::max(most, std::min<std::int64_t>(kDotRows, below(10)));
  const std::int64_t sum_bytes = experts.d_model() * static_cast<std::int64_t>(sizeof(float));
  return std::max(below(narrow ? 9 : 5), std::min(most, experts.bytes() / (16 * sum_bytes)));
}

bool is_few(const ActiveExperts& a, std::int64_t tokens) {
  return a.k == 0 || tokens <= few_tokens(a);
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

/// Routing of tokens that all go to expert 0. Lives in the workspace.
struct AlwaysOn {
  std::int32_t* ids;  // [T]
  float* ones;        // [T]
};
AlwaysOn carve_always_on(Carver& from, std::int64_t T) {
  return {from.take<std::int32_t>(T), from.take<float>(T)};
}
std::size_t always_on_bytes(std::int64_t T) {
  Carver sizes(nullptr);
  carve_always_on(sizes, T);
  return sizes.used();
}

constexpr std::int64_t kTokensPerRange = 256;

/// A dense FFN for all tokens, and then `routed` if that is given. `bytes`: of workspace.
void run_always_on(const FfnCall* routed, const PackedExperts& ffn, MatrixView<const float> x,
                   MatrixView<float> y, std::size_t bytes, Workspace& workspace,
                   const ParallelFor& parallel) {
  const std::int64_t T = x.rows;
  std::byte* memory = workspace.get(bytes);
  Carver room(memory);
  const AlwaysOn all = carve_always_on(room, T);
  parallel(T, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    std::fill(all.ids + begin, all.ids + end, 0);
    std::fill(all.ones + begin, all.ones + end, 1.0f);
  });
  Workspace rest(std::span<std::byte>(memory + room.used(), bytes - room.used()));
  const FfnCall always{ffn, all.ids, all.ones, 1, 1.0f, x, y};
  const FfnCall calls[2] = {always, routed != nullptr ? *routed : always};
  run_checked(std::span(calls).first(routed != nullptr ? 2 : 1), rest, parallel);
  if (ffn.down_bias().empty()) return;
  parallel(T, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      isa_kernels().add(ffn.down_bias().data(), y.row(t), y.cols);
  });
}

/// What moe_ffn() runs, checked.
FfnCall checked_call(const PackedExperts& experts, const RoutingView& routing, float scale,
                     MatrixView<const float> x, MatrixView<float> y) {
  check_packed_shapes("moe_ffn", experts, x, y);
  if (routing.num_tokens != x.rows)
    fail_argument("moe_ffn: the routing is of {} tokens, x has {}", routing.num_tokens, x.rows);
  check_pairs("moe_ffn", routing.num_tokens, routing.experts_per_token);
  check_routing("moe_ffn", routing, experts.num_experts());
  return {experts, routing.ids, routing.weights, routing.experts_per_token, scale, x, y};
}

void check_router(const char* function, const RouterCall& router, std::int64_t E,
                  MatrixView<const float> x) {
  if (router.weight.rows() != E || router.weight.cols() != x.cols || router.logits.rows != x.rows ||
      router.logits.cols != E)
    fail_argument(
        "{}: the router is [{}, {}] and its logits [{}, {}]; expected [E, D] = [{}, {}] and [T, E] "
        "= [{}, {}]",
        function, router.weight.rows(), router.weight.cols(), router.logits.rows,
        router.logits.cols, E, x.cols, x.rows, E);
}

void check_one_expert(const char* function, const PackedExperts& ffn) {
  if (ffn.num_experts() != 1)
    fail_argument("{}: {} experts; a dense FFN is one", function, ffn.num_experts());
}

/// Shared experts of moe_ffn(), which all tokens go to.
void check_shared(const PackedExperts& shared, MatrixView<const float> x, MatrixView<float> y) {
  constexpr const char* kName = "moe_ffn: shared experts";
  check_one_expert(kName, shared);
  check_packed_shapes(kName, shared, x, y);
  check_pairs(kName, x.rows, 1);
}

}  // namespace

void run_checked(std::span<const FfnCall> calls, Workspace& workspace,
                 const ParallelFor& parallel) {
  const auto few = [](const FfnCall& c) { return is_few({c.experts, c.k}, c.x.rows); };
  if (std::all_of(calls.begin(), calls.end(), few)) return run_few(calls, workspace, parallel);
  for (const FfnCall& c : calls)
    few(c) ? run_few({&c, 1}, workspace, parallel) : run_prefill(c, workspace, parallel);
}

std::size_t moe_ffn_workspace_size(const PackedExperts& experts, std::int64_t num_tokens,
                                   std::int64_t experts_per_token, int threads) {
  const std::int64_t T = num_tokens, k = experts_per_token, parts = std::max(1, threads);
  if (T < 1 || k < 1) return 0;
  const ActiveExperts active{experts, k};
  return std::max(few_bytes({&active, 1}, std::min(T, few_tokens(active)), parts),
                  prefill_bytes(experts, T, k, parts));
}

std::size_t moe_ffn_workspace_size(const PackedExperts& experts, const PackedExperts& shared,
                                   std::int64_t num_tokens, std::int64_t experts_per_token,
                                   int threads) {
  const std::int64_t T = num_tokens, k = experts_per_token;
  if (T < 1 || k < 1) return dense_ffn_workspace_size(shared, T, threads);
  const ActiveExperts both[] = {{experts, k}, {shared, 1}};
  const std::size_t alone = std::max(moe_ffn_workspace_size(experts, T, k, threads),
                                     moe_ffn_workspace_size(shared, T, 1, threads));
  const std::int64_t few = std::min({T, few_tokens(both[0]), few_tokens(both[1])});
  return always_on_bytes(T) + std::max(alone, few_bytes(both, few, std::max(1, threads)));
}

void moe_ffn(const PackedExperts& experts, const RoutingView& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  const FfnCall call = checked_call(experts, routing, scale, x, y);
  if (x.rows > 0 && call.k > 0) run_checked({&call, 1}, workspace, parallel);
}

void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  moe_ffn(experts, checked_view("moe_ffn", routing), scale, x, y, workspace, parallel);
}

void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             const PackedExperts& shared, MatrixView<const float> x, MatrixView<float> y,
             Workspace& workspace, const ParallelFor& parallel) {
  const FfnCall call = checked_call(experts, checked_view("moe_ffn", routing), scale, x, y);
  check_shared(shared, x, y);
  if (x.rows == 0) return;
  run_always_on(call.k > 0 ? &call : nullptr, shared, x, y,
                moe_ffn_workspace_size(experts, shared, x.rows, call.k, parallel.threads),
                workspace, parallel);
}

void moe_ffn(const RouterCall& router, const PackedExperts& experts, float scale,
             const PackedExperts& shared, MatrixView<const float> x, MatrixView<float> y,
             Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = x.rows, E = experts.num_experts(), K = router.spec.experts_per_token;
  check_packed_shapes("moe_ffn", experts, x, y);
  check_shared(shared, x, y);
  check_router("moe_ffn", router, E, x);
  check_route_spec("moe_ffn", router.spec, E);
  check_pairs("moe_ffn", T, K);
  if (T == 0 || !is_few({experts, K}, T) || !is_few({shared, 1}, T)) {
    linear(router.weight, x, {}, router.logits, /*add=*/false, workspace, parallel);
    route(router.logits, router.spec, router.routing, parallel);
    return moe_ffn(experts, router.routing, scale, shared, x, y, workspace, parallel);
  }
  Routing& routing = router.routing;
  routing.num_tokens = T;
  routing.experts_per_token = K;
  routing.ids.resize(static_cast<std::size_t>(T * K));
  routing.weights.resize(static_cast<std::size_t>(T * K));
  const std::size_t ffn_bytes = moe_ffn_workspace_size(experts, shared, T, K, parallel.threads);
  const std::size_t router_bytes = linear_bytes(router.weight, T);
  const std::span<std::byte> memory(workspace.get(ffn_bytes + router_bytes),
                                    ffn_bytes + router_bytes);
  const auto work = [&] {
    Workspace own(memory.first(router_bytes));
    linear(router.weight, x, {}, router.logits, /*add=*/false, own, {});
    route(router.logits, router.spec, routing.ids.data(), routing.weights.data());
  };
  SharedStep step(std::ref(work));  // a reference: nothing is allocated
  const FfnCall routed{experts, routing.ids.data(), routing.weights.data(), K, scale, x, y, &step};
  Workspace rest(memory.subspan(router_bytes));
  run_always_on(&routed, shared, x, y, ffn_bytes, rest, parallel);
}

std::size_t dense_ffn_workspace_size(const PackedExperts& ffn, std::int64_t num_tokens,
                                     int threads) {
  if (num_tokens < 1) return 0;
  return always_on_bytes(num_tokens) + moe_ffn_workspace_size(ffn, num_tokens, 1, threads);
}

void dense_ffn(const PackedExperts& ffn, MatrixView<const float> x, MatrixView<float> y,
               Workspace& workspace, const ParallelFor& parallel) {
  check_one_expert("dense_ffn", ffn);
  check_packed_shapes("dense_ffn", ffn, x, y);
  check_pairs("dense_ffn", x.rows, 1);
  if (x.rows == 0) return;
  run_always_on(nullptr, ffn, x, y, dense_ffn_workspace_size(ffn, x.rows, parallel.threads),
                workspace, parallel);
}

}  // namespace cleave
