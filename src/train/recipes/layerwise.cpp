// Light tuning of a conversion, one layer after the other. docs/methods/tuning.md has the formulas
// and what was measured.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "cleave/error.h"
#include "cleave/train/data.h"
#include "cleave/train/recipes.h"
#include "train/freeze_audit.h"
#include "train/recipes/common.h"
#include "train/require.h"
#include "train/residual_stream.h"
#include "train/run_files.h"
#include "train/run_setup.h"

namespace cleave::train {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kRows = 4096;  // tokens whose hidden values are there at a time

void check_layerwise_spec(const LayerwiseSpec& spec) {
  require(spec.steps > 0, "layerwise: {} steps; expected at least 1 for each layer", spec.steps);
  require(spec.correction >= 0.0 && spec.correction <= 1.0,
          "layerwise: correction is {}; expected 0 to 1", spec.correction);
  require(spec.temperature > 0.0 && std::isfinite(spec.temperature),
          "layerwise: temperature is {}; expected a number above 0", spec.temperature);
  require(!spec.parts.norms && !spec.parts.attention,
          "layerwise: norms and attention cannot learn from one FFN's error; train ffn, router, "
          "experts or shared, or use the recipe distill");
  require(!part_names(spec.parts).empty(), "layerwise: no part is trained; name one, e.g. ffn");
}

std::string layer_name(std::int64_t layer) { return fmt::format("layer {}", layer); }

/// One phase a layer. There are no loss terms: those of a Recipe look at a whole forward pass.
Recipe layer_recipe(Transformer student, const Transformer& teacher, const LayerwiseSpec& spec) {
  Recipe recipe;
  recipe.name = "layerwise";
  recipe.reference = teacher;
  recipe.spec_json = to_json(spec);
  const auto layers = static_cast<std::int64_t>(student->layers().size());
  for (std::int64_t l = 0; l < layers; ++l) {
    const std::size_t before = recipe.parameters.size();
    collect_layer_parameters(spec.parts, l, student->layers()[static_cast<std::size_t>(l)],
                             recipe.parameters);
    if (recipe.parameters.size() == before) continue;
    const std::string prefix = fmt::format("layers.{}.", l);
    recipe.phases.push_back({layer_name(l),
                             spec.steps,
                             [prefix](const Parameter& p) { return p.name.starts_with(prefix); },
                             {}});
  }
  require(!recipe.phases.empty(),
          "layerwise: the student has nothing of what is to be trained; name other parts");
  return recipe;
}

/// What a layer learns from.
struct LayerTask {
  at::Tensor input;   ///< [N, D]
  at::Tensor target;  ///< [N, D]
  at::Tensor weight;  ///< [N], mean 1
};

/// sum_t w_t |y_t - target_t|^2 / sum_t w_t |target_t|^2, in float32.
at::Tensor relative_error(const at::Tensor& y, const at::Tensor& target, const at::Tensor& weight) {
  const at::Tensor aim = target.to(at::kFloat);
  const at::Tensor error = (y.to(at::kFloat) - aim).square().sum(1);
  return (error * weight).sum() / (aim.square().sum(1) * weight).sum().clamp_min(1e-30);
}

class LayerwiseRun {
 public:
  LayerwiseRun(Transformer student, Transformer teacher, const TokenWindows& data,
               const TokenWindows* held_out, const LayerwiseSpec& method, const TrainSpec& spec,
               const TrainIo& io)
      : student_(std::move(student)),
        teacher_(std::move(teacher)),
        data_(data),
        held_out_(held_out),
        method_(method),
        spec_(spec),
        io_(io),
        recipe_(layer_recipe(student_, teacher_, method)),
        steps_(recipe_.total_steps()) {}

  TrainResult go();

 private:
  void begin();
  LayerTask make_task(std::int64_t layer);
  void train_layer(std::int64_t layer, const Phase& phase, const LayerTask& task);
  void take_step(const Phase& phase, const LayerTask& task, MoeFfn& moe, AdamW& optimizer,
                 std::span<const at::Tensor> tensors, const at::Tensor& rows);
  void finish_layer(std::int64_t layer, const LayerTask& task);
  double router_rate(MoeFfnImpl& moe, const LayerTask& task) const;
  /// Where the phase is saved that step_ is in, or at the start of.
  CheckpointStore store(std::int64_t step) const;
  HeldOutQuality measure() {
    return evaluate(*student_, *held_out_, spec_.eval_tokens, spec_.batch, teacher_.get());
  }
  void report_held_out(HeldOutQuality quality);
  void report(StepReport& report);
  bool stop_requested() const { return io_.stop != nullptr && io_.stop->load(); }

