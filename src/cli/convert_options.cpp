#include "cli/convert_options.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "cli/calibration_text.h"
#include "cli/report_command.h"

namespace cleave::cli {
namespace {

std::int64_t parse_count(const std::string& option, const std::string& value,
                         std::int64_t automatic) {
  if (value == "auto") return automatic;
  std::int64_t count = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), count);
  if (error != std::errc() || end != value.data() + value.size() || count < 0)
    throw InvalidArgument(
        fmt::format("{}: '{}' is neither a whole number nor 'auto'", option, value));
  return count;
}

/// "trained", "low-rank", "low-rank:16", ...
void parse_router(const std::string& value, BudgetSpec& spec) {
  const std::size_t colon = value.find(':');
  const auto method = parse_router_method(value.substr(0, colon));
  if (!method)
    throw InvalidArgument(
        fmt::format("--router: unknown value '{}'; choose one of trained, ridge, logistic, "
                    "low-rank, low-rank:R, mean-gate, representative",
                    value));
  spec.router_method = *method;
  if (colon == std::string::npos) return;
  if (*method != RouterMethod::kLowRank)
    throw InvalidArgument(
        fmt::format("--router: '{}' has a rank; only low-rank:R takes one", value));
  spec.router_rank = parse_count("--router low-rank", value.substr(colon + 1), 0);
  if (spec.router_rank < 1)
    throw InvalidArgument(fmt::format("--router: '{}': the rank must be at least 1", value));
}

/// "auto": what each road does best with.
GateMode parse_gate(const ConvertOptions& options) {
  const GateMode automatic = options.active_share > 0.0 ? GateMode::kHard : GateMode::kSoftmax;
  const std::pair<const char*, GateMode> gates[] = {
      {"auto", automatic}, {"softmax", GateMode::kSoftmax}, {"hard", GateMode::kHard}};
  return parse_name("--gate", options.gate, gates);
}

BudgetPartition parse_partition(const std::string& value) {
  if (value == "auto") return BudgetPartition::kCaptured;
  if (const auto partition = parse_budget_partition(value)) return *partition;
  throw InvalidArgument(
      fmt::format("--partition: unknown value '{}'; choose one of captured, profiles, kmeans, "
                  "coactivation, cmoe, expertweaver, importance, contiguous, random",
                  value));
}

/// Said before the text is read.
void check_allocation(const BudgetSpec& spec, std::int64_t hidden) {
  if (spec.allocation != Allocation::kKl) return;
  const BudgetShares shares = divide_budget(hidden, spec);
  if (shares.shared == 0 || shares.active == 0)
    throw InvalidArgument(fmt::format(
        "--allocation: 'kl' divides the neurons that always run among the layers, and here {}; "
        "give another --shared, or --allocation uniform",
        shares.shared == 0 ? "none do" : "all that run do"));
}

FileShares file_shares(const ConvertOptions& options) {
  return {.files = options.calibration,
          .weights = options.calibration_weights,
          .tokens = options.calibration_tokens,
          .context = options.context};
}

TokenWindows text_given(const Checkpoint& source, const ConvertOptions& options,
                        std::vector<std::string>& notices) {
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(source);
  if (options.active_share == 0.0)
    return load_windows(source.config(), tokenizer, options.calibration, options.context,
                        options.calibration_tokens);
  return text_of_files(source.config(), tokenizer, file_shares(options), notices);
}

/// A quarter as much as is read, in whole windows; without a text all of it
/// (docs/decisions/0012-self-generated-text.md).
std::int64_t default_self_calibration(const ConvertOptions& options) {
  if (options.calibration.empty()) return options.calibration_tokens;
  const std::int64_t read =
      options.calibration_tokens > 0 ? options.calibration_tokens : kBudgetCalibrationTokens;
  return read / 4 / options.context * options.context;
}

}  // namespace

