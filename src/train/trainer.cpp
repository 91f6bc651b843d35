#include "cleave/train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "cleave/error.h"
#include "cleave/train/data.h"
#include "train/freeze_audit.h"
#include "train/run_files.h"
#include "train/run_setup.h"

namespace cleave::train {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// How evenly the experts of a layer were used: entropy of their shares over log E, 1 when even.
double load_entropy(const MoeOutputs& layer) {
  const std::int64_t experts = layer.logits.size(1);
  if (experts < 2) return 1.0;
  const at::Tensor count = at::bincount(layer.ids.flatten(), {}, experts).to(at::kDouble);
  const at::Tensor share = count / count.sum();
  return -at::xlogy(share, share).sum().item<double>() / std::log(static_cast<double>(experts));
}

/// Adds `value` to the entry of that name: micro-batches of a step are averaged this way.
void accumulate(Metrics& into, const std::string& name, double value) {
  for (auto& [known, sum] : into)
    if (known == name) {
      sum += value;
      return;
    }
  into.emplace_back(name, value);
}

/// One call of train(): the loop, and what it carries from step to step.
class Run {
 public:
  Run(Transformer model, const Recipe& recipe, const TokenWindows& data,
      const TokenWindows* held_out, const TrainSpec& spec, const TrainIo& io);
  TrainResult go();

 private:
  void begin();
  void run_phase(const Phase& phase, std::int64_t phase_end);
  StepReport run_step(const Phase& phase);
  void micro_batch(const Phase& phase, StepReport& report);
  void select_trainable(const Phase& phase);
  std::vector<at::Tensor> trained(const Phase& phase) const;
  void conclude_step(StepReport& report);
  HeldOutQuality measure();
  void save();
  bool stop_requested() const { return io_.stop != nullptr && io_.stop->load(); }
  bool due(std::int64_t every) const {
    return position_.step == steps_ || (every > 0 && position_.step % every == 0);
  }

