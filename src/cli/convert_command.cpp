#include <fmt/format.h>

#include <chrono>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct ConvertOptions {
  CommonOptions common;
  std::string model, out;
  std::int64_t experts = 8;
  std::int64_t active = 4;
  std::string partition = "kmeans";
  std::string gate = "softmax";
  std::string scale = "fitted";
  std::vector<std::string> calibration;
  std::int64_t calibration_tokens = 16384;
  std::int64_t context = 512;
  std::string dtype = "auto";
  bool overwrite = false;
};

ConvertSpec make_spec(const ConvertOptions& options) {
  constexpr std::pair<const char*, PartitionMethod> kPartitions[] = {
      {"contiguous", PartitionMethod::kContiguous},
      {"random", PartitionMethod::kRandom},
      {"kmeans", PartitionMethod::kKMeans}};
  constexpr std::pair<const char*, GateMode> kGates[] = {{"softmax", GateMode::kSoftmax},
                                                         {"hard", GateMode::kHard}};
  ConvertSpec spec;
  spec.partition.method = parse_name("--partition", options.partition, kPartitions);
  spec.partition.num_experts = static_cast<std::int32_t>(options.experts);
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

Json settings_json(const ConvertOptions& options) {
  return {{"command", "convert"},       {"experts", options.experts},
          {"active", options.active},   {"partition", options.partition},
          {"gate", options.gate},       {"calibration_files", options.calibration.size()},
          {"context", options.context}, {"calibration_tokens", options.calibration_tokens},
          {"dtype", options.dtype},     {"seed", options.common.seed}};
}

void run_convert(const ConvertOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  // Everything that can be refused is refused before the work starts.
  const ConvertSpec spec = make_spec(options);
  const WriteSpec write{.dtype = parse_dtype(options.dtype), .overwrite = options.overwrite};
  check_output(options.out, options.overwrite);
  const Checkpoint source = Checkpoint::open(options.model);

  std::optional<TokenWindows> text;
  if (!options.calibration.empty())
    text = load_windows(Tokenizer::from_checkpoint(source), options.calibration, options.context,
                        options.calibration_tokens);

  Progress progress(options.common.quiet);
  const Conversion conversion =
      convert(source, spec, text ? &*text : nullptr,
              [&](const std::string& what, std::int64_t done, std::int64_t all) {
                progress.update(fmt::format("{} {}/{}", what, done, all), done == all);
              });
  progress.update("writing " + options.out);
  write_conversion(options.out, source, conversion, spec, settings_json(options).dump(), write);

  const Checkpoint written = Checkpoint::open(options.out);
  const ModelCost before = model_cost(source.config()), after = model_cost(written.config());
  const double elapsed_s =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  print_result(options.common,
               {{"model", options.model},
                {"out", options.out},
                {"experts", options.experts},
                {"active", options.active},
                {"expert_width", written.config().intermediate_size},
                {"partition", options.partition},
                {"gate", options.gate},
                {"router", conversion.router},
                {"scale", scale_policy_name(conversion.scale)},
                {"calibration_tokens", conversion.calibration_tokens},
                {"dtype", dtype_name(written.config().dtype)},
                {"macs_per_token_before", before.macs_per_token},
                {"macs_per_token", after.macs_per_token},
                {"elapsed_s", elapsed_s}},
               fmt::format("{}: {} experts of {} neurons, {} active per token; router: {}\n"
                           "multiply-adds per token {} -> {}; {} in {}\n",
                           options.out, options.experts, written.config().intermediate_size,
                           options.active, conversion.router, human_count(before.macs_per_token),
                           human_count(after.macs_per_token), dtype_name(written.config().dtype),
                           human_seconds(elapsed_s)));
}

}  // namespace

void add_convert_command(CLI::App& app) {
  auto options = std::make_shared<ConvertOptions>();
  CLI::App* command = app.add_subcommand(
      "convert", "Split every FFN into experts, attach routers, write a stock Mixtral directory");
  command->add_option("MODEL", options->model, "Dense model: directory or GGUF file")->required();
  command->add_option("OUT", options->out, "Directory to write")->required();
  command->add_option("-e,--experts", options->experts, "Experts per layer, E; divides H")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("-k,--active", options->active, "Experts that run per token, K <= E")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--partition", options->partition,
                   "How neurons are grouped: contiguous, random or kmeans")
      ->capture_default_str();
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
                      "Text file(s) to fit the routers on; without: random routers, to be trained");
  command
      ->add_option("--calibration-tokens", options->calibration_tokens,
                   "Use at most N tokens of it; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--context", options->context, "Calibration window, tokens")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  command
      ->add_option("--dtype", options->dtype,
                   "Stored type: f32, bf16, f16, or auto: the source's where that is exact")
      ->capture_default_str();
  command->add_flag("--overwrite", options->overwrite, "Replace OUT if it exists");
  add_seed_option(*command, options->common, "partition and random routers");
  add_common_options(*command, options->common);
  command->callback([options] { run_convert(*options); });
}

}  // namespace cleave::cli
