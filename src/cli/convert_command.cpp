#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <numeric>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

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
  double correction = BudgetSpec{}.correction;
  double penalty = RefitSpec{}.penalty;
  std::string gate = "softmax";
  std::string scale = "fitted";
  std::vector<std::string> calibration;
  std::int64_t calibration_tokens = 0;  // 0: as the mode likes it
  std::int64_t context = 0;
  std::string dtype = "auto";
  bool overwrite = false;
};

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

ConvertSpec make_spec(const ConvertOptions& options) {
  constexpr std::pair<const char*, PartitionMethod> kPartitions[] = {
      {"auto", PartitionMethod::kKMeans},
      {"contiguous", PartitionMethod::kContiguous},
      {"random", PartitionMethod::kRandom},
      {"kmeans", PartitionMethod::kKMeans}};
  constexpr std::pair<const char*, GateMode> kGates[] = {{"softmax", GateMode::kSoftmax},
                                                         {"hard", GateMode::kHard}};
  ConvertSpec spec;
  spec.partition.method = parse_name("--partition", options.partition, kPartitions);
  spec.partition.num_experts =
      static_cast<std::int32_t>(parse_count("--experts", options.experts, 8));
  spec.partition.seed = options.common.seed;
  spec.experts_per_token = options.active;
  spec.gate = parse_name("--gate", options.gate, kGates);
  constexpr std::pair<const char*, ScalePolicy> kScales[] = {{"fitted", ScalePolicy::kFitted},
                                                             {"experts", ScalePolicy::kExperts},
                                                             {"active", ScalePolicy::kActive}};
  spec.scale = parse_name("--scale", options.scale, kScales);
  spec.threads = options.common.threads;
  return spec;
}

/// @param hidden  H of the model
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
  spec.refit_spec.penalty = options.penalty;
  spec.correction = options.correction;
  constexpr std::pair<const char*, bool> kRouters[] = {{"trained", true}, {"ridge", false}};
  if (!parse_name("--router", options.router, kRouters)) spec.router.steps = 0;
  spec.seed = options.common.seed;
  spec.threads = options.common.threads;
  return spec;
}

Json settings_json(const ConvertOptions& options) {
  Json settings = {{"command", "convert"}};
  if (options.active_share > 0.0)
    settings.update({{"active_share", options.active_share},
                     {"experts", options.experts},
                     {"shared", options.shared},
                     {"router", options.router},
                     {"refit", options.refit},
                     {"penalty", options.penalty},
                     {"correction", options.correction}});
  else
    settings.update({{"experts", parse_count("--experts", options.experts, 8)},
                     {"active", options.active},
                     {"partition", options.partition == "auto" ? "kmeans" : options.partition},
                     {"gate", options.gate}});
  settings.update({{"calibration_files", options.calibration.size()},
                   {"context", options.context},
                   {"calibration_tokens", options.calibration_tokens},
                   {"dtype", options.dtype},
                   {"seed", options.common.seed}});
  return settings;
}

/// Equal parts of every file, so that a long one does not push out the others.
TokenWindows calibration_text(const Checkpoint& source, const ConvertOptions& options) {
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(source);
  if (options.active_share == 0.0)
    return load_windows(tokenizer, options.calibration, options.context,
                        options.calibration_tokens);
  const auto files = static_cast<std::int64_t>(options.calibration.size());
  TokenWindows all;
  all.context = options.context;
  for (std::int64_t i = 0; i < files; ++i) {
    const std::int64_t windows = options.calibration_tokens / options.context;
    const std::int64_t share = (windows * (i + 1)) / files - (windows * i) / files;
    if (options.calibration_tokens > 0 && share == 0)
      throw InvalidArgument(fmt::format(
          "--calibration-tokens: {} are fewer than one window of {} for each of {} files",
          options.calibration_tokens, options.context, files));
    TokenWindows part = load_windows(tokenizer, {options.calibration[static_cast<std::size_t>(i)]},
                                     options.context, share * options.context);
    part.tokens.resize(static_cast<std::size_t>(part.count() * part.context));
    all.tokens.insert(all.tokens.end(), part.tokens.begin(), part.tokens.end());
  }
  return all;
}

