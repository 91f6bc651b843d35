#pragma once

#include <vector>

#include "cleave/regression_router.h"

namespace cleave {

/// Mean squared error of a batch, and its derivatives. Keeps its scratch between calls.
class RegressionLoss {
 public:
  RegressionLoss(std::int64_t batch, std::int64_t width, std::int64_t num_experts);

  /// @param x         [B, D]
  /// @param target    [B, E]
  /// @param gradient  of the router's shapes; written
  /// @return  mean over B and E of (score - target)^2
  double differentiate(const RegressionRouter& router, MatrixView<const float> x,
                       MatrixView<const float> target, RegressionRouter& gradient,
                       const ParallelFor& parallel);

 private:
  std::int64_t batch_, width_, num_experts_;
  std::vector<float> hidden_, hidden_slope_;  // [B, R]
  std::vector<float> score_slope_;            // [B, E]
};

}  // namespace cleave
