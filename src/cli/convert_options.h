#pragma once

#include <string>
#include <vector>

#include "cli/cli.h"

namespace cleave::cli {

/// --calibration-tokens of a conversion to a budget, unless they are given.
inline constexpr std::int64_t kBudgetCalibrationTokens = 32768;

struct ConvertOptions {
  CommonOptions common;
  std::string model, out;
  std::string experts = "auto";
  std::string shared = "auto";
  std::int64_t active = 4;
  double active_share = 0.0;  // 0: experts and active say what runs
  std::string partition = "auto";
  std::string router = "trained";
  std::string refit = "on";
  std::int64_t refit_rounds = BudgetSpec{}.refit_rounds;
  std::string allocation = "uniform";
  std::string calibration_mode = "sequential";
  double correction = BudgetSpec{}.correction;
  double rare_tokens = BudgetSpec{}.rare_tokens;
  double penalty = RefitSpec{}.penalty;
  std::string gate = "auto";
  std::string scale = "fitted";
  std::vector<std::string> calibration;
  std::vector<double> calibration_weights;  // one for each; empty: equal
  std::int64_t calibration_tokens = 0;      // 0: as the mode likes it
  std::string self_calibration = "auto";
  std::int64_t context = 0;
  std::string dtype = "auto";
  std::string baselines = "none";
  std::string report;             // directory; empty: OUT/report
  std::vector<std::string> text;  // held-out, of the report
  bool overwrite = false;
};

/// Refuses options that do not go together, before any work.
void check_combination(const ConvertOptions& options, const CLI::App& command);
/// What depends on the model: an encoder writes no text to calibrate on, and has as many positions
/// as it learned. @throws InvalidArgument  it is to write some, or has no other text
void settle_text(const ModelConfig& config, const CLI::App& command, ConvertOptions& options);
/// What the report at the end needs is asked for before the work begins.
void check_report(const ConvertOptions& options, const CLI::App& command, const Checkpoint& source);

/// A conversion as FactorLLM does. @throws InvalidArgument  an unknown name
ConvertSpec make_spec(const ConvertOptions& options);
/// A conversion to a budget. @param hidden  H of the model
BudgetSpec make_budget(const ConvertOptions& options, std::int64_t hidden);
/// What cleave.json records.
Json settings_json(const ConvertOptions& options);

/// The calibration text: for a budget text_of_files(), else the files joined. What the model writes
/// itself follows.
/// @param notices  receives what a user should know
TokenWindows calibration_text(const Checkpoint& source, const ConvertOptions& options,
                              Progress& progress, std::vector<std::string>& notices);
/// Tokens that the model writes itself: as asked for, or all where a budget has no other text.
std::int64_t self_calibration_tokens(const ConvertOptions& options);
/// Whether there is any calibration text.
bool is_calibrated(const ConvertOptions& options);

}  // namespace cleave::cli
