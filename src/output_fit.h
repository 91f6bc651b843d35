#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/routing.h"

namespace cleave {

/// How a router's logits and a layer's output are stretched so that MoE(x) comes nearest to FFN(x).
struct OutputFit {
  double temperature = 1.0;     ///< multiplies the router; 1 for hard gates
  double scale = 1.0;           ///< MoeLayer::scale
  double relative_error = 0.0;  ///< mean over the sample of |MoE - FFN|^2 / |FFN|^2
};

/// Which K experts a router picks for each token of a sample, and all inner products that the error
/// of any weights needs: |s * sum_k w_k o_k - y|^2 / |y|^2 = s^2 w'Gw - 2 s w'c + 1, with G and c
/// divided by |y|^2. Relative, because few tokens with huge outputs would otherwise decide alone
/// (docs/decisions/0004-output-scale.md).
///
/// K * K + 2 * K doubles a token, however wide the model.
class OutputSample {
 public:
  /// x [T, D]: the FFN's inputs. y is the sum of all experts: the dense FFN without its bias.
  OutputSample(const ExpertBank& bank, const LinearRouter& router, std::int64_t experts_per_token,
               MatrixView<const float> x, const ParallelFor& parallel);

  /// @param fixed_scale  unset: the best one, in closed form
  OutputFit fit(GateMode gate, std::optional<double> fixed_scale) const;

 private:
  struct Error {
    double weighted_square = 0.0;  // sum over tokens of w'Gw
    double weighted_cross = 0.0;   // of w'c
  };
  Error error_at(GateMode gate, double temperature) const;
  OutputFit fit_scale(GateMode gate, double temperature, std::optional<double> fixed_scale) const;
  double logit_spread() const;
  void add_block(const ExpertBank& bank, const LinearRouter& router, MatrixView<const float> x,
                 const ParallelFor& parallel);

  std::int64_t k_ = 0;
  std::vector<double> logits_;  // [T, K], of the selected experts, falling
  std::vector<double> gram_;    // [T, K, K]
  std::vector<double> cross_;   // [T, K]
  std::int64_t tokens_ = 0;     // T, without those whose y is 0
};

}  // namespace cleave
