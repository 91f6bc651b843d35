#include "cleave/train/optimizer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "support/paths.h"

namespace cleave::train {
namespace {

TEST(Schedule, WarmsUpThenFallsToTheFloor) {
  const ScheduleSpec spec{
      .learning_rate = 2.0, .min_lr_ratio = 0.1, .warmup_steps = 4, .steps = 15};
  EXPECT_DOUBLE_EQ(learning_rate_at(spec, 0), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec, 1), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec, 3), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec, 4), 2.0);   // cos(0)
  EXPECT_DOUBLE_EQ(learning_rate_at(spec, 9), 1.1);   // half way: cos(pi / 2)
  EXPECT_DOUBLE_EQ(learning_rate_at(spec, 14), 0.2);  // the last step: the floor
}

TEST(Schedule, WithoutWarmUpStartsAtThePeak) {
  EXPECT_DOUBLE_EQ(learning_rate_at({1.0, 0.0, 0, 2}, 0), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_at({1.0, 0.0, 0, 2}, 1), 0.0);
  EXPECT_DOUBLE_EQ(learning_rate_at({1.0, 0.0, 0, 1}, 0), 1.0);
}

at::Tensor with_gradient(std::vector<float> gradient) {
  const auto n = static_cast<std::int64_t>(gradient.size());
  at::Tensor t = at::zeros({n}, at::kFloat).set_requires_grad(true);
  t.mutable_grad() = at::from_blob(gradient.data(), {n}, at::kFloat).clone();
  return t;
}

TEST(ClipGradients, BoundsTheCommonNorm) {
  const std::vector<at::Tensor> tensors = {with_gradient({3.0f, 0.0f}),
                                           with_gradient({0.0f, 4.0f})};
  EXPECT_NEAR(clip_gradients(tensors, 1.0), 5.0, 1e-6);
  EXPECT_NEAR(tensors[0].grad()[0].item<double>(), 0.6, 1e-6);
  EXPECT_NEAR(tensors[1].grad()[1].item<double>(), 0.8, 1e-6);
  EXPECT_NEAR(clip_gradients(tensors, 0.0), 1.0, 1e-6) << "0 only measures";
}

TEST(ClipGradients, LeavesSmallGradientsBitwise) {
  const std::vector<at::Tensor> tensors = {with_gradient({0.1f, 0.2f})};
  const at::Tensor before = tensors[0].grad().clone();
  clip_gradients(tensors, 1.0);
  EXPECT_TRUE(at::equal(tensors[0].grad(), before));
}

// Ten steps of torch.optim.AdamW on two parameters (one without decay), written by
// scripts/golden/make_training.py. A wrong bias correction or coupled decay is off from step 1.
TEST(AdamW, ProducesPyTorchValues) {
  std::ifstream in(testing::source_dir() / "tests" / "golden" / "adamw.json");
  ASSERT_TRUE(in) << "tests/golden/adamw.json is missing";
  const auto golden = nlohmann::json::parse(in);
  const auto tensor = [](const nlohmann::json& values) {
    auto v = values.get<std::vector<float>>();
    return at::from_blob(v.data(), {static_cast<std::int64_t>(v.size())}, at::kFloat).clone();
  };
  AdamW optimizer({golden["beta1"], golden["beta2"], golden["epsilon"], golden["weight_decay"]});
  at::Tensor a = tensor(golden["start"]).set_requires_grad(true);
  at::Tensor b = tensor(golden["start"]).set_requires_grad(true);
  optimizer.add("a", a, true);
  optimizer.add("b", b, false);
  for (const auto& step : golden["steps"]) {
    a.mutable_grad() = tensor(step["gradient"]);
    b.mutable_grad() = tensor(step["gradient"]);
    optimizer.step(step["learning_rate"]);
    // A few roundings of float32 per step, values near 1.
    EXPECT_LT((a - tensor(step["decayed"])).abs().max().item<float>(), 2e-6f);
    EXPECT_LT((b - tensor(step["plain"])).abs().max().item<float>(), 2e-6f);
  }
}

TEST(AdamW, LeavesFrozenParametersBitwise) {
  at::Tensor frozen = at::ones({3}, at::kFloat);
  AdamW optimizer({});
  optimizer.add("frozen", frozen, true);
  optimizer.step(0.1);
  EXPECT_TRUE(at::equal(frozen, at::ones({3}, at::kFloat)));
  EXPECT_EQ(optimizer.slots()[0].steps, 0);
}

TEST(AdamW, SmallUpdatesSurviveInBfloat16) {
  at::Tensor p = at::ones({1}, at::kBFloat16).set_requires_grad(true);
  AdamW optimizer({.weight_decay = 0.0});
  optimizer.add("p", p, false);
  for (int i = 0; i < 100; ++i) {
    p.mutable_grad() = at::ones({1}, at::kBFloat16);
    optimizer.step(1e-4);  // bfloat16 cannot tell 1 - 1e-4 from 1
  }
  EXPECT_NEAR(p.item<float>(), 0.99f, 0.004f);
}

}  // namespace
}  // namespace cleave::train
