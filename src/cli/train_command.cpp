#include <fmt/format.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <functional>
#include <optional>

#include "cleave/train/data.h"
#include "cleave/train/recipes.h"
#include "cleave/train/trainer.h"
#include "cli/cli.h"
#include "cli/interrupt.h"

namespace cleave::cli {
namespace {

namespace fs = std::filesystem;

struct TrainOptions {
  CommonOptions common;
  std::string model, out, teacher;
  std::vector<std::string> data, held_out;
  std::string recipe = "auto";
  std::string phase = "joint";
  std::string parts = "ffn";
  std::int64_t steps = 200;
  std::int64_t context = 256;
  std::int64_t limit_tokens = 0;
  std::int64_t held_out_windows = 16;
  std::string pa_form = "router-first", labels = "per-expert", balance = "switch", gate = "keep";
  std::string precision = "f32", device = "cpu", dtype = "auto", run_dir;
  bool resume = false, overwrite = false;
  std::optional<double> lm_weight, distill_weight, weight_decay;  // defaults: the recipe's
  bool hard_routers = false;
  train::FactorLlmSpec factorllm;
  train::DistillSpec distill;
  train::TrainSpec train;
  /// Options that only one recipe knows and that were given: (recipe, option).
  std::function<std::vector<std::pair<std::string, std::string>>()> given = {};
};

train::FactorLlmSpec factorllm_spec(const TrainOptions& options) {
  constexpr std::pair<const char*, train::PaForm> kForms[] = {
      {"router-first", train::PaForm::kRouterFirst},
      {"target-first", train::PaForm::kTargetFirst},
      {"ce", train::PaForm::kCrossEntropy}};
  constexpr std::pair<const char*, train::LabelKind> kLabels[] = {
      {"per-expert", train::LabelKind::kPerExpert}, {"exhaustive", train::LabelKind::kExhaustive}};
  constexpr std::pair<const char*, train::BalanceKind> kBalances[] = {
      {"switch", train::BalanceKind::kSwitch}, {"paper", train::BalanceKind::kPaper}};
  constexpr std::pair<const char*, std::optional<GateMode>> kGates[] = {
      {"keep", std::nullopt}, {"softmax", GateMode::kSoftmax}, {"hard", GateMode::kHard}};
  train::FactorLlmSpec method = options.factorllm;
  method.lm_weight = options.lm_weight.value_or(method.lm_weight);
  method.distill_weight = options.distill_weight.value_or(method.distill_weight);
  method.phases = train::parse_phases(options.phase, options.steps);
  method.pa_form = parse_name("--pa-form", options.pa_form, kForms);
  method.labels = parse_name("--labels", options.labels, kLabels);
  method.balance = parse_name("--balance", options.balance, kBalances);
  method.gate = parse_name("--gate", options.gate, kGates);
  return method;
}

train::DistillSpec distill_spec(const TrainOptions& options) {
  train::DistillSpec method = options.distill;
  method.steps = options.steps;
  method.parts = train::parse_distill_parts(options.parts);
  method.lm_weight = options.lm_weight.value_or(method.lm_weight);
  method.distill_weight = options.distill_weight.value_or(method.distill_weight);
  method.soft_border = !options.hard_routers;
  return method;
}

/// Whether cleave.json says that the model was converted to a budget.
bool converted_to_budget(const Checkpoint& student) {
  if (student.format() != Checkpoint::Format::kSafetensors) return false;
  const auto provenance = read_provenance(student.directory());
  if (!provenance) return false;
  const Json settings = Json::parse(provenance->spec_json, nullptr, /*allow_exceptions=*/false);
  return settings.is_object() && settings.contains("active_share");
}

/// The recipe to run; an option that it does not know is an error, not silence.
std::string choose_recipe(const TrainOptions& options, const Checkpoint& student) {
  std::string recipe = options.recipe;
  if (recipe == "auto") recipe = converted_to_budget(student) ? "distill" : "factorllm";
  if (recipe != "factorllm" && recipe != "distill")
    throw InvalidArgument("--recipe: unknown value '" + recipe +
                          "'; choose auto, factorllm or distill");
  for (const auto& [owner, option] : options.given())
    if (owner != recipe)
      throw InvalidArgument(fmt::format(
          "{}: an option of the recipe {}, but this is {}{}", option, owner, recipe,
          options.recipe == "auto" ? " (the default for this model; see --recipe)" : ""));
  return recipe;
}

train::TrainSpec make_train_spec(const TrainOptions& options, const std::string& recipe) {
  constexpr std::pair<const char*, at::ScalarType> kPrecisions[] = {{"f32", at::kFloat},
                                                                    {"bf16", at::kBFloat16}};
  constexpr std::pair<const char*, at::DeviceType> kDevices[] = {{"cpu", at::kCPU},
                                                                 {"cuda", at::kCUDA}};
  train::TrainSpec spec = options.train;
  // A few hundred steps of distillation from a good start: decay would only pull away from it.
  spec.adamw.weight_decay =
      options.weight_decay.value_or(recipe == "distill" ? 0.0 : spec.adamw.weight_decay);
  spec.seed = options.common.seed;
  spec.threads = options.common.threads;
  spec.dtype = parse_name("--precision", options.precision, kPrecisions);
  spec.device = parse_name("--device", options.device, kDevices);
  return spec;
}

std::string progress_line(const train::StepReport& r) {
  std::string line = fmt::format("step {}/{} {}", r.step, r.steps, r.phase);
  if (r.step > 0) {
    line += fmt::format("  loss {:.4f}", r.loss);
    for (const auto& [name, value] : r.parts) line += fmt::format(" {} {:.4f}", name, value);
    line += fmt::format("  lr {:.2e}  grad {:.2f}  {:.0f} tok/s  {} left", r.learning_rate,
                        r.grad_norm, r.tokens_per_s, human_seconds(r.eta_s));
  }
  if (r.held_out) line += fmt::format("  held-out perplexity {:.3f}", r.held_out->perplexity);
  if (r.held_out && r.held_out->has_kl) line += fmt::format(" KL {:.4f}", r.held_out->kl);
  return line;
}

Json settings_json(const TrainOptions& options, const std::string& recipe) {
  return {{"command", "train"},
          {"recipe", recipe},
          {"data_files", options.data.size()},
          {"context", options.context}};
}

/// The tuned model as a stock directory; `cleave.json` tells both how it was split and how tuned.
void write_tuned(const TrainOptions& options, const Checkpoint& student, train::TrainResult& result,
                 const Json& settings) {
  Provenance made = result.provenance.value_or(Provenance{});
  // The recipe has recorded its own settings; what the command adds stands beside them.
  Json spec = made.spec_json.empty() ? Json::object() : Json::parse(made.spec_json);
  spec["tuned_by"] = settings;
  made.spec_json = spec.dump();
  made.tool_version = kVersion;
  const ModelConfig& config = student.config();
  WriteSpec write{.dtype = parse_dtype(options.dtype), .overwrite = options.overwrite};
  if (!write.dtype) write.dtype = config.dtype;
  const std::vector<NamedTensor> tensors = result.model->named_tensors();
  const std::int64_t E = config.num_experts, K = config.experts_per_token,
                     I = config.intermediate_size;
  if (has_fused_experts(config.family))
    write_granite_moe_shared(options.out, student, {E, K, I, config.shared_intermediate_size},
                             tensors, made, write);
  else
    write_mixtral(options.out, student, {E, K, I}, tensors, made, write);
}

/// The run's folder is scaffolding: its metrics move into the model, the checkpoints go.
void finish_run_dir(const fs::path& run_dir, const fs::path& out) {
  std::error_code ignored;
  fs::copy_file(run_dir / "metrics.jsonl", out / "metrics.jsonl",
                fs::copy_options::overwrite_existing, ignored);
  fs::remove_all(run_dir, ignored);
}

Json quality_json(const std::optional<train::HeldOutQuality>& quality) {
  if (!quality) return nullptr;
  Json json{{"perplexity", quality->perplexity}, {"tokens", quality->predicted_tokens}};
  if (quality->has_kl) json["kl"] = quality->kl;
  return json;
}

/// A step makes and drops hundreds of buffers of a few megabytes. Left to itself glibc hands each
/// back to the kernel, which clears its pages anew the next time: a tenth of the time of a step.
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest value it takes
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

void run_train(const TrainOptions& options) {
  keep_freed_memory();
  parse_dtype(options.dtype);
  check_output(options.out, options.overwrite);

  const Checkpoint student = Checkpoint::open(options.model);
  if (!student.config().is_moe())
    throw InvalidArgument(
        options.model + ": a dense model; split it first (cleave convert), then train the result");
  const std::string recipe = choose_recipe(options, student);
  const train::TrainSpec spec = make_train_spec(options, recipe);
  std::optional<Checkpoint> teacher;
  if (!options.teacher.empty()) teacher = Checkpoint::open(options.teacher);
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(student);
  TokenWindows data = load_windows(tokenizer, options.data, options.context, options.limit_tokens);
  TokenWindows held_out;
  if (!options.held_out.empty()) {
    held_out = load_windows(tokenizer, options.held_out, options.context, 0);
  } else if (options.held_out_windows > 0) {
    train::HeldOutSplit split = train::hold_out(data, options.held_out_windows);
    data = std::move(split.train);
    held_out = std::move(split.held_out);
  }

  Progress progress(options.common.quiet);
  const fs::path run_dir =
      options.run_dir.empty() ? fs::path(options.out + ".train") : fs::path(options.run_dir);
  train::TrainIo io{.directory = run_dir, .resume = options.resume, .overwrite = options.overwrite};
  io.progress = [&](const train::StepReport& report) {
    progress.update(progress_line(report),
                    report.held_out.has_value() || report.step == report.steps);
  };
  io.notice = [&](const std::string& line) { progress.note(line); };
  io.stop = &InterruptGuard::flag();
  progress.note(fmt::format("{}: {} windows of {} tokens to train on, {} held out; run in {}",
                            options.model, data.count(), options.context,
                            held_out.context > 0 ? held_out.count() : 0, run_dir.string()));

  const InterruptGuard guard;
  const Checkpoint* dense = teacher ? &*teacher : nullptr;
  const TokenWindows* aside = held_out.context > 0 ? &held_out : nullptr;
  train::TrainResult result =
      recipe == "distill"
          ? train::train_distill(student, dense, data, aside, distill_spec(options), spec, io)
          : train::train_factorllm(student, dense, data, aside, factorllm_spec(options), spec, io);
  if (result.interrupted) {
    fmt::print(stderr, "cleave: interrupted at step {}/{}; saved in {}, continue with --resume\n",
               result.step, result.steps, run_dir.string());
    throw CLI::RuntimeError(kInterruptedExit);
  }
  progress.update("writing " + options.out);
  write_tuned(options, student, result, settings_json(options, recipe));
  finish_run_dir(run_dir, options.out);

  const train::StepReport& last = result.last;
  std::string text =
      fmt::format("{}: {} steps, {} tokens, loss {:.4f}, {:.0f} tokens/s\n", options.out,
                  result.steps, last.tokens, last.loss, last.tokens_per_s);
  if (result.before && result.after) {
    text += fmt::format("held-out perplexity {:.3f} -> {:.3f}", result.before->perplexity,
                        result.after->perplexity);
    if (result.after->has_kl)
      text += fmt::format(", KL {:.4f} -> {:.4f}", result.before->kl, result.after->kl);
    text += "\n";
  }
  print_result(options.common,
               {{"model", options.model},
                {"out", options.out},
                {"recipe", recipe},
                {"steps", result.steps},
                {"tokens", last.tokens},
                {"loss", last.loss},
                {"tokens_per_s", last.tokens_per_s},
                {"elapsed_s", last.elapsed_s},
                {"held_out_before", quality_json(result.before)},
                {"held_out_after", quality_json(result.after)},
                {"metrics", (fs::path(options.out) / "metrics.jsonl").string()}},
               text);
}

void add_data_options(CLI::App& command, TrainOptions& o) {
  command.add_option("MODEL", o.model, "Converted model: a directory that cleave wrote")
      ->required();
  command.add_option("OUT", o.out, "Directory to write")->required();
  command.add_option("--data", o.data, "Text file(s) to train on, UTF-8")->required();
  command
      .add_option("--recipe", o.recipe,
                  "factorllm, distill, or auto: distill for a conversion to a budget")
      ->capture_default_str();
  command.add_option("--teacher", o.teacher,
                     "Dense model; default: put together again from MODEL's experts");
  command.add_option("--held-out", o.held_out,
                     "Text file(s) to evaluate on; default: the last windows of --data");
  command
      .add_option("--held-out-windows", o.held_out_windows, "Windows of --data set apart; 0: none")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command.add_option("--limit-tokens", o.limit_tokens, "Use only the first N tokens; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command.add_option("--context", o.context, "Window length, tokens")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
}

void add_schedule_options(CLI::App& command, TrainOptions& o) {
  const auto number = [&](const char* name, auto& value, const char* text) {
    command.add_option(name, value, text)->capture_default_str()->check(CLI::NonNegativeNumber);
  };
  number("--steps", o.steps, "Optimiser steps");
  number("--batch", o.train.batch, "Windows per forward pass");
  number("--grad-accumulation", o.train.grad_accumulation, "Forward passes per step");
  number("--lr", o.train.learning_rate, "Learning rate at its peak");
  number("--min-lr-ratio", o.train.min_lr_ratio, "Floor of the cosine, as a share of the peak");
  number("--warmup", o.train.warmup_steps, "Warm-up steps");
  command
      .add_option("--weight-decay", o.weight_decay,
                  "Decoupled weight decay; default: 0.01, 0 for distill")
      ->check(CLI::NonNegativeNumber);
  number("--beta1", o.train.adamw.beta1, "AdamW beta 1");
  number("--beta2", o.train.adamw.beta2, "AdamW beta 2");
  number("--clip", o.train.clip_norm, "Largest gradient norm; 0: no clipping");
  number("--eval-every", o.train.eval_every, "Steps between held-out evaluations; 0: ends only");
  number("--eval-tokens", o.train.eval_tokens, "Held-out tokens per evaluation; 0: all");
  number("--log-every", o.train.log_every, "Steps between lines of metrics.jsonl");
  number("--checkpoint-every", o.train.checkpoint_every, "Steps between checkpoints; 0: end only");
  number("--keep-checkpoints", o.train.keep_checkpoints, "Checkpoints to keep");
}

/// Options that both recipes have, with defaults of their own.
void add_loss_options(CLI::App& command, TrainOptions& o) {
  command
      .add_option("--lm-weight", o.lm_weight,
                  "Weight of the language-model loss; default: 1, 0 for distill")
      ->check(CLI::NonNegativeNumber);
  command
      .add_option("--distill-weight", o.distill_weight,
                  "Weight of the KL to the teacher's logits; default: 0, 1 for distill")
      ->check(CLI::NonNegativeNumber);
}

std::vector<CLI::Option*> add_factorllm_options(CLI::App& command, TrainOptions& o) {
  std::vector<CLI::Option*> all;
  const auto add = [&](const char* name, auto& value, const char* text) {
    all.push_back(command.add_option(name, value, text)->capture_default_str());
    return all.back();
  };
  add("--phase", o.phase, "router, experts or joint; or several with steps: router:50,joint:150");
  add("--pa-weight", o.factorllm.pa_weight, "Weight of the prior-approximate loss")
      ->check(CLI::NonNegativeNumber);
  add("--balance-weight", o.factorllm.balance_weight, "Weight of the load-balance loss")
      ->check(CLI::NonNegativeNumber);
  add("--pa-form", o.pa_form,
      "KL(router || target) router-first, KL(target || router) target-first, or ce");
  add("--labels", o.labels, "Prior labels: per-expert or exhaustive");
  add("--pa-tokens", o.factorllm.pa_tokens, "Tokens per forward pass that get labels; 0: all")
      ->check(CLI::NonNegativeNumber);
  add("--balance", o.balance, "Load-balance loss: switch or paper");
  add("--gate", o.gate, "Gate: keep (as converted), softmax or hard");
  all.push_back(command.add_flag("--straight-through", o.factorllm.straight_through,
                                 "With a hard gate: backward as if it were softmax"));
  for (CLI::Option* option : all) option->group("Recipe factorllm");
  return all;
}

std::vector<CLI::Option*> add_distill_options(CLI::App& command, TrainOptions& o) {
  std::vector<CLI::Option*> all;
  all.push_back(command
                    .add_option("--parts", o.parts,
                                "What learns: ffn (router, experts, shared), norms, attention, or "
                                "several with commas")
                    ->capture_default_str());
  all.push_back(command
                    .add_option("--router-weight", o.distill.router_weight,
                                "Weight of the routers' supervision by the experts' energies")
                    ->capture_default_str()
                    ->check(CLI::NonNegativeNumber));
  all.push_back(command
                    .add_option("--temperature", o.distill.temperature,
                                "How soft the routers' border is to the gradient")
                    ->capture_default_str()
                    ->check(CLI::PositiveNumber));
  all.push_back(command.add_flag("--hard-routers", o.hard_routers,
                                 "The logits' losses do not reach routers with a hard gate"));
  for (CLI::Option* option : all) option->group("Recipe distill");
  return all;
}

}  // namespace

void add_train_command(CLI::App& app) {
  auto options = std::make_shared<TrainOptions>();
  CLI::App* command =
      app.add_subcommand("train", "Tune the routers and experts of a converted model");
  add_data_options(*command, *options);
  add_schedule_options(*command, *options);
  add_loss_options(*command, *options);
  const auto of_factorllm = add_factorllm_options(*command, *options);
  const auto of_distill = add_distill_options(*command, *options);
  options->given = [of_factorllm, of_distill] {
    std::vector<std::pair<std::string, std::string>> given;
    for (const CLI::Option* option : of_factorllm)
      if (option->count() > 0) given.emplace_back("factorllm", option->get_name());
    for (const CLI::Option* option : of_distill)
      if (option->count() > 0) given.emplace_back("distill", option->get_name());
    return given;
  };
  command->add_option("--precision", options->precision, "Arithmetic: f32 or bf16")
      ->capture_default_str();
  command->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  command->add_option("--dtype", options->dtype, "Stored type: f32, bf16, f16, or auto: MODEL's")
      ->capture_default_str();
  command->add_option("--run-dir", options->run_dir,
                      "Checkpoints and metrics while it runs; default: OUT.train");
  command->add_flag("--resume", options->resume,
                    "Go on from the newest checkpoint in the run folder");
  command->add_flag("--overwrite", options->overwrite,
                    "Replace OUT and an earlier run if they exist");
  add_seed_option(*command, options->common, "the order of the data");
  add_common_options(*command, options->common);
  command->callback([options] { run_train(*options); });
}

}  // namespace cleave::cli
