#include "cli/train_options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

namespace cleave::cli {
namespace {

/// Whether cleave.json says that the model was converted to a budget.
bool converted_to_budget(const Checkpoint& student) {
  if (student.format() != Checkpoint::Format::kSafetensors) return false;
  const auto provenance = read_provenance(student.directory());
  if (!provenance) return false;
  const Json settings = Json::parse(provenance->spec_json, nullptr, /*allow_exceptions=*/false);
  return settings.is_object() && settings.contains("active_share");
}

void add_data_options(CLI::App& command, TrainOptions& o) {
  command.add_option("MODEL", o.model, "Converted model: a directory that cleave wrote")
      ->required();
  command.add_option("OUT", o.out, "Directory to write")->required();
  command.add_option("--data", o.data, "Text file(s) to train on, UTF-8")->required();
  command
      .add_option("--recipe", o.recipe,
                  "factorllm, distill, layerwise, or auto: layerwise for a conversion to a budget")
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
  command
      .add_option("--context", o.context, "Window length, tokens; default: 256, 1024 for layerwise")
      ->check(CLI::Range(2, 1 << 24));
}

void add_schedule_options(CLI::App& command, TrainOptions& o) {
  const auto number = [&](const char* name, auto& value, const char* text) {
    return command.add_option(name, value, text)
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
  };
  // Those that a recipe has a default of its own for.
  const auto own = [&](const char* name, auto& value, const char* text) {
    command.add_option(name, value, text)->check(CLI::NonNegativeNumber);
  };
  const auto not_layerwise = [&](CLI::Option* option) {
    o.owned.push_back({option, {"factorllm", "distill"}});
  };
  number("--steps", o.steps, "Optimiser steps; of each layer with layerwise");
  own("--batch", o.batch, "Windows per forward pass; default: 4, 1 for layerwise");
  not_layerwise(
      number("--grad-accumulation", o.train.grad_accumulation, "Forward passes per step"));
  own("--lr", o.learning_rate, "Learning rate at its peak; default: 3e-4, 4e-3 for layerwise");
  own("--min-lr-ratio", o.min_lr_ratio,
      "Floor of the cosine, as a share of the peak; default: 0.1, 0 for layerwise");
  own("--warmup", o.warmup, "Warm-up steps; default: 20, 10 for layerwise");
  own("--weight-decay", o.weight_decay, "Decoupled weight decay; default: 0, 0.01 for factorllm");
  number("--beta1", o.train.adamw.beta1, "AdamW beta 1");
  own("--beta2", o.beta2, "AdamW beta 2; default: 0.95, 0.99 for layerwise");
  number("--clip", o.train.clip_norm, "Largest gradient norm; 0: no clipping");
  not_layerwise(number("--eval-every", o.train.eval_every,
                       "Steps between held-out evaluations; 0: ends only"));
  number("--eval-tokens", o.train.eval_tokens, "Held-out tokens per evaluation; 0: all");
  number("--log-every", o.train.log_every, "Steps between lines of metrics.jsonl");
  not_layerwise(number("--checkpoint-every", o.train.checkpoint_every,
                       "Steps between checkpoints; 0: end only"));
  not_layerwise(number("--keep-checkpoints", o.train.keep_checkpoints, "Checkpoints to keep"));
}

void add_loss_options(CLI::App& command, TrainOptions& o) {
  const auto add = [&](const char* name, auto& value, const char* text) {
    CLI::Option* option = command.add_option(name, value, text)->check(CLI::NonNegativeNumber);
    o.owned.push_back({option, {"factorllm", "distill"}});
  };
  add("--lm-weight", o.lm_weight, "Weight of the language-model loss; default: 1, 0 for distill");
  add("--distill-weight", o.distill_weight,
      "Weight of the KL to the teacher's logits; default: 0, 1 for distill");
}

void add_factorllm_options(CLI::App& command, TrainOptions& o) {
  const auto own = [&](CLI::Option* option) {
    o.owned.push_back({option->group("Recipe factorllm"), {"factorllm"}});
    return option;
  };
  const auto add = [&](const char* name, auto& value, const char* text) {
    return own(command.add_option(name, value, text)->capture_default_str());
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
  own(command.add_flag("--straight-through", o.factorllm.straight_through,
                       "With a hard gate: backward as if it were softmax"));
}

void add_tuning_options(CLI::App& command, TrainOptions& o) {
  const auto own = [&](CLI::Option* option, std::vector<std::string> recipes) {
    o.owned.push_back({option->group("Recipes distill and layerwise"), std::move(recipes)});
    return option;
  };
  const auto add = [&](const char* name, auto& value, const char* text,
                       std::vector<std::string> recipes) {
    return own(command.add_option(name, value, text)->capture_default_str(), std::move(recipes));
  };
  add("--parts", o.parts,
      "What learns: ffn (router, experts, shared), or several with commas; distill: also norms, "
      "attention",
      {"distill", "layerwise"});
  add("--router-weight", o.distill.router_weight,
      "distill: weight of the routers' supervision by the experts' energies", {"distill"})
      ->check(CLI::NonNegativeNumber);
  add("--correction", o.layerwise.correction,
      "layerwise: part of the loss of the layers before that a layer is to give back, 0 to 1",
      {"layerwise"})
      ->check(CLI::Range(0.0, 1.0));
  add("--temperature", o.distill.temperature, "How soft the routers' border is to the gradient",
      {"distill", "layerwise"})
      ->check(CLI::PositiveNumber);
  own(command.add_flag("--hard-routers", o.hard_routers,
                       "distill: what the model returns does not move routers with a hard gate"),
      {"distill"});
}

}  // namespace

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

train::LayerwiseSpec layerwise_spec(const TrainOptions& options) {
  train::LayerwiseSpec method = options.layerwise;
  method.steps = options.steps;
  method.parts = train::parse_distill_parts(options.parts);
  method.temperature = options.distill.temperature;
  return method;
}

std::string choose_recipe(const TrainOptions& options, const Checkpoint& student) {
  std::string recipe = options.recipe;
  if (recipe == "auto") recipe = converted_to_budget(student) ? "layerwise" : "factorllm";
  if (recipe != "factorllm" && recipe != "distill" && recipe != "layerwise")
    throw InvalidArgument("--recipe: unknown value '" + recipe +
                          "'; choose auto, factorllm, distill or layerwise");
  for (const auto& [option, recipes] : options.owned)
    if (option->count() > 0 && std::find(recipes.begin(), recipes.end(), recipe) == recipes.end())
      throw InvalidArgument(fmt::format(
          "{}: an option of the recipe {}, but this is {}{}", option->get_name(),
          fmt::join(recipes, " and "), recipe,
          options.recipe == "auto" ? " (the default for this model; see --recipe)" : ""));
  return recipe;
}

train::TrainSpec make_train_spec(const TrainOptions& options, const std::string& recipe) {
  constexpr std::pair<const char*, at::ScalarType> kPrecisions[] = {{"f32", at::kFloat},
                                                                    {"bf16", at::kBFloat16}};
  constexpr std::pair<const char*, at::DeviceType> kDevices[] = {{"cpu", at::kCPU},
                                                                 {"cuda", at::kCUDA}};
  const bool layerwise = recipe == "layerwise";
  train::TrainSpec spec = options.train;
  // A layer's own error is a clear signal, and its steps are cheap: high rates, down to nothing.
  spec.batch = options.batch.value_or(layerwise ? 1 : spec.batch);
  spec.learning_rate = options.learning_rate.value_or(layerwise ? 4e-3 : spec.learning_rate);
  spec.min_lr_ratio = options.min_lr_ratio.value_or(layerwise ? 0.0 : spec.min_lr_ratio);
  spec.warmup_steps = options.warmup.value_or(layerwise ? 10 : spec.warmup_steps);
  spec.adamw.beta2 = options.beta2.value_or(layerwise ? 0.99 : spec.adamw.beta2);
  // A few hundred steps of distillation from a good start: decay would only pull away from it.
  spec.adamw.weight_decay =
      options.weight_decay.value_or(recipe == "factorllm" ? spec.adamw.weight_decay : 0.0);
  spec.seed = options.common.seed;
  spec.threads = options.common.threads;
  spec.dtype = parse_name("--precision", options.precision, kPrecisions);
  spec.device = parse_name("--device", options.device, kDevices);
  return spec;
}

std::int64_t context_length(const TrainOptions& options, const std::string& recipe) {
  return options.context.value_or(recipe == "layerwise" ? 1024 : 256);
}

void add_train_options(CLI::App& command, TrainOptions& o) {
  add_data_options(command, o);
  add_schedule_options(command, o);
  add_loss_options(command, o);
  add_factorllm_options(command, o);
  add_tuning_options(command, o);
  command.add_option("--precision", o.precision, "Arithmetic: f32 or bf16")->capture_default_str();
  command.add_option("--device", o.device, "cpu or cuda")->capture_default_str();
  command.add_option("--dtype", o.dtype, "Stored type: f32, bf16, f16, or auto: MODEL's")
      ->capture_default_str();
  command.add_option("--run-dir", o.run_dir,
                     "Checkpoints and metrics while it runs; default: OUT.train");
  command.add_flag("--resume", o.resume, "Go on from the newest checkpoint in the run folder");
  command.add_flag("--overwrite", o.overwrite, "Replace OUT and an earlier run if they exist");
  add_seed_option(command, o.common, "the order of the data");
  add_common_options(command, o.common);
}

}  // namespace cleave::cli
