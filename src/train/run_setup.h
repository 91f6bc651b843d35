#pragma once

#include <nlohmann/json.hpp>

#include "cleave/train/recipe.h"
#include "cleave/train/trainer.h"

// What every kind of run begins with and reports, whichever way it goes through the model.
namespace cleave::train {

/// @throws InvalidArgument  a setting makes no sense, a token is outside the vocabulary, a
///                          parameter is on another device or in another type than the settings say
void check_run_input(Transformer model, const Recipe& recipe, const TokenWindows& data,
                     const TokenWindows* held_out, const TrainSpec& spec);

/// What must agree between a checkpoint and the run that resumes from it: everything that the
/// trajectory depends on. Threads are left out (they only move the rounding), and so is what is
/// merely reported.
nlohmann::json run_identity(Transformer model, const Recipe& recipe, const TokenWindows& data,
                            const TrainSpec& spec);

/// A line of metrics.jsonl.
nlohmann::ordered_json metrics_line(const StepReport& report);

}  // namespace cleave::train
