#include "cli/cli.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>

namespace cleave::cli {

void add_common_options(CLI::App& command, CommonOptions& common) {
  command.add_flag("--json", common.json, "Print one JSON object on stdout and nothing else there");
  command.add_flag("-q,--quiet", common.quiet, "No progress on stderr");
  command.add_option("-t,--threads", common.threads, "Threads; 0: one per core")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
}

void add_seed_option(CLI::App& command, CommonOptions& common, const std::string& what) {
  command.add_option("--seed", common.seed, "Seed of " + what)->capture_default_str();
}

std::string human_count(double value) {
  const char* units[] = {"", "k", "M", "B", "T"};
  int unit = 0;
  while (value >= 1000.0 && unit < 4) {
    value /= 1000.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f}", value) : fmt::format("{:.4g}{}", value, units[unit]);
}

std::string human_bytes(double value) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (value >= 1000.0 && unit < 4) {
    value /= 1000.0;
    ++unit;
  }
  return fmt::format("{:.4g} {}", value, units[unit]);
}

std::string human_seconds(double seconds) {
  const auto s = static_cast<std::int64_t>(seconds + 0.5);
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
}

namespace {

double now_s() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

}  // namespace

Progress::Progress(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() { clear_line(); }

void Progress::clear_line() {
  if (open_line_) std::fputs("\r\033[K", stderr);
  open_line_ = false;
}

void Progress::update(const std::string& line, bool last) {
  if (quiet_) return;
  if (terminal_) {
    fmt::print(stderr, "\r{}\033[K{}", line, last ? "\n" : "");
    open_line_ = !last;
  } else {
    // A log file wants a line every few seconds, not every step.
    constexpr double kPlainInterval = 10.0;
    if (!last && now_s() - last_plain_s_ < kPlainInterval) return;
    last_plain_s_ = now_s();
    fmt::print(stderr, "{}\n", line);
  }
  std::fflush(stderr);
}

void Progress::note(const std::string& line) {
  if (quiet_) return;
  clear_line();
  fmt::print(stderr, "{}\n", line);
}

void print_result(const CommonOptions& common, const Json& result, const std::string& text) {
  if (common.json) {
    std::cout << result.dump(2) << '\n';
  } else {
    std::cout << text;
    if (!text.empty() && text.back() != '\n') std::cout << '\n';
  }
  std::cout.flush();
  if (!std::cout) throw Error("stdout: the result could not be written (disk full or pipe closed)");
}

TokenWindows load_windows(const ModelConfig& config, const Tokenizer& tokenizer,
                          const std::vector<std::string>& files, std::int64_t context,
                          std::int64_t limit_tokens) {
  std::string text, names;
  for (const std::string& file : files) {
    if (!text.empty()) text += "\n\n";
    text += read_text(file);
    names += (names.empty() ? "" : ", ") + file;
  }
  return model_windows(config, tokenizer, text, context, limit_tokens, names);
}

void add_text_weights_option(CLI::App& command, const std::string& name,
                             std::vector<double>& weights, const std::string& description) {
  command.add_option(name, weights, description)->delimiter(',')->check(CLI::PositiveNumber);
}

void check_text_weights(const std::string& name, const std::vector<double>& weights,
                        std::size_t texts) {
  if (!weights.empty() && weights.size() != texts)
    throw InvalidArgument(
        fmt::format("{}: {} weights for {} texts; give one for each", name, weights.size(), texts));
  double sum = 0.0;
  for (const double weight : weights) {
    sum += weight;
    if (!(weight > 0.0) || !std::isfinite(sum))  // NaN as well
      throw InvalidArgument(fmt::format(
          "{}: {} is not a weight; give finite numbers above 0, of a finite sum", name, weight));
  }
}

std::optional<DType> parse_dtype(const std::string& value) {
  if (value == "auto") return std::nullopt;
  constexpr std::pair<const char*, DType> kNames[] = {
      {"f32", DType::kF32}, {"bf16", DType::kBF16}, {"f16", DType::kF16}};
  return parse_name("--dtype", value, kNames);
}

void add_model_options(CLI::App& command, ModelOptions& options) {
  command
      .add_option(
          "--weights", options.weights,
          "Weights in memory: f32, bf16, f16, int8, int4, or auto (as stored; f16 if that is "
          "quantised)")
      ->capture_default_str();
  command
      .add_option(
          "--cache", options.cache,
          "Packed weights on disk: auto (use the file beside the model if there is one), on "
          "(write it where it is missing), off, or the FILE to use and to write")
      ->capture_default_str();
  command
      .add_option("--router-threshold", options.router_threshold,
                  "Use only experts with at least this share of the largest gate probability; 0: "
                  "always K")
      ->capture_default_str();
  CLI::Option* active =
      command
          .add_option("--active", options.active,
                      "Experts that run per token, whatever the model was made for; 0: its own K")
          ->check(CLI::NonNegativeNumber);
  command
      .add_option("--active-share", options.active_share,
                  "The same as a share of the FFN's neurons, shared ones included; the nearest K")
      ->check(CLI::Range(1e-6, 1.0))
      ->excludes(active);
}

namespace {

WeightType resolve_weights(const std::string& weights, const Checkpoint& checkpoint) {
  if (const auto type = parse_weight_type(weights)) return *type;
  if (weights != "auto")
    throw InvalidArgument("--weights: unknown value '" + weights +
                          "'; choose one of auto, f32, bf16, f16, int8, int4");
  for (const TensorInfo& tensor : checkpoint.tensors()) {
    const bool in_a_layer =
        tensor.name.starts_with("model.layers.0.") || tensor.name.starts_with("encoder.layer.0.");
    if (tensor.shape.size() != 2 || !in_a_layer) continue;
    if (tensor.dtype == DType::kF32) return WeightType::kF32;
    if (tensor.dtype == DType::kBF16) return WeightType::kBF16;
    break;
  }
  return WeightType::kF16;
}

CacheSpec resolve_cache(const std::string& cache, const Checkpoint& checkpoint, WeightType type) {
  if (cache.empty()) throw InvalidArgument("--cache: empty; give auto, on, off or a file");
  if (cache == "off") return {};
  if (cache == "on" || cache == "auto")
    return {.file = default_cache_file(checkpoint, type), .write = cache == "on"};
  return {.file = cache, .write = true};
}

/// K of --active or --active-share; 0: neither was given.
std::int64_t resolve_active(const ModelOptions& options, const ModelConfig& config) {
  if (options.active_share <= 0.0) return options.active;
  if (!config.is_moe())
    throw InvalidArgument("--active-share: the model has no experts; convert it first");
  const auto width = static_cast<double>(config.intermediate_size);
  double shared = 0.0;  // mean over layers
  for (std::int64_t l = 0; l < config.num_layers; ++l)
    shared += static_cast<double>(config.shared_width(l)) / static_cast<double>(config.num_layers);
  const double neurons = shared + width * static_cast<double>(config.num_experts);
  return std::clamp<std::int64_t>(std::llround((options.active_share * neurons - shared) / width),
                                  1, config.num_experts);
}

}  // namespace

bool writes_text(const ModelConfig& config) { return config.causal && config.has_head; }

void require_text_writer(const std::string& command, const Checkpoint& checkpoint) {
  if (!writes_text(checkpoint.config()))
    throw InvalidArgument(fmt::format(
        "{}: {} is an encoder: it has no head that makes logits, and writes no text; what it gives "
        "are hidden states, which `cleave eval --against` compares",
        command, checkpoint.path().string()));
}

std::int64_t default_context(std::int64_t automatic, const ModelConfig& config) {
  return config.rotary ? automatic : std::min(automatic, config.max_position_embeddings);
}

std::string shared_text(const ModelConfig& config) {
  if (config.shared_widths.empty()) return std::to_string(config.shared_intermediate_size);
  const auto [least, most] =
      std::minmax_element(config.shared_widths.begin(), config.shared_widths.end());
  return fmt::format("{} to {}", *least, *most);
}

ModelSpec model_spec(const ModelOptions& options, const CommonOptions& common,
                     const Checkpoint& checkpoint) {
  ModelSpec spec{.threads = common.threads,
                 .weights = resolve_weights(options.weights, checkpoint),
                 .experts_per_token = resolve_active(options, checkpoint.config()),
                 .router_threshold = options.router_threshold};
  spec.cache = resolve_cache(options.cache, checkpoint, spec.weights);
  if (!common.quiet)
    spec.notice = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  return spec;
}

}  // namespace cleave::cli
