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

/// How near a model is to another, and how good by itself.
///
/// Of a model with a head: KL is the mean over the predicted positions of KL(reference || model)
/// over the vocabulary, in nats; top-1 agreement is the share of them where both have the same most
/// likely token. Of one without (ModelConfig::has_head), whose final hidden states are its result:
/// the cosine distance is the mean over all tokens of 1 - cos(reference's, model's hidden state);
/// the pooled one is the mean over windows of the same of the windows' embeddings, each the mean of
/// its hidden states. Neither changes when hidden states are multiplied by a positive number.
struct Quality {
  double perplexity = 0.0;
  double kl = 0.0;              ///< 0 without a reference
  double top1_agreement = 1.0;  ///< 1 without a reference
  double cosine_distance = 0.0;
  double pooled_distance = 0.0;
  bool has_head = true;  ///< false: of these figures only the two distances were measured

  /// What everything in cleave that compares models goes by: 0 is best.
  double divergence() const { return has_head ? kl : cosine_distance; }
};
/// "KL" or "cosine distance": what divergence() is.
const char* divergence_name(bool has_head);

/// Quality of a model on a text.
///
/// Convention: disjoint windows of `context` tokens. With a head no BOS is added, and every token
/// of a window but the first is predicted; perplexity = exp(mean negative log-likelihood over all
/// predicted tokens).
struct EvalResult : Quality {
  double mean_nll = 0.0;
  bool has_reference = false;
  std::int64_t windows = 0;
  std::int64_t tokens = 0;            ///< that were run: windows * context
  std::int64_t predicted_tokens = 0;  ///< windows * (context - 1); 0 without a head
  double elapsed_s = 0.0;             ///< the model alone, without the reference
  double tokens_per_s = 0.0;
  double reference_tokens_per_s = 0.0;
  std::vector<LayerLoad> load;  ///< per layer; empty entries for dense layers
  double active_experts = 0.0;  ///< mean over the tokens and the layers with experts; 0: none has
};

/// Final norm outputs of a model on a text: what its head turns into logits, if it has one. 4 * D
/// bytes a token, where the logits would take 4 * V: with them, many variants are compared with one
/// dense model that runs once.
struct HiddenStates {
  std::int64_t d_model = 0;   ///< D
  std::vector<float> values;  ///< [tokens, D], window after window
};

/// One forward pass over all windows. @throws InvalidArgument  as evaluate()
HiddenStates hidden_states(Model& model, const TokenWindows& text, const ForwardHooks& hooks = {});

/// Called after each window with (windows done, windows in all, perplexity so far, or without a
/// head the cosine distance).
using EvalProgress = std::function<void(std::int64_t, std::int64_t, double)>;

/// What a model is evaluated with. Nothing is owned.
struct EvalSpec {
  /// The dense model to compare with; V must agree, and without a head D. May be the model.
  Model* reference = nullptr;
  /// Of `reference` on this text: it then computes logits at most.
  const HiddenStates* reference_states = nullptr;
  /// Of the model itself on this text: it then computes logits at most, and `load` stays empty.
  const HiddenStates* states = nullptr;
  ForwardHooks hooks = {};  ///< watch the model, or replace its FFNs
  EvalProgress progress = {};
};

/// @throws InvalidArgument  vocabularies differ, a token id is outside them, states are not of this
///                          text and model, one model has a head and the other none, or neither has
///                          one and there is no reference or one of another D
EvalResult evaluate(Model& model, const TokenWindows& text, const EvalSpec& spec);

/// @param reference  the dense model to compare with; nullptr: none, which needs a head
EvalResult evaluate(Model& model, const TokenWindows& text, Model* reference = nullptr,
                    const EvalProgress& progress = {});

}  // namespace cleave