  Transformer model_;
  const Recipe& recipe_;
  const TokenWindows& data_;
  const TokenWindows* held_out_;
  const TrainSpec& spec_;
  const TrainIo& io_;
  std::int64_t steps_;
  std::int64_t first_step_ = 0;
  WindowOrder order_;
  AdamW optimizer_;
  std::optional<CheckpointStore> store_;
  std::optional<MetricsFile> metrics_;
  json identity_;
  RunPosition position_;
  std::int64_t saved_step_ = -1;
  double training_s_ = 0.0;
  std::int64_t run_tokens_ = 0;
  Clock::time_point start_ = Clock::now();
  TrainResult result_;
};

Run::Run(Transformer model, const Recipe& recipe, const TokenWindows& data,
         const TokenWindows* held_out, const TrainSpec& spec, const TrainIo& io)
    : model_(std::move(model)),
      recipe_(recipe),
      data_(data),
      held_out_(held_out),
      spec_(spec),
      io_(io),
      steps_(recipe.total_steps()),
      order_(data.context > 0 ? data.count() : 0, spec.seed),
      optimizer_(spec.adamw) {
  for (const auto& parameter : recipe.parameters)
    optimizer_.add(parameter.name, parameter.tensor, parameter.decay);
}

void Run::begin() {
  if (spec_.threads > 0) at::set_num_threads(spec_.threads);
  if (io_.directory.empty()) return;
  store_.emplace(io_.directory / "checkpoints", spec_.keep_checkpoints);
  identity_ = run_identity(model_, recipe_, data_, spec_);
  if (io_.resume) {
    position_ = store_->restore(optimizer_, identity_, io_.notice);
    order_.seek(position_.cursor);
    saved_step_ = position_.step;
    if (io_.notice) io_.notice(fmt::format("resuming after step {} of {}", position_.step, steps_));
  } else if (!store_->empty()) {
    if (!io_.overwrite)
      throw InvalidArgument(
          fmt::format("train: {} holds an earlier run's checkpoints; resume it or overwrite it",
                      (io_.directory / "checkpoints").string()));
    store_->remove_all();
  }
  first_step_ = position_.step;
  metrics_.emplace(io_.directory / "metrics.jsonl", io_.resume ? position_.step : -1);
}

TrainResult Run::go() {
  if (steps_ < 1) throw InvalidArgument("train: the recipe has no step; give a phase some steps");
  check_run_input(model_, recipe_, data_, held_out_, spec_);
  begin();
  result_.steps = steps_;
  if (held_out_ != nullptr) {
    StepReport report;
    report.step = position_.step;
    report.steps = steps_;
    report.phase = recipe_.phases.front().name;
    report.held_out = result_.before = measure();
    report.logged = true;
    if (position_.step == 0) {
      if (metrics_) metrics_->append(metrics_line(report));
      if (io_.progress) io_.progress(report);
    }
  }
  std::int64_t end = 0;
  for (const auto& phase : recipe_.phases) {
    end += phase.steps;
    if (position_.step < end && !stop_requested()) run_phase(phase, end);
  }
  for (const auto& parameter : recipe_.parameters) {
    at::Tensor tensor = parameter.tensor;
    tensor.set_requires_grad(false);
  }
  optimizer_.zero_grad();
  if (store_ && saved_step_ != position_.step) save();
  result_.model = model_;
  result_.provenance = model_->provenance();
  result_.step = position_.step;
  result_.interrupted = position_.step < steps_;
  if (!result_.interrupted) result_.after = result_.last.held_out;
  if (!result_.interrupted && !result_.after) result_.after = result_.before;  // nothing was left
  return std::move(result_);
}

void Run::select_trainable(const Phase& phase) {
  for (auto& tensor : model_->parameters()) tensor.set_requires_grad(false);
  for (const auto& parameter : recipe_.parameters) {
    at::Tensor tensor = parameter.tensor;
    tensor.set_requires_grad(phase.trains(parameter));
  }
  optimizer_.zero_grad();
}

std::vector<at::Tensor> Run::trained(const Phase& phase) const {
  std::vector<at::Tensor> tensors;
  for (const auto& parameter : recipe_.parameters)
    if (phase.trains(parameter)) tensors.push_back(parameter.tensor);
  return tensors;
}

void Run::run_phase(const Phase& phase, std::int64_t phase_end) {
  select_trainable(phase);
  const FreezeAudit audit(*model_, recipe_, phase);
  bool gradients_checked = false;
  while (position_.step < phase_end && !stop_requested()) {
    const auto step_start = Clock::now();
    StepReport report = run_step(phase);
    if (!std::exchange(gradients_checked, true)) check_gradients_arrive(recipe_, phase);
    training_s_ += seconds_since(step_start);
    // The state of a phase's last step is saved only after the audit has passed.
    if (position_.step == phase_end || stop_requested()) audit.verify();
    conclude_step(report);
  }
}

StepReport Run::run_step(const Phase& phase) {
  StepReport report;
  report.steps = steps_;
  report.phase = phase.name;
  report.learning_rate = learning_rate_at(
      {spec_.learning_rate, spec_.min_lr_ratio, spec_.warmup_steps, steps_}, position_.step);
  optimizer_.zero_grad();
  for (std::int64_t i = 0; i < spec_.grad_accumulation; ++i) micro_batch(phase, report);
  const auto tensors = trained(phase);
  report.grad_norm = clip_gradients(tensors, spec_.clip_norm);
  if (!std::isfinite(report.grad_norm))
    throw Error(
        fmt::format("train: the gradient is not finite at step {} ({}); lower the learning rate",
                    position_.step + 1, phase.name));
  optimizer_.step(report.learning_rate);
  ++position_.step;
  position_.cursor = order_.cursor();
  report.step = position_.step;
  report.tokens = position_.tokens;
  return report;
}

void Run::micro_batch(const Phase& phase, StepReport& report) {
  const double share = 1.0 / static_cast<double>(spec_.grad_accumulation);
  const auto ids = order_.next(spec_.batch);
  StepOutputs outputs;
  outputs.step = position_.step;
  outputs.tokens = batch_tokens(data_, ids).to(spec_.device);
  outputs.logits = model_->forward(outputs.tokens);
  for (auto& layer : model_->moe_layers()) outputs.layers.push_back(layer->last());

  at::Tensor total;
  Metrics metrics;
  for (const auto& term : phase.losses) {
    const at::Tensor value = term.value(outputs, metrics);
    const double number = value.item<double>();
    if (!std::isfinite(number))
      throw Error(
          fmt::format("train: loss part '{}' is {} at step {} ({}); lower the learning "
                      "rate, or look for bad weights or text",
                      term.name, number, position_.step + 1, phase.name));
    accumulate(report.parts, term.name, number * share);
    report.loss += term.weight * number * share;
    total = total.defined() ? total + value * term.weight : value * term.weight;
  }
  if (total.requires_grad()) (total * share).backward();

  double entropy = 0.0;
  for (const auto& layer : outputs.layers) entropy += load_entropy(layer);
  if (!outputs.layers.empty())
    metrics.emplace_back("load_entropy", entropy / static_cast<double>(outputs.layers.size()));
  for (const auto& [name, value] : metrics) accumulate(report.values, name, value * share);
  position_.tokens += outputs.tokens.numel();
  run_tokens_ += outputs.tokens.numel();
}

void Run::conclude_step(StepReport& report) {
  if (held_out_ != nullptr && due(spec_.eval_every)) report.held_out = measure();
  report.tokens_per_s = static_cast<double>(run_tokens_) / std::max(training_s_, 1e-9);
  report.elapsed_s = seconds_since(start_);
  // Elapsed, not training time: evaluations and checkpoints will come again.
  report.eta_s = report.elapsed_s / static_cast<double>(position_.step - first_step_) *
                 static_cast<double>(steps_ - position_.step);
  report.logged = due(spec_.log_every) || report.held_out.has_value();
  if (metrics_ && report.logged) metrics_->append(metrics_line(report));
  if (store_ && due(spec_.checkpoint_every)) save();
  if (io_.progress) io_.progress(report);
  result_.last = report;
}

HeldOutQuality Run::measure() {
  Transformer reference = recipe_.reference;
  return evaluate(*model_, *held_out_, spec_.eval_tokens, spec_.batch,
                  reference.is_empty() ? nullptr : reference.get());
}

void Run::save() {
  store_->save(position_, optimizer_, identity_);
  saved_step_ = position_.step;
}

void require_positive(const char* field, double value) {
  if (!(value > 0.0) || !std::isfinite(value))
    throw InvalidArgument(
        fmt::format("TrainSpec: {} is {}, expected a number above 0", field, value));
}

void require_in(const char* field, double value, double low, double high) {
  if (!(value >= low && value <= high))
    throw InvalidArgument(
        fmt::format("TrainSpec: {} is {}, expected {} to {}", field, value, low, high));
}

constexpr double kAny = 1e18;  ///< no bound of its own

}  // namespace

