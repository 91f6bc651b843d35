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
#include "cli/train_options.h"

namespace cleave::cli {
namespace {

namespace fs = std::filesystem;

std::string progress_line(const train::StepReport& r) {
  std::string line = fmt::format("step {}/{} {}", r.step, r.steps, r.phase);
  if (r.step > 0) {
    line += fmt::format("  loss {:.4f}", r.loss);
    for (const auto& [name, value] : r.parts) line += fmt::format(" {} {:.4f}", name, value);
    line += fmt::format("  lr {:.2e}  grad {:.3g}  {:.0f} tok/s  {} left", r.learning_rate,
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
          {"context", context_length(options, recipe)}};
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
  require_text_writer("train", student);
  if (!student.config().is_moe())
    throw InvalidArgument(
        options.model + ": a dense model; split it first (cleave convert), then train the result");
  const std::string recipe = choose_recipe(options, student);
  const train::TrainSpec spec = make_train_spec(options, recipe);
  std::optional<Checkpoint> teacher;
  if (!options.teacher.empty()) teacher = Checkpoint::open(options.teacher);
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(student);
  const std::int64_t context = context_length(options, recipe);
  TokenWindows data =
      load_windows(student.config(), tokenizer, options.data, context, options.limit_tokens);
  TokenWindows held_out;
  if (!options.held_out.empty()) {
    held_out = load_windows(student.config(), tokenizer, options.held_out, context, 0);
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
                            options.model, data.count(), context,
                            held_out.context > 0 ? held_out.count() : 0, run_dir.string()));

  const InterruptGuard guard;
  const Checkpoint* dense = teacher ? &*teacher : nullptr;
  const TokenWindows* aside = held_out.context > 0 ? &held_out : nullptr;
  train::TrainResult result;
  if (recipe == "layerwise")
    result = train::train_layerwise(student, dense, data, aside, layerwise_spec(options), spec, io);
  else if (recipe == "distill")
    result = train::train_distill(student, dense, data, aside, distill_spec(options), spec, io);
  else
    result = train::train_factorllm(student, dense, data, aside, factorllm_spec(options), spec, io);
  if (result.interrupted) {
    fmt::print(stderr,
               "cleave: interrupted at step {}/{}; {} saved in {}, continue with --resume\n",
               result.step, result.steps, recipe == "layerwise" ? "finished layers are" : "it is",
               run_dir.string());
    throw CLI::RuntimeError(kInterruptedExit);
  }
  progress.update("writing " + options.out);
  write_tuned(options, student, result, settings_json(options, recipe));
  finish_run_dir(run_dir, options.out);

  const train::StepReport& last = result.last;
  std::string text = fmt::format(
      "{}: {} steps, {} tokens{}, loss {:.4f}, {:.0f} tokens/s\n", options.out, result.steps,
      last.tokens, recipe == "layerwise" ? " a layer" : "", last.loss, last.tokens_per_s);
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

}  // namespace

void add_train_command(CLI::App& app) {
  auto options = std::make_shared<TrainOptions>();
  CLI::App* command =
      app.add_subcommand("train", "Tune the routers and experts of a converted model");
  add_train_options(*command, *options);
  command->callback([options] { run_train(*options); });
}

}  // namespace cleave::cli
