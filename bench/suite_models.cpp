#include "suite_models.h"

#include <fmt/format.h>

#include "converted_model.h"
#include "model_ways.h"

namespace cleave::bench {
namespace {

// As scripts/fetch_models.sh leaves them.
constexpr const char* kModel = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
constexpr const char* kText = "models/jargon.train.txt";
constexpr const char* kNoModel =
    "no models/SmolLM2-135M-Instruct.Q4_1.gguf here; run scripts/fetch_models.sh, or give --model";

/// Calibrated as documented where the text is there.
std::filesystem::path calibration_text() {
  if (std::filesystem::exists(kText)) return kText;
  fmt::print(stderr, "no {} here (scripts/fetch_models.sh brings it): routers are not fitted\n",
             kText);
  return {};
}

}  // namespace

SuiteModels::SuiteModels(const SuiteOptions& options) : options_(options) {
  if (!wanted()) return;
  if (!options.model.empty())
    dense_ = Checkpoint::open(options.model);
  else if (std::filesystem::exists(kModel))
    dense_ = Checkpoint::open(kModel);
  if (!options.converted.empty()) converted_ = Checkpoint::open(options.converted);
  if (dense_) check_models(*dense_, converted_ ? &*converted_ : nullptr);
  if (converted_ && !dense_)
    throw InvalidArgument(fmt::format(
        "--converted {}: no {} here that it was made of; give --model", options.converted, kModel));
}

void SuiteModels::measure(GoalTable& table, const ParallelFor& parallel) const {
  if (!wanted()) return;
  // Twice those of bench_end_to_end: generation speeds differ by a tenth from round to round.
  ModelWays ways({.threads = parallel.threads, .rounds = 15});
  std::optional<ConvertedModel> made;
  if (dense_) {
    ways.add_dense(*dense_);
    if (converted_) ways.add_converted(*converted_, false);
    if (!converted_ && options_.wants("E1")) {
      fmt::print(stderr, "converting {}: 2 of 8 experts\n", dense_->path().string());
      made.emplace(*dense_, calibration_text(), parallel.threads);
      ways.add_converted(Checkpoint::open(made->path()), false);
    }
    ways.measure();
  }
  for (const ModelGoal& goal : model_goals()) {
    if (!options_.wants(goal.goal.row)) continue;
    if (dense_)
      ways.report(table, parallel, goal);
    else
      table.add_not_measured(goal.goal, kNoModel);
  }
}

}  // namespace cleave::bench
