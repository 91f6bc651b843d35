// Light tuning layer by layer, on the bundled model.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cleave/error.h"
#include "cleave/train/data.h"
#include "cleave/train/recipes.h"
#include "train/budget_model.h"
#include "train/residual_stream.h"

namespace cleave::train {
namespace {

namespace fs = std::filesystem;
using cleave::testing::stored;

class Layerwise : public cleave::testing::BudgetModel {
 protected:
  static TrainSpec layer_settings() {
    TrainSpec spec = settings();
    spec.batch = 8;
    spec.learning_rate = 2e-3;
    spec.min_lr_ratio = 0.0;
    spec.adamw.beta2 = 0.99;
    return spec;
  }
  static TrainResult run(const LayerwiseSpec& method, const TrainSpec& spec, const TrainIo& io = {},
                         std::int64_t count = 20) {
    const Checkpoint dense = Checkpoint::open(dense_dir());
    const TokenWindows data = windows(30, count), held_out = windows(212, 8);
    return train_layerwise(Checkpoint::open(granite_dir()), &dense, data, &held_out, method, spec,
                           io);
  }
};

TEST_F(Layerwise, AStreamThroughAllLayersGivesTheLogits) {
  const torch::NoGradGuard no_grad;
  Transformer model = load(dense_dir());
  const TokenWindows text = windows(3, 5);
  ResidualStream stream(model, text, /*batch=*/2);  // the last pass has one window
  for (std::int64_t l = 0; l < model->config().num_layers; ++l) {
    stream.attend(l);
    for (const auto& [first, count] : {std::pair<std::int64_t, std::int64_t>{0, 100}, {100, 220}})
      stream.rows()
          .narrow(0, first, count)
          .add_(model->layers()[static_cast<std::size_t>(l)].dense->forward(
              stream.ffn_input(l, first, count)));
  }
  // The final norm and the head as the definition has them.
  const at::Tensor x = stream.rows();
  const double epsilon = model->config().rms_norm_eps;
  const at::Tensor normed = x * (x.square().mean(-1, true) + epsilon).rsqrt() * model->final_norm();
  const std::vector<std::int64_t> ids = {0, 1, 2, 3, 4};
  const at::Tensor expected = model->forward(batch_tokens(text, ids)).flatten(0, 1);
  at::Tensor head;
  for (const auto& tensor : model->named_parameters())
    if (tensor.key() == "head") head = tensor.value();
  if (!head.defined()) head = model->embedding();
  EXPECT_LT((normed.mm(head.t()) - expected).abs().max().item<double>(), 1e-4);
}

TEST_F(Layerwise, EveryLayerLearnsAndTheHeldOutKlFalls) {
  std::vector<std::vector<double>> errors(4);
  TrainIo io;
  io.progress = [&](const StepReport& report) {
    if (!report.held_out)
      errors[static_cast<std::size_t>((report.step - 1) / 20)].push_back(report.loss);
  };
  const TrainResult result = run({.steps = 20}, layer_settings(), io, /*count=*/180);
  EXPECT_EQ(result.step, 80);
  EXPECT_EQ(result.last.tokens, 20 * 8 * 64) << "of each layer";
  for (std::size_t l = 0; l < errors.size(); ++l) {
    SCOPED_TRACE(l);
    ASSERT_EQ(errors[l].size(), 20u);
    EXPECT_LT(errors[l].back(), 0.97 * errors[l].front());
  }
  ASSERT_TRUE(result.before && result.after);
  EXPECT_LT(result.after->kl, 0.95 * result.before->kl);
  ASSERT_TRUE(result.provenance);
  EXPECT_EQ(result.provenance->router, "trained");
  const auto record = nlohmann::json::parse(result.provenance->spec_json);
  EXPECT_EQ(record["layerwise"]["steps"], 20);
  EXPECT_EQ(record["active_share"], 0.5);
}

TEST_F(Layerwise, TheErrorIsThatOfTheDefinition) {
  // No correction, one step: the first layer's error is that of its FFN on the dense model's input.
  const torch::NoGradGuard no_grad;
  const TokenWindows text = windows(30, 3);
  Transformer student = load(granite_dir()), dense = load(dense_dir());
  ResidualStream stream(dense, text, 1);
  stream.attend(0);
  const at::Tensor x = stream.ffn_input(0, 0, stream.rows().size(0));
  const at::Tensor y = dense->layers()[0].dense->forward(x);
  const at::Tensor weight = 1.0 / (stream.rows() + y).square().mean(1);
  const at::Tensor off = (student->layers()[0].moe->forward_masked(x) - y).square().sum(1);
  const double expected =
      ((off * weight).sum() / (y.square().sum(1) * weight).sum()).item<double>();

  TrainSpec spec = layer_settings();
  spec.batch = 3;  // a step takes all tokens
  TrainIo io;
  double first = 0.0;
  io.progress = [&](const StepReport& report) {
    if (report.step == 1) first = report.loss;
  };
  {
    const torch::AutoGradMode grad(true);
    layerwise(student, dense, text, nullptr, {.steps = 1, .correction = 0.0}, spec, io);
  }
  EXPECT_NEAR(first, expected, 1e-5 * expected);
  EXPECT_GT(expected, 0.01) << "nothing to compare";
  for (const MoeFfn& moe : student->moe_layers())
    EXPECT_FALSE(moe->last().input.defined()) << "keeps an input as long as the text";
}

TEST_F(Layerwise, ResumesAfterALayerBitwise) {
  const LayerwiseSpec method{.steps = 3};
  const TrainSpec spec = layer_settings();
  const auto whole = run(method, spec);
  std::atomic<bool> stop = false;
  TrainIo first{.directory = dir_->path() / "layers"};
  first.stop = &stop;
  first.progress = [&](const StepReport& report) { stop = report.step == 7; };
  const auto interrupted = run(method, spec, first);
  EXPECT_TRUE(interrupted.interrupted);
  EXPECT_THROW(run(method, spec, {.directory = dir_->path() / "layers"}), InvalidArgument)
      << "an earlier run's checkpoints are there";
  TrainIo second{.directory = dir_->path() / "layers", .resume = true};
  std::int64_t steps = 0;
  second.progress = [&](const StepReport& report) { steps += report.held_out ? 0 : 1; };
  EXPECT_THROW(run({.steps = 3, .correction = 0.25}, spec, second), InvalidArgument);
  const auto resumed = run(method, spec, second);
  EXPECT_EQ(steps, 6) << "two of the four layers were finished";
  EXPECT_EQ(resumed.step, 12);
  EXPECT_EQ(stored(resumed.model), stored(whole.model));
}

TEST_F(Layerwise, ResumesInTheFirstLayerFromItsStart) {
  const LayerwiseSpec method{.steps = 2};
  const auto whole = run(method, layer_settings());
  std::atomic<bool> stop = false;
  TrainIo first{.directory = dir_->path() / "early"};
  first.stop = &stop;
  first.progress = [&](const StepReport& report) { stop = report.step == 1; };
  EXPECT_TRUE(run(method, layer_settings(), first).interrupted);
  const TrainIo second{.directory = dir_->path() / "early", .resume = true};
  EXPECT_EQ(stored(run(method, layer_settings(), second).model), stored(whole.model));
}

TEST_F(Layerwise, TrainsTheNamedPartsAndNothingElse) {
  const auto before = stored(load(granite_dir()));
  for (const std::string part : {"router", "experts", "shared"}) {
    SCOPED_TRACE(part);
    const auto after =
        stored(run({.steps = 1, .parts = parse_distill_parts(part)}, layer_settings()).model);
    for (const auto& [name, values] : before) {
      const bool router = name.find(".router.") != std::string::npos;
      const bool expert = name.find("block_sparse_moe.") != std::string::npos && !router;
      const bool shared = name.find("shared_mlp.") != std::string::npos;
      const bool trained = part == "router" ? router : part == "experts" ? expert : shared;
      EXPECT_EQ(values != after.at(name), trained) << name;
    }
  }
}

TEST_F(Layerwise, RefusesWhatMakesNoSense) {
  const TokenWindows text = windows(0, 4);
  Transformer model = load(granite_dir()), dense = load(dense_dir());
  const TrainSpec spec = layer_settings();
  const auto refused = [&](const LayerwiseSpec& method) {
    EXPECT_THROW(layerwise(model, dense, text, nullptr, method, spec), InvalidArgument);
  };
  refused({.steps = 0});
  refused({.parts = parse_distill_parts("ffn,norms")});
  refused({.parts = parse_distill_parts("attention")});
  refused({.correction = 1.5});
  refused({.temperature = 0.0});
  EXPECT_THROW(layerwise(dense, dense, text, nullptr, {}, spec), InvalidArgument) << "no experts";
  EXPECT_THROW(layerwise(model, Transformer(nullptr), text, nullptr, {}, spec), InvalidArgument);
  EXPECT_THROW(layerwise(model, model, text, nullptr, {}, spec), InvalidArgument);
  const fs::path empty = dir_->path() / "nothing";
  EXPECT_THROW(
      layerwise(model, dense, text, nullptr, {}, spec, {.directory = empty, .resume = true}),
      InvalidArgument);
}

}  // namespace
}  // namespace cleave::train