std::int64_t Recipe::total_steps() const {
  std::int64_t sum = 0;
  for (const auto& phase : phases) sum += phase.steps;
  return sum;
}

void check(const TrainSpec& spec) {
  require_positive("batch", static_cast<double>(spec.batch));
  require_positive("grad_accumulation", static_cast<double>(spec.grad_accumulation));
  require_positive("learning_rate", spec.learning_rate);
  require_in("min_lr_ratio", spec.min_lr_ratio, 0.0, 1.0);
  require_in("warmup_steps", static_cast<double>(spec.warmup_steps), 0.0, kAny);
  require_in("weight_decay", spec.adamw.weight_decay, 0.0, kAny);
  require_in("beta1", spec.adamw.beta1, 0.0, 1.0 - 1e-12);
  require_in("beta2", spec.adamw.beta2, 0.0, 1.0 - 1e-12);
  require_positive("epsilon", spec.adamw.epsilon);
  require_in("clip_norm", spec.clip_norm, 0.0, kAny);
  require_in("threads", spec.threads, 0.0, 4096.0);
  require_in("eval_every", static_cast<double>(spec.eval_every), 0.0, kAny);
  require_in("eval_tokens", static_cast<double>(spec.eval_tokens), 0.0, kAny);
  require_positive("log_every", static_cast<double>(spec.log_every));
  require_in("checkpoint_every", static_cast<double>(spec.checkpoint_every), 0.0, kAny);
  require_positive("keep_checkpoints", static_cast<double>(spec.keep_checkpoints));
  if (spec.dtype != at::kFloat && spec.dtype != at::kBFloat16)
    throw InvalidArgument(fmt::format("TrainSpec: dtype is {}, expected Float or BFloat16",
                                      c10::toString(spec.dtype)));
}

TrainResult train(Transformer model, const Recipe& recipe, const TokenWindows& data,
                  const TokenWindows* held_out, const TrainSpec& spec, const TrainIo& io) {
  return Run(std::move(model), recipe, data, held_out, spec, io).go();
}

std::string to_json(const TrainSpec& spec) {
  const nlohmann::ordered_json object = {{"batch", spec.batch},
                                         {"grad_accumulation", spec.grad_accumulation},
                                         {"learning_rate", spec.learning_rate},
                                         {"min_lr_ratio", spec.min_lr_ratio},
                                         {"warmup_steps", spec.warmup_steps},
                                         {"beta1", spec.adamw.beta1},
                                         {"beta2", spec.adamw.beta2},
                                         {"epsilon", spec.adamw.epsilon},
                                         {"weight_decay", spec.adamw.weight_decay},
                                         {"clip_norm", spec.clip_norm},
                                         {"seed", spec.seed},
                                         {"threads", spec.threads},
                                         {"eval_every", spec.eval_every},
                                         {"eval_tokens", spec.eval_tokens},
                                         {"log_every", spec.log_every},
                                         {"checkpoint_every", spec.checkpoint_every},
                                         {"keep_checkpoints", spec.keep_checkpoints},
                                         {"dtype", c10::toString(spec.dtype)},
                                         {"device", spec.device.str()}};
  return object.dump();
}

}  // namespace cleave::train
