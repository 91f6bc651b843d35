#pragma once

#include <string>
#include <vector>

#include "cli/cli.h"

namespace cleave::cli {

/// Text files, of which each gives its part of `tokens` in whole windows, so that a long one does
/// not push out the others.
struct FileShares {
  std::vector<std::string> files;
  std::vector<double> weights;  ///< one for each; empty: equal
  std::int64_t tokens = 0;      ///< in all; 0: all of each file
  std::int64_t context = 0;
};
/// @throws InvalidArgument  --calibration-weights that are not one for each file, or divide nothing
void check_file_shares(const FileShares& shares);
/// @param notices  receives which file has less than its part
/// @throws InvalidArgument  a file's part is less than a window
TokenWindows text_of_files(const ModelConfig& config, const Tokenizer& tokenizer,
                           const FileShares& shares, std::vector<std::string>& notices);

/// How reports name what add_self_text() adds.
inline constexpr const char* kSelfTextName = "the model's own text";
/// @throws InvalidArgument  --self-calibration is neither 0 nor a window
void check_self_text(std::int64_t tokens, std::int64_t context);
/// Whole windows of text that a dense model writes itself, at most `tokens`, after `text`, whose
/// last window is cut where it is not whole.
void add_self_text(const Checkpoint& source, const CommonOptions& common, std::int64_t tokens,
                   Progress& progress, TokenWindows& text);

}  // namespace cleave::cli