  Transformer student_, teacher_;
  const TokenWindows& data_;
  const TokenWindows* held_out_;
  const LayerwiseSpec& method_;
  const TrainSpec& spec_;
  const TrainIo& io_;
  Recipe recipe_;
  std::int64_t steps_;
  std::optional<ResidualStream> stream_, dense_;
  std::optional<MetricsFile> metrics_;
  nlohmann::json identity_;
  std::int64_t step_ = 0, first_step_ = 0;
  std::int64_t tokens_ = 0;      // of the layer at hand
  std::int64_t run_tokens_ = 0;  // of all layers
  double training_s_ = 0.0;
  Clock::time_point start_ = Clock::now();
  TrainResult result_;
};

CheckpointStore LayerwiseRun::store(std::int64_t step) const {
  const std::int64_t phase = step / method_.steps;
  return {io_.directory / "checkpoints" / fmt::format("phase-{}", phase), /*keep=*/1};
}

void LayerwiseRun::begin() {
  check_run_input(student_, recipe_, data_, held_out_, spec_);
  require(data_.count() > 0, "train: the text holds no whole window; use a longer text");
  if (spec_.threads > 0) at::set_num_threads(spec_.threads);
  for (MoeFfn& moe : student_->moe_layers())
    set_soft_border(*moe, method_.parts.router ? method_.temperature : 0.0);
  for (auto& tensor : student_->parameters()) tensor.set_requires_grad(false);
  if (io_.directory.empty()) return;
  identity_ = run_identity(student_, recipe_, data_, spec_);
  const std::filesystem::path checkpoints = io_.directory / "checkpoints";
  if (io_.resume) {
    while (first_step_ < steps_ && !store(first_step_).empty()) first_step_ += method_.steps;
    if (first_step_ == 0 && !std::filesystem::exists(io_.directory / "metrics.jsonl"))
      throw InvalidArgument(
          fmt::format("resume: no run in {}; start it without resuming", io_.directory.string()));
    if (io_.notice)
      io_.notice(fmt::format("resuming after step {} of {}: finished layers are not trained again",
                             first_step_, steps_));
  } else if (std::filesystem::exists(checkpoints)) {
    if (!io_.overwrite)
      throw InvalidArgument(
          fmt::format("train: {} holds an earlier run's checkpoints; resume it or overwrite it",
                      checkpoints.string()));
    CheckpointStore(checkpoints, 1).remove_all();
  }
  metrics_.emplace(io_.directory / "metrics.jsonl", io_.resume ? first_step_ : -1);
}

TrainResult LayerwiseRun::go() {
  begin();
  result_.steps = steps_;
  if (held_out_ != nullptr) {
    result_.before = measure();
    if (!io_.resume) report_held_out(*result_.before);
  }
  stream_.emplace(student_, data_, spec_.batch);
  dense_.emplace(teacher_, data_, spec_.batch);
  auto phase = recipe_.phases.begin();
  const auto layers = static_cast<std::int64_t>(student_->layers().size());
  for (std::int64_t l = 0; l < layers; ++l) {
    const LayerTask task = make_task(l);
    if (phase != recipe_.phases.end() && phase->name == layer_name(l))
      train_layer(l, *phase++, task);
    if (stop_requested() && step_ < steps_) break;
    finish_layer(l, task);
  }
  stream_.reset();
  dense_.reset();
  result_.model = student_;
  result_.provenance = student_->provenance();
  result_.step = step_;
  result_.interrupted = step_ < steps_;
  if (held_out_ != nullptr && !result_.interrupted) {
    result_.after = measure();
    report_held_out(*result_.after);
  }
  return std::move(result_);
}

/// Takes both streams through the layer's attention, and the dense one through its FFN.
LayerTask LayerwiseRun::make_task(std::int64_t layer) {
  const at::NoGradGuard no_grad;
  dense_->attend(layer);
  stream_->attend(layer);
  DenseFfn ffn = teacher_->layers()[static_cast<std::size_t>(layer)].dense;
  LayerTask task;
  task.input = at::empty_like(stream_->rows());
  task.target = at::empty_like(task.input);
  task.weight = at::empty({task.input.size(0)}, task.input.options().dtype(at::kFloat));
  for (std::int64_t first = 0; first < task.input.size(0); first += kRows) {
    const std::int64_t count = std::min(kRows, task.input.size(0) - first);
    const auto rows = [&](const at::Tensor& all) { return all.narrow(0, first, count); };
    at::Tensor dense = rows(dense_->rows());
    dense.add_(ffn->forward(dense_->ffn_input(layer, first, count)));
    const at::Tensor x = stream_->ffn_input(layer, first, count);
    const at::Tensor y = ffn->forward(x);
    const at::Tensor reached = rows(stream_->rows()) + y;
    rows(task.weight).copy_(reached.to(at::kFloat).square().mean(1).add_(1e-12).reciprocal_());
    const at::Tensor target = y + method_.correction * (dense - reached);
    if (!at::isfinite(target).all().item<bool>())
      throw Error(fmt::format(
          "train: layer {}: the stream of the dense model or of the student is not finite; is a "
          "model broken, or the learning rate too high?",
          layer));
    rows(task.input).copy_(x);
    rows(task.target).copy_(target);
  }
  task.weight /= task.weight.mean();
  return task;
}

/// Adam's steps do not know how large a router's weights are, and only the order of its logits
/// counts: the rate goes by their spread. Half of it, so that a router moves as an expert does.
double LayerwiseRun::router_rate(MoeFfnImpl& moe, const LayerTask& task) const {
  const at::NoGradGuard no_grad;
  const at::Tensor sample = task.input.narrow(0, 0, std::min(kRows, task.input.size(0)));
  return 0.5 * at::linear(sample, moe.w_router).to(at::kFloat).std(1).mean().item<double>();
}

void LayerwiseRun::train_layer(std::int64_t layer, const Phase& phase, const LayerTask& task) {
  MoeFfn moe = student_->layers()[static_cast<std::size_t>(layer)].moe;
  AdamW optimizer(spec_.adamw);
  std::vector<at::Tensor> tensors;
  for (const auto& parameter : recipe_.parameters) {
    if (!phase.trains(parameter)) continue;
    const bool router = parameter.tensor.is_same(moe->w_router);
    optimizer.add(parameter.name, parameter.tensor, parameter.decay,
                  router ? router_rate(*moe, task) : 1.0);
    tensors.push_back(parameter.tensor);
  }
  if (step_ < first_step_) {
    const RunPosition position = store(step_).restore(optimizer, identity_, io_.notice);
    step_ = position.step;
    tokens_ = position.tokens;
    return;
  }
  const FreezeAudit audit(*student_, recipe_, phase);
  for (auto& tensor : tensors) tensor.set_requires_grad(true);
  WindowOrder order(task.input.size(0), spec_.seed + static_cast<std::uint64_t>(layer));
  const std::int64_t rows = std::min(spec_.batch * data_.context, task.input.size(0));
  const std::int64_t begin = step_, end = step_ + phase.steps;
  while (step_ < end && !stop_requested()) {
    const auto chosen = order.next(rows);
    take_step(phase, task, moe, optimizer, tensors,
              at::tensor(at::ArrayRef<std::int64_t>(chosen)).to(task.input.device()));
  }
  for (auto& tensor : tensors) tensor.set_requires_grad(false);
  optimizer.zero_grad();
  audit.verify();
  if (step_ == end && !io_.directory.empty())
    store(begin).save({step_, tokens_, order.cursor()}, optimizer, identity_);
}

void LayerwiseRun::take_step(const Phase& phase, const LayerTask& task, MoeFfn& moe,
                             AdamW& optimizer, std::span<const at::Tensor> tensors,
                             const at::Tensor& rows) {
  const auto step_start = Clock::now();
  const std::int64_t at_layer = step_ % method_.steps;
  StepReport now;
  now.steps = steps_;
  now.phase = phase.name;
  now.learning_rate = learning_rate_at(
      {spec_.learning_rate, spec_.min_lr_ratio, spec_.warmup_steps, method_.steps}, at_layer);
  optimizer.zero_grad();
  const at::Tensor error =
      relative_error(moe->forward(task.input.index_select(0, rows)),
                     task.target.index_select(0, rows), task.weight.index_select(0, rows));
  now.loss = error.item<double>();
  now.parts.emplace_back("error", now.loss);
  error.backward();
  if (at_layer == 0) check_gradients_arrive(recipe_, phase);
  now.grad_norm = clip_gradients(tensors, spec_.clip_norm);
  if (!std::isfinite(now.loss) || !std::isfinite(now.grad_norm))
    throw Error(fmt::format(
        "train: the error or its gradient is not finite at step {} ({}); lower the learning rate",
        step_ + 1, phase.name));
  optimizer.step(now.learning_rate);
  ++step_;
  tokens_ = (at_layer == 0 ? 0 : tokens_) + rows.size(0);
  run_tokens_ += rows.size(0);
  training_s_ += std::chrono::duration<double>(Clock::now() - step_start).count();
  now.step = step_;
  now.logged = step_ == steps_ || step_ % method_.steps == 0 || step_ % spec_.log_every == 0;
  report(now);
}

/// The layer's output goes into the student's stream.
void LayerwiseRun::finish_layer(std::int64_t layer, const LayerTask& task) {
  const at::NoGradGuard no_grad;
  DecoderLayer& weights = student_->layers()[static_cast<std::size_t>(layer)];
  for (std::int64_t first = 0; first < task.input.size(0); first += kRows) {
    const std::int64_t count = std::min(kRows, task.input.size(0) - first);
    const at::Tensor x = task.input.narrow(0, first, count);
    stream_->rows()
        .narrow(0, first, count)
        .add_(weights.moe.is_empty() ? weights.dense->forward(x) : weights.moe->forward(x));
  }
  if (!weights.moe.is_empty()) weights.moe->forget();
}

void LayerwiseRun::report(StepReport& report) {
  report.tokens = tokens_;
  report.tokens_per_s = static_cast<double>(run_tokens_) / std::max(training_s_, 1e-9);
  report.elapsed_s = std::chrono::duration<double>(Clock::now() - start_).count();
  report.eta_s = step_ > first_step_ ? report.elapsed_s / static_cast<double>(step_ - first_step_) *
                                           static_cast<double>(steps_ - step_)
                                     : 0.0;
  if (metrics_ && report.logged) metrics_->append(metrics_line(report));
  if (io_.progress) io_.progress(report);
  result_.last = report;
}

void LayerwiseRun::report_held_out(HeldOutQuality quality) {
  StepReport now = step_ > 0 ? result_.last : StepReport{};
  now.step = step_;
  now.steps = steps_;
  if (now.phase.empty()) now.phase = recipe_.phases.front().name;
  now.held_out = quality;
  now.logged = true;
  report(now);
}

}  // namespace

