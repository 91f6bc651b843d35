#include "cli/calibration_text.h"

#include <fmt/format.h>

#include <cmath>
#include <numeric>

#include "cleave/self_text.h"

namespace cleave::cli {
namespace {

/// Whole windows of each file; 0: all it has.
std::vector<std::int64_t> windows_of(const FileShares& of) {
  std::vector<double> weights = of.weights;
  if (weights.empty()) weights.assign(of.files.size(), 1.0);
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const auto windows = static_cast<double>(of.tokens / of.context);
  // A share that is whole but for rounding is whole: 0.7 + 0.1 is a little less than 0.8.
  const auto windows_before = [&](double weight) {
    return static_cast<std::int64_t>(std::floor(windows * (weight / total) + 1e-9));
  };
  std::vector<std::int64_t> shares;
  double before = 0.0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double after = before + weights[i];
    shares.push_back(windows_before(after) - windows_before(before));
    before = after;
    if (of.tokens > 0 && shares.back() == 0)
      throw InvalidArgument(fmt::format(
          "--calibration-tokens: {} are fewer than one window of {} for each of {} files: {} gets "
          "none",
          of.tokens, of.context, weights.size(), of.files[i]));
  }
  return shares;
}

}  // namespace

void check_file_shares(const FileShares& shares) {
  check_text_weights("--calibration-weights", shares.weights, shares.files.size());
  if (!shares.weights.empty() && shares.tokens == 0)
    throw InvalidArgument(
        "--calibration-weights divide --calibration-tokens among the texts, and 0 takes all of "
        "each; give a number of tokens, or no weights");
}

TokenWindows text_of_files(const ModelConfig& config, const Tokenizer& tokenizer,
                           const FileShares& shares, std::vector<std::string>& notices) {
  const std::vector<std::int64_t> windows = windows_of(shares);
  TokenWindows all;
  all.context = shares.context;
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const std::string& file = shares.files[i];
    TokenWindows part =
        load_windows(config, tokenizer, {file}, shares.context, windows[i] * shares.context);
    part.tokens.resize(static_cast<std::size_t>(part.count() * part.context));
    all.before = part.before;
    all.after = part.after;
    all.tokens.insert(all.tokens.end(), part.tokens.begin(), part.tokens.end());
    if (part.count() < windows[i])
      notices.push_back(fmt::format("{} has {} windows of {} tokens, fewer than its share of {}",
                                    file, part.count(), shares.context, windows[i]));
  }
  return all;
}

void check_self_text(std::int64_t tokens, std::int64_t context) {
  if (tokens > 0 && tokens < context)
    throw InvalidArgument(
        fmt::format("--self-calibration: {} tokens are less than one window of {}; give 0 or more "
                    "than that, or a smaller --context",
                    tokens, context));
}

void add_self_text(const Checkpoint& source, const CommonOptions& common, std::int64_t tokens,
                   Progress& progress, TokenWindows& text) {
  const std::int64_t windows = tokens / text.context;
  if (windows == 0) return;
  // Half the memory to read for each token, and text is drawn from what rounding hardly moves.
  Model model = Model::load(source, {.threads = common.threads, .weights = WeightType::kBF16});
  const TokenWindows own = self_generated_text(
      model, {.windows = windows, .context = text.context, .seed = common.seed},
      [&](std::int64_t done, std::int64_t all) {
        progress.update(fmt::format("writing calibration text {}/{}", done, all), done == all);
      });
  text.tokens.resize(static_cast<std::size_t>(text.count() * text.context));
  text.tokens.insert(text.tokens.end(), own.tokens.begin(), own.tokens.end());
}

}  // namespace cleave::cli
