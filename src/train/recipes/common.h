#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/train/recipe.h"
#include "cleave/train/recipes.h"
#include "cleave/train/trainer.h"

// What several recipes are made of.
namespace cleave::train {

/// Next-token loss inside each window; the last position has nothing to predict.
LossTerm language_model_term(double weight);

/// KL of the teacher's logits to the student's, mean over all positions. Also the last one of a
/// window: the teacher predicts a token there that the window need not hold.
LossTerm distill_term(double weight, Transformer teacher);

/// Appends the parameters of one layer that `parts` asks for: "layers.3.experts.up".
void collect_layer_parameters(const DistillParts& parts, std::int64_t index,
                              const DecoderLayer& layer, std::vector<Parameter>& all);

/// The soft border of a hard gate (GateSpec::border_temperature), 0: off; nothing for other gates.
void set_soft_border(MoeFfnImpl& moe, double temperature);

/// @throws InvalidArgument  the teacher holds experts, or has other shapes than the student
void check_teacher(const char* recipe, const Transformer& student, const Transformer& teacher);

/// Brings cleave.json's record up to date: gate, router "trained", and the settings: `method` (an
/// object) under the recipe's name, the trainer's under "train".
void record_settings(TrainResult& result, const char* recipe, const std::string& method,
                     const TrainSpec& spec);

}  // namespace cleave::train