ConvertSpec make_spec(const ConvertOptions& options) {
  constexpr std::pair<const char*, PartitionMethod> kPartitions[] = {
      {"auto", PartitionMethod::kKMeans},
      {"contiguous", PartitionMethod::kContiguous},
      {"random", PartitionMethod::kRandom},
      {"kmeans", PartitionMethod::kKMeans}};
  ConvertSpec spec;
  spec.partition.method = parse_name("--partition", options.partition, kPartitions);
  spec.partition.num_experts =
      static_cast<std::int32_t>(parse_count("--experts", options.experts, 8));
  spec.partition.seed = options.common.seed;
  spec.experts_per_token = options.active;
  spec.gate = parse_gate(options);
  constexpr std::pair<const char*, ScalePolicy> kScales[] = {{"fitted", ScalePolicy::kFitted},
                                                             {"experts", ScalePolicy::kExperts},
                                                             {"active", ScalePolicy::kActive}};
  spec.scale = parse_name("--scale", options.scale, kScales);
  spec.threads = options.common.threads;
  return spec;
}

BudgetSpec make_budget(const ConvertOptions& options, std::int64_t hidden) {
  BudgetSpec spec;
  spec.active_share = options.active_share;
  const std::int64_t experts =
      parse_count("--experts", options.experts, hidden / spec.expert_width);
  check_divides(experts, hidden);
  spec.expert_width = hidden / experts;
  if (options.shared != "auto")
    spec.shared_share = static_cast<double>(parse_count("--shared", options.shared, 0)) /
                        (options.active_share * static_cast<double>(experts));
  if (spec.shared_share > 1.0)
    throw InvalidArgument(fmt::format(
        "--shared: {} of {} experts are more than the active share of {}; give {} or fewer",
        options.shared, experts, options.active_share,
        std::floor(options.active_share * static_cast<double>(experts))));
  constexpr std::pair<const char*, bool> kSwitch[] = {{"on", true}, {"off", false}};
  spec.refit = parse_name("--refit", options.refit, kSwitch);
  spec.refit_rounds = options.refit_rounds;
  spec.refit_spec.penalty = options.penalty;
  spec.correction = options.correction;
  spec.rare_tokens = options.rare_tokens;
  constexpr std::pair<const char*, CalibrationMode> kModes[] = {
      {"sequential", CalibrationMode::kSequential}, {"parallel", CalibrationMode::kParallel}};
  spec.calibration_mode = parse_name("--calibration-mode", options.calibration_mode, kModes);
  spec.partition = parse_partition(options.partition);
  parse_router(options.router, spec);
  spec.gate = parse_gate(options);
  constexpr std::pair<const char*, Allocation> kAllocations[] = {{"uniform", Allocation::kUniform},
                                                                 {"kl", Allocation::kKl}};
  spec.allocation = parse_name("--allocation", options.allocation, kAllocations);
  check_allocation(spec, hidden);
  spec.seed = options.common.seed;
  spec.threads = options.common.threads;
  return spec;
}

Json settings_json(const ConvertOptions& options) {
  Json settings = {{"command", "convert"}};
  if (options.active_share > 0.0)
    settings.update(
        {{"active_share", options.active_share},
         {"experts", options.experts},
         {"shared", options.shared},
         {"partition", options.partition == "auto" ? "captured" : options.partition},
         {"router", options.router},
         {"gate", gate_mode_name(parse_gate(options))},
         {"refit", options.refit},
         {"refit_rounds", options.refit_rounds},
         {"allocation", options.allocation},
         {"penalty", options.penalty},
         {"correction", options.calibration_mode == "parallel" ? 0.0 : options.correction},
         {"rare_tokens", options.rare_tokens},
         {"calibration_mode", options.calibration_mode},
         {"calibration_weights", options.calibration_weights}});
  else
    settings.update({{"experts", parse_count("--experts", options.experts, 8)},
                     {"active", options.active},
                     {"partition", options.partition == "auto" ? "kmeans" : options.partition},
                     {"gate", gate_mode_name(parse_gate(options))}});
  settings.update({{"calibration_files", options.calibration.size()},
                   {"context", options.context},
                   {"calibration_tokens", options.calibration_tokens},
                   {"self_calibration_tokens", self_calibration_tokens(options)},
                   {"dtype", options.dtype},
                   {"seed", options.common.seed}});
  return settings;
}