void check_combination(const ConvertOptions& options, const CLI::App& command) {
  const auto given = [&](const char* name) { return command.count(name) > 0; };
  if (options.active_share == 0.0) {
    for (const char* name : {"--shared", "--refit", "--router", "--penalty", "--correction"})
      if (given(name))
        throw InvalidArgument(fmt::format(
            "{} belongs to a conversion to a budget; give --active-share as well", name));
    return;
  }
  for (const char* name : {"--active", "--gate", "--scale", "--partition"})
    if (given(name))
      throw InvalidArgument(fmt::format(
          "{} and --active-share exclude each other: a budget decides it by itself", name));
  if (options.calibration.empty())
    throw InvalidArgument("--active-share needs a text to learn from; give --calibration FILE");
}

Conversion run_conversion(const Checkpoint& source, const ConvertOptions& options,
                          Progress& progress) {
  const auto report = [&](const std::string& what, std::int64_t done, std::int64_t all) {
    progress.update(fmt::format("{} {}/{}", what, done, all), done == all);
  };
  // What can be refused is refused before the text is read.
  if (options.active_share > 0.0) {
    const BudgetSpec budget = make_budget(options, source.config().intermediate_size);
    return convert_to_budget(source, budget, calibration_text(source, options), report);
  }
  const ConvertSpec spec = make_spec(options);
  std::optional<TokenWindows> text;
  if (!options.calibration.empty()) text = calibration_text(source, options);
  return convert(source, spec, text ? &*text : nullptr, report);
}

/// "72 experts of 16 neurons, 24 active per token, 384 always on; router: trained".
std::string describe(const ModelConfig& config, const Conversion& conversion) {
  if (!config.is_moe())
    return fmt::format("{} neurons an FFN are left, nothing is routed", config.intermediate_size);
  return fmt::format("{} experts of {} neurons, {} active per token{}; router: {}",
                     config.num_experts, config.intermediate_size, config.experts_per_token,
                     config.shared_intermediate_size > 0
                         ? fmt::format(", {} neurons always on", config.shared_intermediate_size)
                         : "",
                     conversion.router);
}

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) /
         static_cast<double>(std::max<std::size_t>(values.size(), 1));
}

/// The router's multiply-adds per token over those of the dense FFN.
double router_share(const ModelCost& dense, const ModelCost& written) {
  return static_cast<double>(written.router_macs_per_token) /
         static_cast<double>(dense.ffn_macs_per_token);
}

/// What the routers of a budget catch and cost: a line, means over layers; empty without a budget.
std::string routing_text(const Conversion& conversion, double router_share) {
  if (conversion.captured_energy.empty()) return {};
  const std::string energy =
      fmt::format("{:.1f} % of the energy captured", 100.0 * mean_of(conversion.captured_energy));
  if (conversion.layers.empty()) return energy + "\n";
  return fmt::format(
      "{} (oracle {:.1f} %), router recall {:.1f} %; the router costs {:.2f} % of the dense FFN\n",
      energy, 100.0 * mean_of(conversion.oracle_energy), 100.0 * mean_of(conversion.router_recall),
      100.0 * router_share);
}

/// The same by layer.
void add_routing(const Conversion& conversion, double router_share, Json& json) {
  if (conversion.captured_energy.empty()) return;
  json["captured_energy"] = conversion.captured_energy;
  json["oracle_energy"] = conversion.oracle_energy;
  if (conversion.layers.empty()) return;
  json["router_recall"] = conversion.router_recall;
  json["router_share"] = router_share;
}

