#include "cleave/train/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "cleave/error.h"
#include "cleave/train/data.h"
#include "cleave/train/recipes.h"
#include "support/paths.h"
#include "train/tiny_model.h"

namespace cleave::train {
namespace {

using cleave::testing::TempDir;
using cleave::testing::TinySpec;

/// A tiny converted model on disk, a text with something to learn, and settings of few steps.
class Trainer : public ::testing::Test {
 protected:
  void SetUp() override { write({}); }
  void write(const TinySpec& tiny) {
    tiny_ = tiny;
    cleave::testing::write_tiny(dir_.path(), tiny, cleave::testing::tiny_dense(tiny));
  }
  Checkpoint student() const { return Checkpoint::open(dir_.path() / "moe"); }
  Transformer load() const { return Transformer(TransformerImpl::load(student())); }
  static FactorLlmSpec method(const std::string& phases, std::int64_t steps = 8) {
    FactorLlmSpec spec;
    spec.phases = parse_phases(phases, steps);
    return spec;
  }
  TrainResult run(const FactorLlmSpec& method, const TrainSpec& spec, const TrainIo& io = {}) {
    return train_factorllm(student(), nullptr, text_, &held_out_, method, spec, io);
  }
  TrainIo io(const std::string& name) const { return {.directory = dir_.path() / name}; }