std::int64_t self_calibration_tokens(const ConvertOptions& options) {
  return parse_count("--self-calibration", options.self_calibration,
                     options.active_share > 0.0 ? default_self_calibration(options) : 0);
}

bool is_calibrated(const ConvertOptions& options) {
  return !options.calibration.empty() || self_calibration_tokens(options) > 0;
}

TokenWindows calibration_text(const Checkpoint& source, const ConvertOptions& options,
                              Progress& progress, std::vector<std::string>& notices) {
  TokenWindows text;
  text.context = options.context;
  if (!options.calibration.empty()) text = text_given(source, options, notices);
  add_self_text(source, options.common, self_calibration_tokens(options), progress, text);
  return text;
}

void check_combination(const ConvertOptions& options, const CLI::App& command) {
  const auto given = [&](const char* name) { return command.count(name) > 0; };
  if (options.active_share == 0.0) {
    for (const char* name :
         {"--shared", "--refit", "--refit-rounds", "--router", "--penalty", "--correction",
          "--allocation", "--calibration-mode", "--calibration-weights", "--rare-tokens"})
      if (given(name))
        throw InvalidArgument(fmt::format(
            "{} belongs to a conversion to a budget; give --active-share as well", name));
    return;
  }
  for (const char* name : {"--active", "--scale"})
    if (given(name))
      throw InvalidArgument(fmt::format(
          "{} and --active-share exclude each other: a budget decides it by itself", name));
  check_file_shares(file_shares(options));
  for (const char* name : {"--penalty", "--correction"})
    if (given(name) && options.refit == "off")
      throw InvalidArgument(fmt::format(
          "{} is a setting of the refit, and with --refit off nothing is repaired; leave one out",
          name));
  if (given("--correction") && options.calibration_mode == "parallel")
    throw InvalidArgument(
        "--correction gives back what earlier layers lost, and with --calibration-mode parallel a "
        "layer does not see it; leave one out");
  if (!is_calibrated(options))
    throw InvalidArgument(
        "--active-share needs a text to learn from; give --calibration FILE, or --self-calibration "
        "N: the model writes one");
}

void settle_text(const ModelConfig& config, const CLI::App& command, ConvertOptions& options) {
  if (command.count("--context") == 0) options.context = default_context(options.context, config);
  if (writes_text(config))
    return check_self_text(self_calibration_tokens(options), options.context);
  if (options.self_calibration != "auto" && self_calibration_tokens(options) > 0)
    throw InvalidArgument(fmt::format(
        "--self-calibration: {} is an encoder, which writes no text; give --calibration FILE alone",
        options.model));
  options.self_calibration = "0";
  if (options.active_share > 0.0 && options.calibration.empty())
    throw InvalidArgument(
        fmt::format("--active-share needs a text to learn from, and {} is an encoder, which cannot "
                    "write its own; give --calibration FILE",
                    options.model));
}

void check_report(const ConvertOptions& options, const CLI::App& command,
                  const Checkpoint& source) {
  if (baseline_set(options.baselines) == BaselineSet::kNone) {
    for (const char* name : {"--report", "--text"})
      if (command.count(name) > 0)
        throw InvalidArgument(fmt::format(
            "{} belongs to the report beside the model; give --baselines quick or all as well",
            name));
    return;
  }
  if (options.text.empty())
    throw InvalidArgument(
        "--baselines: the report is measured on text that the conversion has not seen; give "
        "--text FILE, or --baselines none");
  if (!is_calibrated(options))
    throw InvalidArgument(
        "--baselines: they are fitted on text; give --calibration FILE, or --baselines none");
  const std::int64_t hidden = source.config().intermediate_size;
  if (options.active_share > 0.0 &&
      divide_budget(hidden, make_budget(options, hidden)).shared == hidden)
    throw InvalidArgument(
        "--baselines: all neurons run for every token, so there is nothing to report on; give a "
        "smaller --active-share, or --baselines none");
}

}  // namespace cleave::cli