void run_convert(ConvertOptions options, const CLI::App& command) {
  const auto begin = std::chrono::steady_clock::now();
  check_combination(options, command);
  const bool budget = options.active_share > 0.0;
  if (command.count("--calibration-tokens") == 0)
    options.calibration_tokens = budget ? 32768 : 16384;
  if (command.count("--context") == 0) options.context = budget ? 1024 : 512;
  const WriteSpec write{.dtype = parse_dtype(options.dtype), .overwrite = options.overwrite};
  check_output(options.out, options.overwrite);
  const Checkpoint source = Checkpoint::open(options.model);

  Progress progress(options.common.quiet);
  const Conversion conversion = run_conversion(source, options, progress);
  for (const std::string& notice : conversion.notices) progress.note("note: " + notice);
  progress.update("writing " + options.out);
  write_conversion(options.out, source, conversion, settings_json(options).dump(), write);

  const Checkpoint written = Checkpoint::open(options.out);
  const ModelCost before = model_cost(source.config()), after = model_cost(written.config());
  const double elapsed_s =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const ModelConfig& config = written.config();
  const double router = router_share(before, after);
  Json json{{"model", options.model},
            {"out", options.out},
            {"experts", config.num_experts},
            {"active", config.experts_per_token},
            {"expert_width", config.intermediate_size},
            {"shared_width", config.shared_intermediate_size},
            {"partition", conversion.partition},
            {"router", conversion.router},
            {"scale", scale_policy_name(conversion.scale)},
            {"calibration_tokens", conversion.calibration_tokens},
            {"dtype", dtype_name(config.dtype)},
            {"layer_error", conversion.layer_error}};
  add_routing(conversion, router, json);
  json.update({{"macs_per_token_before", before.macs_per_token},
               {"macs_per_token", after.macs_per_token},
               {"elapsed_s", elapsed_s}});
  print_result(options.common, json,
               fmt::format("{}: {}\n{}multiply-adds per token {} -> {}; {} in {}\n", options.out,
                           describe(config, conversion), routing_text(conversion, router),
                           human_count(before.macs_per_token), human_count(after.macs_per_token),
                           dtype_name(config.dtype), human_seconds(elapsed_s)));
}

}  // namespace

void add_convert_command(CLI::App& app) {
  auto options = std::make_shared<ConvertOptions>();
  CLI::App* command = app.add_subcommand(
      "convert",
      "Split every FFN into experts, attach routers, write a stock Mixtral or Granite "
      "directory");
  command->add_option("MODEL", options->model, "Dense model: directory or GGUF file")->required();
  command->add_option("OUT", options->out, "Directory to write")->required();
  command
      ->add_option("--active-share", options->active_share,
                   "Convert to a budget: the share of the FFN neurons that run per token. The rest "
                   "is chosen for the best result known; needs --calibration")
      ->check(CLI::Range(1e-6, 1.0));
  command
      ->add_option("-e,--experts", options->experts,
                   "Experts per layer, E; divides H. auto: 8; with --active-share experts of 16 "
                   "neurons, shared ones included")
      ->capture_default_str();
  command
      ->add_option("--shared", options->shared,
                   "With --active-share: how many of the experts always run. auto: half of those "
                   "that run; all of those that run: nothing is routed (static pruning)")
      ->capture_default_str();
  command->add_option("-k,--active", options->active, "Experts that run per token, K <= E")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--partition", options->partition,
                   "How neurons are grouped: contiguous, random or kmeans (auto)")
      ->capture_default_str();
  command
      ->add_option("--router", options->router,
                   "With --active-share: trained (on the experts' energies) or ridge")
      ->capture_default_str();
  command
      ->add_option("--refit", options->refit,
                   "With --active-share: on or off; repairs `down` under the routing that happens")
      ->capture_default_str();
  command->add_option("--penalty", options->penalty, "Ridge penalty of the refit, relative")
      ->capture_default_str()
      ->check(CLI::Range(1e-9, 1e9));
  command
      ->add_option("--correction", options->correction,
                   "Part of what earlier layers lost that the refit aims to give back, 0 to 1")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  command
      ->add_option("--gate", options->gate,
                   "Expert weights: softmax (over the selected) or hard (0/1 mask)")
      ->capture_default_str();
  command
      ->add_option("--scale", options->scale,
                   "Output scale folded into down: fitted (needs a calibration text), experts "
                   "(E with a softmax gate, E/K with a hard one) or active (K, 1)")
      ->capture_default_str();
  command->add_option("--calibration", options->calibration,
                      "Text file(s) to fit the routers on, equal parts of each with "
                      "--active-share; without: random routers, to be trained");
  command
      ->add_option("--calibration-tokens", options->calibration_tokens,
                   "Use at most N tokens of it; 0: all. Default 16384, with --active-share 32768")
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--context", options->context,
                   "Calibration window, tokens. Default 512, with --active-share 1024")
      ->check(CLI::Range(2, 1 << 24));
  command
      ->add_option("--dtype", options->dtype,
                   "Stored type: f32, bf16, f16, or auto: the source's where that is exact")
      ->capture_default_str();
  command->add_flag("--overwrite", options->overwrite, "Replace OUT if it exists");
  add_seed_option(*command, options->common, "partition and random routers");
  add_common_options(*command, options->common);
  command->callback([options, command] { run_convert(*options, *command); });
}

}  // namespace cleave::cli
