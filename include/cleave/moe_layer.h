#pragma once

#include <cstdint>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/routing.h"
#include "cleave/views.h"

namespace cleave {

/// Experts + router: what replaces one dense FFN, and what an engine holds per layer.
///
/// y = scale * sum over the K selected e of weight_e * expert_e(x) + shared(x) + down_bias. With
/// kSoftmax the weights sum to 1, so `scale` is E to start with (all experts on and a zero router
/// then equal the dense FFN exactly); with kHard the weights are 1 and `scale` is E / K. Writing a
/// model folds `scale` into `down`.
struct MoeLayer {
  ExpertBank experts;  ///< E of them; its down_bias is the layer's
  LinearRouter router;
  std::int64_t experts_per_token = 1;  ///< K
  GateMode gate = GateMode::kSoftmax;
  float scale = 1.0f;
  /// The shared experts, as one slice of S * I neurons that every token goes through: weight 1, not
  /// multiplied by `scale`, no down_bias. Without rows: none.
  ExpertBank shared{};

  /// y[t] += MoE(x[t]). x [T, D], y [T, D]. Concurrent calls are safe.
  /// @param routing_out  if given, receives the routing of this call (for load statistics)
  /// @throws InvalidArgument  shapes disagree, a router logit is NaN, or `shared` is not one slice
  void forward(MatrixView<const float> x, MatrixView<float> y, const ParallelFor& parallel,
               Routing* routing_out = nullptr) const;
  /// The same with a routing from elsewhere (an oracle's, say) in the router's place.
  /// @throws InvalidArgument  shapes disagree, an id is outside [0, E) and not Routing::kUnused, or
  ///                          `shared` is not one slice
  void forward_routed(MatrixView<const float> x, const Routing& routing, MatrixView<float> y,
                      const ParallelFor& parallel) const;
};

}  // namespace cleave
