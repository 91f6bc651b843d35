// The two forward passes, with and without LibTorch, held equal on dense and stock MoE models.
// (Converted models: transformer_roundtrip_test.cpp.)

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "cleave/error.h"
#include "cleave/train/transformer.h"
#include "support/paths.h"
#include "train/core_logits.h"

namespace cleave::train {
namespace {

namespace fs = std::filesystem;

// Both are float32. From the logits in double they are 1e-6 of the largest one away, and 4e-6 and
// 7e-6 (1.2e-4 and 2.2e-4) through SmolLM2's 30 layers, with any instruction set.
constexpr double kTolerance = 5e-6, kTolerance30Layers = 2e-5;

void expect_equal(const fs::path& path, std::int64_t count, double tolerance = kTolerance) {
  const Checkpoint checkpoint = Checkpoint::open(path);
  const torch::NoGradGuard no_grad;
  auto model = TransformerImpl::load(checkpoint);
  const std::int64_t vocab = model->config().vocab_size;
  const at::Tensor tokens = (torch::arange(count) * 37 % vocab).unsqueeze(0);
  const at::Tensor logits = model->forward(tokens)[0];
  const at::Tensor expected = cleave::testing::core_logits(checkpoint, tokens);
  EXPECT_LT((logits - expected).abs().max().item<double>(),
            tolerance * expected.abs().max().item<double>());
  EXPECT_GT(expected.std().item<double>(), 0.1) << "nothing to compare";
}

TEST(TransformerAndCore, AgreeOnTinyModels) {
  for (const char* name : {"llama", "llama_long", "mixtral", "granitemoeshared"}) {
    SCOPED_TRACE(name);
    expect_equal(cleave::testing::source_dir() / "tests" / "golden" / "logits" / name, 40);
  }
}

TEST(TransformerAndCore, EncodersAreNotTrained) {
  const auto path = cleave::testing::source_dir() / "tests" / "golden" / "encoder" / "bert";
  try {
    TransformerImpl::load(Checkpoint::open(path));
    FAIL() << "an encoder was loaded";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("is an encoder"), std::string::npos) << error.what();
  }
}

TEST(TransformerAndCore, AgreeOnTinyStories) {
  CLEAVE_SKIP_WITHOUT(cleave::testing::tinystories_dir());
  expect_equal(cleave::testing::tinystories_dir(), 100);
}

TEST(TransformerAndCore, AgreeOnTheBundledModel) {
  CLEAVE_SKIP_WITHOUT(cleave::testing::demo_llama_dir());
  expect_equal(cleave::testing::demo_llama_dir(), 100);
}

TEST(LargeTransformerAndCore, AgreeOnSmolLm2) {
  CLEAVE_SKIP_WITHOUT(cleave::testing::smollm2_gguf());
  expect_equal(cleave::testing::smollm2_gguf(), 64, kTolerance30Layers);
}

}  // namespace
}  // namespace cleave::train