  TempDir dir_;
  TinySpec tiny_;
  TokenWindows text_ = cleave::testing::tiny_text(64, 16, 20, 3);
  TokenWindows held_out_ = cleave::testing::tiny_text(64, 16, 6, 4);
  TrainSpec spec_{.batch = 2,
                  .learning_rate = 0.01,
                  .warmup_steps = 2,
                  .seed = 9,
                  .threads = 1,
                  .eval_every = 4,
                  .log_every = 1,
                  .checkpoint_every = 4};
};

/// Every weight by its stored name.
std::map<std::string, std::vector<float>> weights_of(Transformer model) {
  std::map<std::string, std::vector<float>> all;
  for (const auto& tensor : model->named_tensors()) all[tensor.name] = tensor.load();
  return all;
}
bool is_router(const std::string& name) { return name.ends_with("block_sparse_moe.gate.weight"); }
bool is_expert(const std::string& name) { return name.find(".experts.") != std::string::npos; }

std::vector<nlohmann::json> lines_of(const std::filesystem::path& file) {
  std::vector<nlohmann::json> lines;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

TEST_F(Trainer, LearnsALearnableText) {
  const auto result = run(method("joint", 60), spec_);
  ASSERT_TRUE(result.before && result.after);
  EXPECT_LT(result.after->perplexity, 0.5 * result.before->perplexity);
  EXPECT_EQ(result.step, 60);
  EXPECT_FALSE(result.interrupted);
  ASSERT_TRUE(result.provenance);
  EXPECT_EQ(result.provenance->router, "trained");
}

TEST_F(Trainer, RouterPhaseLeavesTheExpertsBitwise) {
  const auto before = weights_of(load());
  const auto after = weights_of(run(method("router"), spec_).model);
  ASSERT_EQ(before.size(), after.size());
  for (const auto& [name, values] : before)
    EXPECT_EQ(values != after.at(name), is_router(name)) << name;
}

TEST_F(Trainer, ExpertsPhaseLeavesTheRoutersBitwise) {
  const auto before = weights_of(load());
  const auto after = weights_of(run(method("experts", 20), spec_).model);
  for (const auto& [name, values] : before)
    EXPECT_EQ(values != after.at(name), is_expert(name)) << name;
}

TEST_F(Trainer, PhasesFollowEachOther) {
  std::vector<std::string> phases;
  TrainIo io;
  io.progress = [&](const StepReport& report) { phases.push_back(report.phase); };
  run(method("router:2,experts:1,joint:1"), spec_, io);
  EXPECT_EQ(phases, (std::vector<std::string>{"router", "router", "router", "experts", "joint"}))
      << "the first is the evaluation before step 1";
}

TEST_F(Trainer, AuditCatchesAChangedFrozenTensor) {
  Transformer model = load();
  Recipe recipe = factorllm(model, dense_teacher(model), method("router"));
  for (const at::Tensor& victim : {model->moe_layers()[1]->w_up, model->layers()[0].q}) {
    recipe.phases[0].losses.back().value = [victim](const StepOutputs& out, Metrics&) {
      victim.data_ptr<float>()[3] += 1e-6f;  // behind autograd's back
      return out.logits.sum() * 0.0;
    };
    const std::string message = message_of([&] { train(model, recipe, text_, nullptr, spec_); });
    EXPECT_NE(message.find("freeze audit"), std::string::npos) << message;
  }
}

TEST_F(Trainer, AuditCatchesARouterWithoutGradient) {
  auto no_pa = method("router");
  no_pa.pa_weight = no_pa.balance_weight = 0.0;
  no_pa.gate = GateMode::kHard;
  std::string message = message_of([&] { run(no_pa, spec_); });
  EXPECT_NE(message.find("layers.0.router"), std::string::npos) << message;
  EXPECT_NE(message.find("straight-through"), std::string::npos) << message;
  no_pa.straight_through = true;
  EXPECT_NO_THROW(run(no_pa, spec_));

  write({.K = 1});
  auto top1 = method("router");
  top1.pa_weight = top1.balance_weight = 0.0;
  message = message_of([&] { run(top1, spec_); });
  EXPECT_NE(message.find("K = 1"), std::string::npos) << message;
}

TEST_F(Trainer, ResumesBitwise) {
  const auto method = this->method("router:3,joint:7");
  const auto whole = run(method, spec_, io("whole"));

  std::atomic<bool> stop = false;
  TrainIo first = io("parts");
  first.stop = &stop;
  first.progress = [&](const StepReport& report) { stop = report.step == 5; };
  const auto part = run(method, spec_, first);
  EXPECT_TRUE(part.interrupted);
  EXPECT_EQ(part.step, 5);
  TrainIo second = io("parts");
  second.resume = true;
  const auto resumed = run(method, spec_, second);
  EXPECT_EQ(resumed.step, 10);
  EXPECT_EQ(weights_of(resumed.model), weights_of(whole.model));

  // Also the log is that of an undisturbed run, speed apart.
  auto expected = lines_of(dir_.path() / "whole" / "metrics.jsonl");
  auto actual = lines_of(dir_.path() / "parts" / "metrics.jsonl");
  for (auto* lines : {&expected, &actual})
    for (auto& line : *lines) line.erase("tokens_per_s");
  EXPECT_EQ(expected, actual);
}

TEST_F(Trainer, ResumesFromTheNewestWholeCheckpoint) {
  const auto whole = run(method("joint"), spec_, io("a"));
  const auto newest = dir_.path() / "a" / "checkpoints" / "step-8" / "weights.safetensors";
  std::filesystem::resize_file(newest, std::filesystem::file_size(newest) / 2);
  std::vector<std::string> notices;
  TrainIo again = io("a");
  again.resume = true;
  again.notice = [&](const std::string& line) { notices.push_back(line); };
  const auto resumed = run(method("joint"), spec_, again);
  ASSERT_EQ(notices.size(), 2u);
  EXPECT_NE(notices[0].find("step 8 skipped"), std::string::npos) << notices[0];
  EXPECT_NE(notices[1].find("after step 4"), std::string::npos) << notices[1];
  EXPECT_EQ(weights_of(resumed.model), weights_of(whole.model));
  std::set<std::int64_t> steps;
  for (const auto& line : lines_of(dir_.path() / "a" / "metrics.jsonl"))
    EXPECT_TRUE(steps.insert(line["step"].get<std::int64_t>()).second) << "step written twice";
  EXPECT_EQ(steps.size(), 9u);
}

TEST_F(Trainer, ResumeRefusesAnotherTrajectoryAndNamesTheField) {
  run(method("joint"), spec_, io("a"));
  TrainIo again = io("a");
  again.resume = true;
  TrainSpec faster = spec_;
  faster.learning_rate = 0.02;
  std::string message = message_of([&] { run(method("joint"), faster, again); });
  EXPECT_NE(message.find("learning_rate was 0.01 and is 0.02"), std::string::npos) << message;
  auto other_loss = method("joint");
  other_loss.pa_weight = 0.1;
  message = message_of([&] { run(other_loss, spec_, again); });
  EXPECT_NE(message.find("pa_weight"), std::string::npos) << message;
  text_.tokens[5] ^= 1;
  message = message_of([&] { run(method("joint"), spec_, again); });
  EXPECT_NE(message.find("text"), std::string::npos) << message;
  text_.tokens[5] ^= 1;
  TrainSpec quieter = spec_;
  quieter.log_every = 5;
  EXPECT_NO_THROW(run(method("joint"), quieter, again)) << "logging changes no weight";
}

TEST_F(Trainer, RefusesToMixWithAnEarlierRun) {
  EXPECT_THROW(run(method("joint"), spec_, {.directory = dir_.path() / "a", .resume = true}),
               InvalidArgument)
      << "nothing to resume";
  run(method("joint"), spec_, io("a"));
  EXPECT_THROW(run(method("joint"), spec_, io("a")), InvalidArgument);
  EXPECT_NO_THROW(run(method("joint"), spec_, {.directory = dir_.path() / "a", .overwrite = true}));
}

TEST_F(Trainer, StoppedBeforeTheFirstStepCanBeResumed) {
  const std::atomic<bool> stop = true;
  TrainIo first = io("a");
  first.stop = &stop;
  const auto nothing = run(method("joint"), spec_, first);
  EXPECT_EQ(nothing.step, 0);
  EXPECT_TRUE(nothing.interrupted);
  EXPECT_EQ(run(method("joint"), spec_, {.directory = dir_.path() / "a", .resume = true}).step, 8);
}

TEST_F(Trainer, AFullDiskLeavesNoHalfCheckpoint) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{4096, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // write() then fails instead
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_THROW(run(method("joint"), spec_, io("a")), FileError);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(std::filesystem::is_empty(dir_.path() / "a" / "checkpoints"));
}

TEST_F(Trainer, KeepsTheNewestCheckpoints) {
  spec_.checkpoint_every = 1;
  spec_.keep_checkpoints = 3;
  run(method("joint"), spec_, io("a"));
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir_.path() / "a" / "checkpoints"))
    names.insert(entry.path().filename().string());
  EXPECT_EQ(names, (std::set<std::string>{"step-6", "step-7", "step-8"}));
}

TEST_F(Trainer, AccumulationEqualsABiggerBatch) {
  auto method = this->method("joint", 4);
  method.balance_weight = 0.0;  // not linear in the batch, the others are
  TrainSpec big = spec_;
  big.batch = 4;
  TrainSpec small = spec_;
  small.grad_accumulation = 2;
  // A long epsilon: the default would turn rounding noise of vanishing gradients into whole steps.
  big.adamw.epsilon = small.adamw.epsilon = 1e-3;
  const auto a = weights_of(run(method, big).model);
  const auto b = weights_of(run(method, small).model);
  for (const auto& [name, values] : a)
    for (std::size_t i = 0; i < values.size(); ++i)
      ASSERT_NEAR(values[i], b.at(name)[i], 2e-5) << name;
}

TEST_F(Trainer, ClippingBoundsTheStepsGradient) {
  Transformer model = load();
  Recipe recipe = factorllm(model, dense_teacher(model), method("joint", 1));
  spec_.clip_norm = 0.01;
  double reported = 0.0;
  TrainIo io;
  io.progress = [&](const StepReport& report) {
    reported = report.grad_norm;
    double squares = 0.0;
    for (const auto& parameter : recipe.parameters)
      squares += std::pow(parameter.tensor.grad().norm().item<double>(), 2);
    EXPECT_NEAR(std::sqrt(squares), 0.01, 1e-6);
  };
  train(model, recipe, text_, nullptr, spec_, io);
  EXPECT_GT(reported, 0.01);
}

TEST_F(Trainer, NamesTheLossPartThatIsNotFinite) {
  Transformer model = load();
  Recipe recipe = factorllm(model, dense_teacher(model), method("joint"));
  recipe.phases[0].losses[1].value = [](const StepOutputs& out, Metrics&) {
    return out.logits.sum() * (out.step == 2 ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  };
  const std::string message = message_of([&] { train(model, recipe, text_, nullptr, spec_); });
  EXPECT_NE(message.find("'pa' is nan at step 3"), std::string::npos) << message;
}

TEST_F(Trainer, RefusesBadInput) {
  TrainSpec bad = spec_;
  bad.batch = 0;
  EXPECT_THROW(run(method("joint"), bad), InvalidArgument);
  text_.tokens[7] = 64;
  EXPECT_THROW(run(method("joint"), spec_), InvalidArgument);
  text_.tokens.resize(10);
  EXPECT_THROW(run(method("joint"), spec_), InvalidArgument) << "shorter than a window";
}

}  // namespace
}  // namespace cleave::train
