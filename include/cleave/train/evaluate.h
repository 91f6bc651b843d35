#pragma once

#include <cstdint>

#include "cleave/text.h"
#include "cleave/train/transformer.h"

namespace cleave::train {

/// Quality on held-out text, with the convention of cleave::evaluate: disjoint windows, every token
/// of a window but the first is predicted, perplexity = exp(mean negative log-likelihood), KL the
/// mean over the same positions of KL(reference || model) in nats.
struct HeldOutQuality {
  double perplexity = 0.0;
  double mean_nll = 0.0;  ///< nats
  double kl = 0.0;        ///< 0 without a reference
  bool has_kl = false;
  std::int64_t predicted_tokens = 0;
};

/// @param max_tokens  use only so many tokens, in whole windows, at least one; 0: all
/// @param batch       windows per forward pass
/// @param reference   the dense model, or nullptr
HeldOutQuality evaluate(TransformerImpl& model, const TokenWindows& text, std::int64_t max_tokens,
                        std::int64_t batch, TransformerImpl* reference = nullptr);

}  // namespace cleave::train
