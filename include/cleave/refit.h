#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/kernels.h"
#include "cleave/views.h"

namespace cleave {

struct RefitSpec {
  /// Ridge penalty of a feature, relative to its own and to the mean diagonal entry of the Gram
  /// matrix: penalty * (gram[j][j] + mean). Measured: docs/methods/conversion.md.
  double penalty = 0.06;
};

/// Weighted ridge regression towards given weights, streamed over tokens: the closed-form repair.
/// Finds W [F, D] that minimises
///   sum_t weight_t |target_t - W^T features_t|^2 + sum_j penalty_j |W_j - prior_j|^2.
///
/// With features = what the router lets through of an FFN's hidden values, target = the dense FFN's
/// output and prior = the dense `down`, W is the `down` that is best for the routing that really
/// happens, and still plain weights. Where tokens are few, W stays near the prior.
///
/// Holds F * F + F * D floats and those of 512 tokens, whatever the number of tokens. solve() takes
/// F * F + F * D doubles more, and with a prior as many floats: the whole Gram matrix and its
/// product with the prior. One thread calls; `parallel` does the work. Source: ridge regression,
/// Hoerl and Kennard 1970; as repair after removing neurons cf. FLAP, arXiv:2312.11983, and
/// SparseGPT, arXiv:2301.00774.
class RidgeRefit {
 public:
  /// @throws InvalidArgument  a size below 1
  RidgeRefit(std::int64_t num_features, std::int64_t num_outputs);

  /// Adds tokens. features [T, F], target [T, D], weight [T] (>= 0) or empty: 1 each.
  /// @throws InvalidArgument  shapes disagree, or a value is not finite (names the token)
  void observe(MatrixView<const float> features, MatrixView<const float> target,
               std::span<const float> weight, const ParallelFor& parallel);

  std::int64_t num_tokens() const { return tokens_; }
  std::int64_t num_features() const { return features_; }

  /// The weights [F, D], row j of feature j. Features that never were nonzero keep their prior.
  /// @param prior  [F, D], or empty: zeros
  /// @throws InvalidArgument  no token was observed, the shape of `prior` is another, the penalty
  ///                          is not positive
  std::vector<float> solve(MatrixView<const float> prior, const RefitSpec& spec,
                           const ParallelFor& parallel) const;

 private:
  std::int64_t features_ = 0, outputs_ = 0, tokens_ = 0;
  std::vector<float> gram_;   // [F, F], lower blocks only
  std::vector<float> cross_;  // [F, D]
  std::vector<float> scaled_features_, scaled_target_;
};

}  // namespace cleave
