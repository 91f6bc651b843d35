#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cleave/train/moe_ffn.h"
#include "cleave/train/transformer.h"

namespace cleave::train {

// A method is a recipe: which tensors learn, from which losses, in which order. A new method adds
// one function that returns a Recipe (recipes.h), no class and no case in the trainer.

/// A tensor that some phase of the recipe trains.
struct Parameter {
  std::string name;  ///< "layers.3.router", "layers.3.experts.up"
  at::Tensor tensor;
  bool decay = true;             ///< weight decay applies
  std::string no_gradient_hint;  ///< appended to the error when it should learn and cannot
};

/// What one forward pass leaves for the losses.
struct StepOutputs {
  at::Tensor tokens;               ///< int64 [B, T]
  at::Tensor logits;               ///< [B, T, V], with gradient
  std::vector<MoeOutputs> layers;  ///< one per MoE layer, in order
  std::int64_t step = 0;           ///< from 0
};

/// Numbers for the log beside the losses ("label_agreement"), by name.
using Metrics = std::vector<std::pair<std::string, double>>;

/// One term of the loss: total = sum of weight * value.
struct LossTerm {
  std::string name;
  double weight = 1.0;
  /// Scalar with gradient. May add to the metrics.
  std::function<at::Tensor(const StepOutputs&, Metrics&)> value;
};

/// One stretch of training: who learns, and from what.
struct Phase {
  std::string name;
  std::int64_t steps = 0;
  std::function<bool(const Parameter&)> trains;
  std::vector<LossTerm> losses;
};

struct Recipe {
  std::string name;
  std::vector<Parameter> parameters;  ///< all that any phase trains; every other weight is frozen
  std::vector<Phase> phases;          ///< in order
  Transformer reference{nullptr};     ///< held-out KL is measured against it; frozen; may be empty
  /// Its own settings as a JSON object: kept in checkpoints, compared when a run is resumed.
  std::string spec_json = "{}";

  std::int64_t total_steps() const;
};

}  // namespace cleave::train
