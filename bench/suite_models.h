#pragma once

#include <optional>

#include "cleave/cleave.h"
#include "goal_table.h"
#include "suite.h"

namespace cleave::bench {

/// The rows about whole models: C7 beside llama.cpp, E1.
class SuiteModels {
 public:
  /// Opens the models that are asked for.
  /// @throws InvalidArgument, FileError  they are not such models, or a file is missing
  explicit SuiteModels(const SuiteOptions& options);
  /// Converts first, where no converted model was given.
  void measure(GoalTable& table, const ParallelFor& parallel) const;

 private:
  bool wanted() const { return options_.wants("C7") || options_.wants("E1"); }
  const SuiteOptions& options_;
  std::optional<Checkpoint> dense_, converted_;
};

}  // namespace cleave::bench
