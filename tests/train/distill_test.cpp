// Light tuning of conversions to a budget, on the bundled model.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cleave/error.h"
#include "cleave/export.h"
#include "cleave/train/losses.h"
#include "cleave/train/recipes.h"
#include "train/budget_model.h"
#include "train/core_logits.h"

namespace cleave::train {
namespace {

namespace fs = std::filesystem;

class Distill : public cleave::testing::BudgetModel {
 protected:
  static TrainResult run(const fs::path& student, const DistillSpec& method, const TrainSpec& spec,
                         const TrainIo& io = {}) {
    const Checkpoint dense = Checkpoint::open(dense_dir());
    const TokenWindows data = windows(30, 180), held_out = windows(212, 8);
    return train_distill(Checkpoint::open(student), &dense, data, &held_out, method, spec, io);
  }
};
using cleave::testing::stored;

TEST_F(Distill, LoadedModelsEqualTheCore) {
  const torch::NoGradGuard no_grad;
  for (const fs::path& dir : {granite_dir(), mixtral_dir()}) {
    SCOPED_TRACE(dir.string());
    const at::Tensor tokens = (torch::arange(60) * 37 % 1024).unsqueeze(0);
    const at::Tensor expected = cleave::testing::core_logits(Checkpoint::open(dir), tokens);
    // With cleave.json the hard gates are exact, where core runs what is stored: weights that are
    // 1 / K up to epsilon times the logits.
    EXPECT_LT(logit_kl(load(dir)->forward(tokens)[0], expected).item<double>(), 1e-4);
    // Without it both run what is stored.
    const fs::path plain = dir_->path() / "plain";
    fs::copy(dir, plain, fs::copy_options::recursive);
    fs::remove(plain / "cleave.json");
    const at::Tensor logits = load(plain)->forward(tokens)[0];
    fs::remove_all(plain);
    EXPECT_LT((logits - expected).abs().max().item<double>(), 1e-3);
    EXPECT_GT(expected.std().item<double>(), 0.1) << "nothing to compare";
  }
}

TEST_F(Distill, LoadWriteLoadIsBitwise) {
  const Checkpoint source = Checkpoint::open(granite_dir());
  Transformer model = load(granite_dir());
  {
    const torch::NoGradGuard no_grad;  // as training would leave it
    torch::manual_seed(1);
    for (MoeFfn& layer : model->moe_layers()) {
      ASSERT_FALSE(layer->shared.is_empty());
      for (at::Tensor& p : layer->parameters()) p.add_(0.01 * torch::randn_like(p));
      // Folding by K = 8 and epsilon, powers of two, rounds nothing.
    }
  }
  const ModelConfig& config = source.config();
  const fs::path out = dir_->path() / "again";
  write_granite_moe_shared(out, source,
                           {config.num_experts, config.experts_per_token, config.intermediate_size,
                            config.shared_intermediate_size},
                           model->named_tensors(), *model->provenance(), {.dtype = DType::kF32});
  Transformer again = load(out);
  EXPECT_EQ(stored(model), stored(again));
  const at::Tensor tokens = torch::arange(30).unsqueeze(0);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(at::equal(model->forward(tokens), again->forward(tokens)));
}

TEST_F(Distill, LowersTheHeldOutKl) {
  TrainSpec spec = settings();
  spec.batch = 8;
  spec.learning_rate = 3e-4;
  const TrainResult result = run(granite_dir(), {.steps = 20}, spec);
  ASSERT_TRUE(result.before && result.after);
  EXPECT_TRUE(result.after->has_kl);
  EXPECT_LT(result.after->kl, 0.95 * result.before->kl);
  ASSERT_TRUE(result.provenance);
  EXPECT_EQ(result.provenance->router, "trained");
  EXPECT_EQ(result.provenance->gate, GateMode::kHard);
  const auto record = nlohmann::json::parse(result.provenance->spec_json);
  EXPECT_EQ(record["distill"]["steps"], 20);
  EXPECT_EQ(record["train"]["batch"], 8);
  EXPECT_EQ(record["active_share"], 0.5);
}

TEST_F(Distill, TunesAMixtralWithHardGates) {
  const TrainResult result = run(mixtral_dir(), {.steps = 2}, settings());
  ASSERT_TRUE(result.after);
  EXPECT_NE(result.after->kl, result.before->kl);
  EXPECT_LT(result.after->kl, 1.5 * result.before->kl);
}

TEST_F(Distill, SupervisionAloneTeachesTheRouters) {
  TrainSpec spec = settings();
  spec.learning_rate = 2e-3;
  const DistillSpec method{.steps = 20,
                           .parts = parse_distill_parts("router"),
                           .distill_weight = 0.0,
                           .router_weight = 1.0};
  TrainIo io;
  std::vector<double> recall;
  io.progress = [&](const StepReport& report) {
    for (const auto& [name, value] : report.values)
      if (name == "router_recall") recall.push_back(value);
  };
  run(granite_dir(), method, spec, io);
  ASSERT_EQ(recall.size(), 20u);
  EXPECT_GT(recall.back(), recall.front() + 0.01);
}

TEST_F(Distill, ResumesBitwise) {
  const DistillSpec method{.steps = 6};
  TrainSpec spec = settings();
  spec.checkpoint_every = 2;
  const auto whole = run(granite_dir(), method, spec);
  std::atomic<bool> stop = false;
  TrainIo first{.directory = dir_->path() / "run"};
  first.stop = &stop;
  first.progress = [&](const StepReport& report) { stop = report.step == 3; };
  EXPECT_TRUE(run(granite_dir(), method, spec, first).interrupted);
  TrainIo second{.directory = dir_->path() / "run", .resume = true};
  const auto resumed = run(granite_dir(), method, spec, second);
  EXPECT_EQ(resumed.step, 6);
  EXPECT_EQ(stored(resumed.model), stored(whole.model));
  TrainIo third = second;
  EXPECT_THROW(run(granite_dir(), {.steps = 6, .temperature = 0.5}, spec, third), InvalidArgument);
}

TEST_F(Distill, TrainsTheNamedPartsAndNothingElse) {
  const auto before = stored(load(granite_dir()));
  const auto is_part = [](const std::string& name, const std::string& part) {
    const auto has = [&](const char* text) { return name.find(text) != std::string::npos; };
    if (part == "router") return has(".router.");
    if (part == "experts") return has("block_sparse_moe.") && !has(".router.");
    if (part == "shared") return has("shared_mlp.");
    if (part == "norms") return has("norm");
    return has("_proj");
  };
  for (const std::string part : {"router", "experts", "shared", "norms", "attention"}) {
    SCOPED_TRACE(part);
    const DistillSpec method{.steps = 1, .parts = parse_distill_parts(part)};
    const auto after = stored(run(granite_dir(), method, settings()).model);
    ASSERT_EQ(before.size(), after.size());
    for (const auto& [name, values] : before)
      EXPECT_EQ(values != after.at(name), is_part(name, part)) << name;
  }
}

TEST_F(Distill, ReadsPartNames) {
  EXPECT_EQ(part_names(parse_distill_parts("ffn")),
            (std::vector<std::string>{"router", "experts", "shared"}));
  EXPECT_EQ(part_names(parse_distill_parts("norms,router")),
            (std::vector<std::string>{"router", "norms"}));
  for (const char* bad : {"", "all", "ffn,", ",ffn", "router;norms"})
    EXPECT_THROW(parse_distill_parts(bad), InvalidArgument) << bad;
}

TEST_F(Distill, RefusesWhatMakesNoSense) {
  const Checkpoint student = Checkpoint::open(granite_dir());
  const TokenWindows text = windows(0, 4);
  // `down` was refitted: the experts together are not the dense model.
  EXPECT_THROW(train_distill(student, nullptr, text, nullptr, {}, settings()), InvalidArgument);
  EXPECT_THROW(train_distill(student, &student, text, nullptr, {}, settings()), InvalidArgument);
  Transformer model = load(granite_dir()), dense = load(dense_dir());
  EXPECT_THROW(factorllm(model, dense, {}), InvalidArgument) << "it knows no shared slice";
  EXPECT_THROW(distill(dense, dense, {}), InvalidArgument) << "no experts";
  EXPECT_THROW(distill(model, Transformer(nullptr), {}), InvalidArgument);
  EXPECT_THROW(distill(model, dense, {.steps = 0}), InvalidArgument);
  EXPECT_THROW(distill(model, dense, {.temperature = 0.0}), InvalidArgument);
  EXPECT_THROW(distill(model, dense, {.distill_weight = -1.0}), InvalidArgument);
  EXPECT_THROW(distill(model, dense, {.distill_weight = 0.0, .router_weight = 0.0}),
               InvalidArgument);
  EXPECT_THROW(
      distill(model, dense, {.parts = parse_distill_parts("norms"), .distill_weight = 0.0}),
      InvalidArgument)
      << "the routers' loss alone, and they are not trained";
}

TEST_F(Distill, AHardRouterWithoutALossIsFound) {
  const DistillSpec method{.steps = 1, .router_weight = 0.0, .soft_border = false};
  try {
    run(granite_dir(), method, settings());
    ADD_FAILURE() << "not noticed";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("router_weight"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace cleave::train
