#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cleave/model.h"
#include "cleave/text.h"

namespace cleave {

/// How the experts of one layer were used.
struct LayerLoad {
  std::vector<double> share;    ///< [E], share of the (token, expert) pairs that ran; sums to 1
  double entropy = 0.0;         ///< of `share`, in nats; log(E) when the load is even
  double active_experts = 0.0;  ///< mean per token; K, or less with a router threshold
};

/// Quality of a model on a text.
///
/// Convention: disjoint windows of `context` tokens, no BOS added, every token of a window but the
/// first is predicted; perplexity = exp(mean negative log-likelihood over all predicted tokens). KL
/// is the mean over the same positions of KL(reference || model) over the vocabulary, in nats;
/// top-1 agreement is the share of them where both have the same most likely token.
struct EvalResult {
  double perplexity = 0.0;
  double mean_nll = 0.0;
  double kl = 0.0;              ///< 0 without a reference
  double top1_agreement = 1.0;  ///< 1 without a reference
  bool has_reference = false;
  std::int64_t windows = 0;
  std::int64_t tokens = 0;            ///< that were run: windows * context
  std::int64_t predicted_tokens = 0;  ///< windows * (context - 1)
  double elapsed_s = 0.0;             ///< the model alone, without the reference
  double tokens_per_s = 0.0;
  double reference_tokens_per_s = 0.0;
  std::vector<LayerLoad> load;  ///< per layer; empty entries for dense layers
  double active_experts = 0.0;  ///< mean over the tokens and the layers with experts; 0: none has
};

/// @param reference  the dense model to compare with, or nullptr; V must agree
/// @param progress   called after each window with (windows done, windows in all, perplexity so
/// far)
/// @throws InvalidArgument  vocabularies differ, or a token id is outside them
EvalResult evaluate(Model& model, const TokenWindows& text, Model* reference = nullptr,
                    const std::function<void(std::int64_t, std::int64_t, double)>& progress = {});

}  // namespace cleave
