#pragma once

#include <string>
#include <vector>

#include "cli/cli.h"

namespace cleave::cli {

/// What `cleave report` measures, and `cleave convert --baselines` after writing.
struct ReportOptions {
  CommonOptions common;
  std::string model, dense;
  std::vector<std::string> text, calibration;
  std::vector<double> calibration_weights;  ///< one for each; empty: equal
  std::string baselines = "quick";
  std::string out;  ///< a directory
  std::int64_t context = 1024;
  std::int64_t limit_tokens = 16384;  ///< of each text; 0: all
  std::int64_t calibration_tokens = 65536;
  std::int64_t self_calibration = 0;  ///< tokens that the dense model writes, after the text
};

/// The value of --baselines. @throws InvalidArgument  lists the choices
BaselineSet baseline_set(const std::string& value);

/// A report as it is printed. It has been written to ReportOptions::out.
struct WrittenReport {
  Json json;
  std::string text;
};

/// Measures both models and the baselines, and writes report.json, .md and .html.
/// @param calibration  what the baselines are fitted on; nullptr: none are
WrittenReport measure_and_write(const ReportOptions& options, const Checkpoint& converted,
                                const Tokenizer& tokenizer, const TokenWindows* calibration,
                                Progress& progress);

}  // namespace cleave::cli
