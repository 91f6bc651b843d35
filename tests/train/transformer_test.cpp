#include "cleave/train/transformer.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cleave/error.h"
#include "cleave/train/losses.h"
#include "support/paths.h"
#include "train/rotary.h"

namespace cleave::train {
namespace {

namespace fs = std::filesystem;
using cleave::testing::source_dir;

const char* const kTinyModels[] = {"llama", "llama_long", "mixtral", "granitemoeshared"};

fs::path tiny(const std::string& name) {
  return source_dir() / "tests" / "golden" / "logits" / name;
}

at::Tensor as_tokens(const std::vector<std::int32_t>& ids) {
  std::vector<std::int64_t> wide(ids.begin(), ids.end());
  return torch::tensor(wide, torch::kLong).unsqueeze(0);
}

/// Ids and logits [T, V] that Transformers computed (scripts/golden/make_logits_golden.py).
struct Expected {
  std::vector<std::int32_t> ids;
  at::Tensor logits;
};

Expected expected_logits(const std::string& name) {
  const auto file = SafetensorsFile::open(tiny(name) / "expected.safetensors");
  Expected expected;
  for (const float id : file.read("ids")) expected.ids.push_back(static_cast<std::int32_t>(id));
  std::vector<float> logits = file.read("logits");
  const auto tokens = static_cast<std::int64_t>(expected.ids.size());
  expected.logits = torch::tensor(logits).view({tokens, -1});
  return expected;
}

at::Tensor train_logits(const Checkpoint& checkpoint, const std::vector<std::int32_t>& ids,
                        at::ScalarType dtype = at::kFloat) {
  const torch::NoGradGuard no_grad;
  return TransformerImpl::load(checkpoint, dtype)->forward(as_tokens(ids))[0].to(at::kDouble);
}

double max_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

/// A golden file with some rows and columns of the logits.
void expect_golden_subset(const fs::path& golden, const Checkpoint& checkpoint) {
  const auto json = nlohmann::json::parse(std::ifstream(golden));
  const at::Tensor logits = train_logits(checkpoint, json.at("ids"));
  const std::vector<std::int64_t> positions = json.at("positions"), columns = json.at("columns");
  for (std::size_t p = 0; p < positions.size(); ++p) {
    for (std::size_t c = 0; c < columns.size(); ++c) {
      ASSERT_NEAR(logits[positions[p]][columns[c]].item<double>(),
                  json.at("logits")[p][c].get<double>(), 2e-4)
          << "position " << positions[p] << " column " << columns[c];
    }
  }
}

TEST(Transformer, EqualsTransformersOnTinyModels) {
  for (const char* name : kTinyModels) {
    SCOPED_TRACE(name);
    const Expected expected = expected_logits(name);
    const at::Tensor logits = train_logits(Checkpoint::open(tiny(name)), expected.ids);
    EXPECT_LT(max_difference(logits, expected.logits), 2e-4);
    EXPECT_GT(expected.logits.std().item<double>(), 0.1) << "nothing to compare";
  }
}

TEST(Transformer, EqualsTransformersOnTinyStories) {
  const fs::path model = cleave::testing::tinystories_dir();
  CLEAVE_SKIP_WITHOUT(model);
  expect_golden_subset(source_dir() / "tests" / "golden" / "logits_tinystories.json",
                       Checkpoint::open(model));
}

TEST(LargeTransformer, EqualsTransformersOnSmolLm2) {
  const fs::path model = cleave::testing::smollm2_gguf();
  CLEAVE_SKIP_WITHOUT(model);
  const fs::path golden = source_dir() / "tests" / "golden" / "logits_smollm2.json";
  CLEAVE_SKIP_WITHOUT(golden);
  expect_golden_subset(golden, Checkpoint::open(model));
}

TEST(Transformer, Bfloat16StaysNearFloat32) {
  // How far a rounding carries depends on the model (an attention near saturation magnifies much).
  // Float32 against float64 measures it: the same roundings, 2^-16 of the size. Twice that, as in
  // bfloat16 the weights are rounded too, and twice again for luck in so few numbers. The median,
  // as a routed model may swap a near-tie.
  for (const char* name : kTinyModels) {
    SCOPED_TRACE(name);
    const Checkpoint checkpoint = Checkpoint::open(tiny(name));
    const auto ids = expected_logits(name).ids;
    const at::Tensor exact = train_logits(checkpoint, ids, at::kDouble);
    const auto median_error = [&](at::ScalarType dtype) {
      return (train_logits(checkpoint, ids, dtype) - exact).abs().median().item<double>();
    };
    const double single = median_error(at::kFloat), half = median_error(at::kBFloat16);
    EXPECT_LT(half, 4 * 65536.0 * single);
    EXPECT_GT(half, 100 * single) << "was it computed in bfloat16?";
  }
}

TEST(Transformer, RowsOfABatchDoNotSeeEachOther) {
  for (const char* name : kTinyModels) {
    SCOPED_TRACE(name);
    const torch::NoGradGuard no_grad;
    auto model = TransformerImpl::load(Checkpoint::open(tiny(name)));
    torch::manual_seed(1);
    const at::Tensor tokens = torch::randint(0, model->config().vocab_size, {3, 11}, torch::kLong);
    const at::Tensor together = model->forward(tokens);
    for (std::int64_t b = 0; b < 3; ++b) {
      EXPECT_LT(max_difference(together[b], model->forward(tokens.narrow(0, b, 1))[0]), 1e-4);
    }
  }
}

TEST(Transformer, ATokenSeesOnlyThePast) {
  for (const char* name : kTinyModels) {
    SCOPED_TRACE(name);
    const torch::NoGradGuard no_grad;
    auto model = TransformerImpl::load(Checkpoint::open(tiny(name)));
    at::Tensor tokens = torch::arange(12).unsqueeze(0);
    const at::Tensor before = model->forward(tokens);
    tokens[0][8] = 50;
    const at::Tensor after = model->forward(tokens);
    EXPECT_LT(max_difference(before.narrow(1, 0, 8), after.narrow(1, 0, 8)), 1e-4);
    EXPECT_GT(max_difference(before.narrow(1, 8, 4), after.narrow(1, 8, 4)), 1e-2);
  }
}

TEST(Transformer, ASlidingWindowForgets) {
  const torch::NoGradGuard no_grad;
  auto model = TransformerImpl::load(Checkpoint::open(tiny("mixtral")));
  ASSERT_EQ(model->config().sliding_window, 7);
  at::Tensor tokens = torch::arange(30).unsqueeze(0);
  const at::Tensor before = model->forward(tokens);
  tokens[0][3] = 60;
  const at::Tensor after = model->forward(tokens);
  // Two layers of window 7 reach 12 positions back: position 3 is out of sight from 16 on.
  EXPECT_LT(max_difference(before.narrow(1, 16, 14), after.narrow(1, 16, 14)), 1e-4);
  EXPECT_GT(max_difference(before.narrow(1, 4, 6), after.narrow(1, 4, 6)), 1e-2);
}

TEST(Transformer, EverythingIsFrozenUntilAsked) {
  auto model = TransformerImpl::load(Checkpoint::open(tiny("mixtral")));
  for (const at::Tensor& p : model->parameters()) EXPECT_FALSE(p.requires_grad());
  EXPECT_EQ(model->moe_layers().size(), 2u);

  MoeFfn last = model->layers()[1].moe;
  for (const at::Tensor& w : {last->w_up, last->w_router}) w.requires_grad_(true);
  const at::Tensor tokens = torch::arange(20).view({2, 10});
  const at::Tensor logits = model->forward(tokens);
  EXPECT_FALSE(model->layers()[0].moe->last().logits.requires_grad())
      << "layer 0 has nothing to learn and must not be part of the graph";
  language_model_loss(logits.view({20, -1}), tokens.view(-1)).backward();
  EXPECT_GT(last->w_up.grad().abs().max().item<double>(), 0.0);
  EXPECT_GT(last->w_router.grad().abs().max().item<double>(), 0.0);
  for (const auto& p : model->named_parameters()) {
    EXPECT_EQ(p.value().grad().defined(), p.value().requires_grad()) << p.key();
  }
}

TEST(Transformer, GradientOfTheLossMatchesADirectionalDifference) {
  auto model = TransformerImpl::load(Checkpoint::open(tiny("mixtral")), at::kDouble);
  const at::Tensor tokens = torch::arange(20).view({2, 10});
  const auto loss = [&] {
    return language_model_loss(model->forward(tokens).view({20, -1}), tokens.view(-1));
  };
  torch::manual_seed(2);
  for (const at::Tensor& w : model->parameters()) {
    w.requires_grad_(true);
    const at::Tensor gradient = torch::autograd::grad({loss()}, {w})[0];
    w.requires_grad_(false);
    // Along the gradient itself the derivative is |gradient|, the largest there is.
    const double norm = gradient.norm().item<double>();
    ASSERT_GT(norm, 0.0);
    const double h = 1e-6;
    const torch::NoGradGuard no_grad;
    w.add_(gradient, h / norm);
    const double up = loss().item<double>();
    w.add_(gradient, -2 * h / norm);
    const double down = loss().item<double>();
    w.add_(gradient, h / norm);
    EXPECT_NEAR((up - down) / (2 * h), norm, 1e-5 * norm + 1e-7);
  }
}

TEST(Transformer, RejectsTokensThatAreNoIds) {
  auto model = TransformerImpl::load(Checkpoint::open(tiny("llama")));
  EXPECT_THROW(model->forward(torch::zeros({3}, torch::kLong)), InvalidArgument);
  EXPECT_THROW(model->forward(torch::zeros({1, 3})), InvalidArgument);
  EXPECT_THROW(model->forward(torch::full({1, 3}, 96, torch::kLong)), InvalidArgument);
  EXPECT_THROW(model->forward(torch::full({1, 3}, -1, torch::kLong)), InvalidArgument);
}

TEST(Rotary, LinearScalingStretchesPositions) {
  RopeConfig plain, stretched;
  stretched.type = RopeConfig::Type::kLinear;
  stretched.factor = 2.0;  // a power of two: the angles are the same numbers
  const RotaryTable a = rotary_table(plain, 8, 10, at::kFloat, at::kCPU);
  const RotaryTable b = rotary_table(stretched, 8, 20, at::kFloat, at::kCPU);
  const at::Tensor even = torch::arange(0, 20, 2);
  EXPECT_TRUE(at::equal(a.cos, b.cos.index_select(0, even)));
  EXPECT_TRUE(at::equal(a.sin, b.sin.index_select(0, even)));
}

TEST(Rotary, ScoresDependOnDistanceOnly) {
  torch::manual_seed(3);
  const RotaryTable table = rotary_table({}, 16, 12, at::kFloat, at::kCPU);
  const at::Tensor q = torch::randn({1, 1, 1, 16}).expand({1, 1, 12, 16});
  const at::Tensor k = torch::randn({1, 1, 1, 16}).expand({1, 1, 12, 16});
  const at::Tensor scores = rotate(q, table).matmul(rotate(k, table).transpose(2, 3))[0][0];
  for (std::int64_t i = 0; i + 4 < 12; ++i) {
    EXPECT_NEAR(scores[i + 4][i].item<float>(), scores[4][0].item<float>(), 1e-4);
  }
}

}  // namespace
}  // namespace cleave::train