std::string to_json(const LayerwiseSpec& spec) {
  const nlohmann::ordered_json object = {{"steps", spec.steps},
                                         {"parts", part_names(spec.parts)},
                                         {"correction", spec.correction},
                                         {"temperature", spec.temperature}};
  return object.dump();
}

TrainResult layerwise(Transformer student, Transformer teacher, const TokenWindows& data,
                      const TokenWindows* held_out, const LayerwiseSpec& method,
                      const TrainSpec& spec, const TrainIo& io) {
  check(spec);
  check_layerwise_spec(method);
  require(!student->moe_layers().empty(),
          "layerwise: the student has no experts; convert the dense model first");
  require(!teacher.is_empty(), "layerwise: needs the dense model as teacher");
  check_teacher("layerwise", student, teacher);
  return LayerwiseRun(std::move(student), std::move(teacher), data, held_out, method, spec, io)
      .go();
}

TrainResult train_layerwise(const Checkpoint& student, const Checkpoint* teacher,
                            const TokenWindows& data, const TokenWindows* held_out,
                            const LayerwiseSpec& method, const TrainSpec& spec, const TrainIo& io) {
  check(spec);
  check_layerwise_spec(method);
  Transformer model(TransformerImpl::load(student, spec.dtype, spec.device));
  Transformer dense = teacher != nullptr
                          ? Transformer(TransformerImpl::load(*teacher, spec.dtype, spec.device))
                          : dense_teacher(model);
  TrainResult result = layerwise(model, dense, data, held_out, method, spec, io);
  record_settings(result, "layerwise", to_json(method), spec);
  return result;
}

}  // namespace cleave::train
