// The last router of a layer in a conversion to a budget.

#include <algorithm>
#include <cmath>

#include "capture.h"
#include "partition_cmoe.h"
#include "train_router.h"

namespace cleave {
namespace {

constexpr std::int64_t kDefaultRank = 32;

LinearRouter make_router(const LayerTokens& tokens, const CaptureSpec& spec,
                         const NeuronPartition& partition, MatrixView<const float> energy,
                         const LinearRouter& ridge, const ParallelFor& parallel) {
  switch (spec.router) {
    case RouterMethod::kTrained:
      return train_router(tokens.input, energy, spec.active, ridge, spec.training, parallel);
    case RouterMethod::kLogistic:
      return logistic_router(tokens.input, energy, spec.active, ridge, spec.training, parallel);
    case RouterMethod::kLowRank:
      return low_rank_router(
          tokens.input, ridge,
          spec.router_rank > 0 ? spec.router_rank : default_router_rank(spec.experts), parallel);
    case RouterMethod::kMeanGate:
      return mean_gate_router(tokens.ffn, partition);
    case RouterMethod::kRepresentative:
      return representative_router(
          tokens.ffn, representative_neurons({HiddenSample(tokens).view().hidden}, partition,
                                             std::min(kCmoeTopNeurons, tokens.hidden.cols)));
    case RouterMethod::kRidge:
      break;
  }
  return ridge;
}

}  // namespace

std::int64_t default_router_rank(std::int64_t experts) {
  return std::min(kDefaultRank, std::max<std::int64_t>(1, experts / 2));
}

LinearRouter final_router(const LayerTokens& tokens, const CaptureSpec& spec,
                          const NeuronPartition& partition, MatrixView<const float> energy,
                          const LinearRouter& ridge, const ParallelFor& parallel) {
  LinearRouter router = make_router(tokens, spec, partition, energy, ridge, parallel);
  normalise_logits(tokens.input, router, spec.logit_spread, parallel);
  return router;
}

}  // namespace cleave
