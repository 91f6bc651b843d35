#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cleave/cleave.h"

// What the subcommands share. One subcommand per file; each adds itself to the application and runs
// from its callback. Results go to stdout, everything else to stderr; with --json stdout carries
// exactly one JSON object.
namespace cleave::cli {

// Insertion order is kept, so that what is read first comes first.
using Json = nlohmann::ordered_json;

/// Options that most subcommands take.
struct CommonOptions {
  bool json = false;
  bool quiet = false;
  int threads = 0;
  std::uint64_t seed = 0;
};

/// Adds --json, --quiet and --threads.
void add_common_options(CLI::App& command, CommonOptions& common);
void add_seed_option(CLI::App& command, CommonOptions& common, const std::string& what);
/// `[1.23e-05]`-free numbers for people: 135.2M, 98.4 MB.
std::string human_count(double value);
std::string human_bytes(double value);
std::string human_seconds(double seconds);

/// Progress on stderr: one line that is rewritten on a terminal, plain lines now and then
/// elsewhere. Silent with --quiet.
class Progress {
 public:
  explicit Progress(bool quiet);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// `last`: this line stays, whatever the medium.
  void update(const std::string& line, bool last = false);
  void note(const std::string& line);

 private:
  void clear_line();
  bool quiet_;
  bool terminal_;
  bool open_line_ = false;
  double last_plain_s_ = -1e9;
};

/// Prints `result` on stdout with --json, else `text`.
void print_result(const CommonOptions& common, const Json& result, const std::string& text);

/// Text files (joined by a blank line) as windows of what a model reads.
TokenWindows load_windows(const ModelConfig& config, const Tokenizer& tokenizer,
                          const std::vector<std::string>& files, std::int64_t context,
                          std::int64_t limit_tokens);

/// Adds an option NAME W W ... (or W,W,...) of one positive weight for each text.
void add_text_weights_option(CLI::App& command, const std::string& name,
                             std::vector<double>& weights, const std::string& description);
/// @throws InvalidArgument  there are weights, but not one for each text; or one is not above 0, or
///                          they or their sum are not finite
void check_text_weights(const std::string& name, const std::vector<double>& weights,
                        std::size_t texts);

/// Parses a name out of `names` for an option's value. @throws InvalidArgument  lists the choices
template <typename T, std::size_t N>
T parse_name(const std::string& option, const std::string& value,
             const std::pair<const char*, T> (&names)[N]) {
  std::string all;
  for (const auto& [name, result] : names) {
    if (value == name) return result;
    all += (all.empty() ? "" : ", ") + std::string(name);
  }
  throw InvalidArgument(option + ": unknown value '" + value + "'; choose one of " + all);
}
std::optional<DType> parse_dtype(const std::string& value);

/// Neurons that always run: "384", or "256 to 512" where layers differ.
std::string shared_text(const ModelConfig& config);

/// Options of the commands that run a model.
struct ModelOptions {
  std::string weights = "auto";
  std::string cache = "auto";
  float router_threshold = 0.0f;
  std::int64_t active = 0;    // K; 0: the model's
  double active_share = 0.0;  // the K nearest to this share of the neurons; 0: not given
};
/// Adds --weights, --cache, --router-threshold, --active and --active-share.
void add_model_options(CLI::App& command, ModelOptions& options);
/// What they ask for. Weights "auto": the type that the FFN is stored in; f16 where that is
/// quantised. Notices of the loading go to stderr, but for --quiet.
ModelSpec model_spec(const ModelOptions& options, const CommonOptions& common,
                     const Checkpoint& checkpoint);

/// Whether a model can write text: not so an encoder, which gives hidden states.
bool writes_text(const ModelConfig& config);
/// @throws InvalidArgument  the model cannot do what `command` does
void require_text_writer(const std::string& command, const Checkpoint& checkpoint);
/// --context where it is not given: `automatic`, or as many tokens as there are learned positions.
std::int64_t default_context(std::int64_t automatic, const ModelConfig& config);

void add_inspect_command(CLI::App& app);
void add_calibrate_command(CLI::App& app);
void add_convert_command(CLI::App& app);
void add_train_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_report_command(CLI::App& app);
void add_run_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_tokenize_command(CLI::App& app);
void add_logits_command(CLI::App& app);

}  // namespace cleave::cli
