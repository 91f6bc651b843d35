#pragma once

#include <string>

#include "cleave/train/recipe.h"
#include "cleave/train/trainer.h"

// What several recipes are made of.
namespace cleave::train {

/// Next-token loss inside each window; the last position has nothing to predict.
LossTerm language_model_term(double weight);

/// KL of the teacher's logits to the student's, mean over all positions. Also the last one of a
/// window: the teacher predicts a token there that the window need not hold.
LossTerm distill_term(double weight, Transformer teacher);

/// @throws InvalidArgument  the teacher holds experts, or has other shapes than the student
void check_teacher(const char* recipe, const Transformer& student, const Transformer& teacher);

/// Brings cleave.json's record up to date: gate, router "trained", and the settings: `method` (an
/// object) under the recipe's name, the trainer's under "train".
void record_settings(TrainResult& result, const char* recipe, const std::string& method,
                     const TrainSpec& spec);

}  // namespace cleave::train
