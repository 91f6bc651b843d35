#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/train/recipes.h"
#include "cleave/train/trainer.h"
#include "cli/cli.h"

// The command line of `cleave train`, and the settings that it means.
namespace cleave::cli {

/// An option that not all recipes know.
struct OwnedOption {
  const CLI::Option* option;
  std::vector<std::string> recipes;
};

struct TrainOptions {
  CommonOptions common;
  std::string model, out, teacher;
  std::vector<std::string> data, held_out;
  std::string recipe = "auto";
  std::string phase = "joint";
  std::string parts = "ffn";
  std::int64_t steps = 200;
  std::optional<std::int64_t> context;  // defaults: the recipe's
  std::int64_t limit_tokens = 0;
  std::int64_t held_out_windows = 16;
  std::string pa_form = "router-first", labels = "per-expert", balance = "switch", gate = "keep";
  std::string precision = "f32", device = "cpu", dtype = "auto", run_dir;
  bool resume = false, overwrite = false;
  std::optional<double> lm_weight, distill_weight, weight_decay;  // defaults: the recipe's
  bool hard_routers = false;
  train::FactorLlmSpec factorllm;
  train::DistillSpec distill;
  train::LayerwiseSpec layerwise;
  train::TrainSpec train;
  std::optional<std::int64_t> batch, warmup;  // defaults: the recipe's
  std::optional<double> learning_rate, min_lr_ratio, beta2;
  std::vector<OwnedOption> owned;
};

void add_train_options(CLI::App& command, TrainOptions& options);

/// The recipe to run; an option that it does not know is an error, not silence.
std::string choose_recipe(const TrainOptions& options, const Checkpoint& student);

std::int64_t context_length(const TrainOptions& options, const std::string& recipe);
train::TrainSpec make_train_spec(const TrainOptions& options, const std::string& recipe);
train::FactorLlmSpec factorllm_spec(const TrainOptions& options);
train::DistillSpec distill_spec(const TrainOptions& options);
train::LayerwiseSpec layerwise_spec(const TrainOptions& options);

}  // namespace cleave::cli
