#pragma once

#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "cleave/expert.h"
#include "cleave/routing.h"
#include "cleave/views.h"

namespace cleave {

/// Runs body(begin, end) over disjoint ranges that cover [0, n), possibly on several threads, and
/// returns when all are done. The caller owns the threads; an empty one means "in this thread".
struct ParallelFor {
  void (*run)(void* context, std::int64_t n, std::int64_t grain, void* body_context,
              void (*body)(void* body_context, std::int64_t begin, std::int64_t end)) = nullptr;
  void* context = nullptr;
  int threads = 1;  ///< how many ranges may run at once; ops cut their work into as many parts

  /// `grain`: ranges are not cut smaller than this many items.
  template <typename Body>
  void operator()(std::int64_t n, std::int64_t grain, Body&& body) const {
    if (n <= 0) return;
    if (run == nullptr) {
      body(std::int64_t{0}, n);
      return;
    }
    run(context, n, grain, &body, [](void* b, std::int64_t begin, std::int64_t end) {
      (*static_cast<std::remove_reference_t<Body>*>(b))(begin, end);
    });
  }
};

/// Instruction set in use: "scalar", "avx2", "avx512", "avx512vnni", "avx512bf16" or "neon". The
/// widest the CPU has; the environment variable CLEAVE_ISA overrides it (read once).
/// @throws InvalidArgument  CLEAVE_ISA names an unknown set or one this CPU lacks
const char* isa_name();

/// y[t] = W x[t] + bias.
///   x [T, d_in]   weight [d_out, d_in]   bias [d_out] or empty   y [T, d_out], overwritten
/// y must not overlap x. Shapes are the caller's promise (asserted only).
/// @throws InvalidArgument  see isa_name(); so may every op below
void linear(MatrixView<const float> x, MatrixView<const float> weight, std::span<const float> bias,
            MatrixView<float> y, const ParallelFor& parallel);

/// The definition of linear(): plain loops, double accumulators. `magnitude` [T, d_out], if given,
/// receives the sum of |terms|: it bounds the rounding error of any order of summation.
void linear_reference(MatrixView<const float> x, MatrixView<const float> weight,
                      std::span<const float> bias, MatrixView<float> y,
                      MatrixView<float> magnitude = {}) noexcept;

/// Selects up to K experts per token and weighs them. Slots without an expert (see
/// RouteSpec::threshold) come last and hold Routing::kUnused and weight 0.
///   logits [T, E]   routing.ids, routing.weights [T, K], resized and written
/// @throws InvalidArgument  K < 1 or K > E, a threshold outside [0, 1], or a logit is NaN or
///                          infinite (names the token)
void route(MatrixView<const float> logits, const RouteSpec& spec, Routing& routing);
/// The same, tokens shared out over threads.
void route(MatrixView<const float> logits, const RouteSpec& spec, Routing& routing,
           const ParallelFor& parallel);
/// The same with exactly K experts.
void route(MatrixView<const float> logits, std::int64_t experts_per_token, GateMode mode,
           Routing& routing);
/// The same into the caller's memory, without an allocation: ids, weights [T, K], written.
void route(MatrixView<const float> logits, const RouteSpec& spec, std::int32_t* ids,
           float* weights);

/// The definition of route(): a stable sort and a softmax in double.
void route_reference(MatrixView<const float> logits, const RouteSpec& spec, Routing& routing);

/// The (token, slot) pairs of a routing that are in use, sorted by expert.
struct TokenGroups {
  std::vector<std::int64_t> begin;  ///< [E + 1]; pairs of expert e are [begin[e], begin[e + 1])
  std::vector<std::int64_t> pair;   ///< [<= T * K]; pair = t * K + k, ascending within an expert
};
/// O(T * K). @throws InvalidArgument  an id outside [0, num_experts) that is not Routing::kUnused
TokenGroups group_tokens(const Routing& routing, std::int64_t num_experts);

/// The definition of group_tokens(): one pass over all pairs per expert.
TokenGroups group_tokens_reference(const Routing& routing, std::int64_t num_experts);

/// y[t] += scale * sum over k of weights[t,k] * expert_{ids[t,k]}(x[t]).
///   bank [E experts]   x [T, D]   y [T, D], added to; must not overlap x
/// Slots with Routing::kUnused are skipped. Adds to y: "replace the FFN" starts from y = 0, "add to
/// a frozen layer" from its output. The bank's down_bias is not added here. Experts without tokens
/// are not touched. The result does not depend on how `parallel` cuts the work, up to float
/// rounding.
/// @throws InvalidArgument  shapes disagree, or an id outside [0, E)
void moe_ffn(const ExpertBank& bank, const Routing& routing, float scale, MatrixView<const float> x,
             MatrixView<float> y, const ParallelFor& parallel);

/// The definition of moe_ffn: plain loops, double accumulators, never optimised. `magnitude`
/// [T, D], if given, receives the sum of |terms| (see linear_reference).
void moe_ffn_reference(const ExpertBank& bank, const Routing& routing, float scale,
                       MatrixView<const float> x, MatrixView<float> y,
                       MatrixView<float> magnitude = {});

/// y[t] += dense FFN(x[t]), output bias included. x [T, D], y [T, D].
/// @throws InvalidArgument  shapes disagree
void dense_ffn(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> y,
               const ParallelFor& parallel);

/// The definition of dense_ffn: as moe_ffn_reference.
void dense_ffn_reference(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> y,
                         MatrixView<float> magnitude = {});

}  // namespace cleave
