// Dense model -> convert -> directory -> train's tensors -> directory -> train's tensors.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>
#include <vector>

#include "cleave/convert.h"
#include "cleave/export.h"
#include "cleave/train/losses.h"
#include "cleave/train/transformer.h"
#include "support/paths.h"
#include "train/core_logits.h"

namespace cleave::train {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kExperts = 4, kActive = 2;

fs::path dense_dir() {
  return cleave::testing::source_dir() / "tests" / "golden" / "logits" / "llama";
}

ConvertSpec convert_spec(GateMode gate, std::int64_t active) {
  ConvertSpec spec;
  spec.partition.method = PartitionMethod::kContiguous;
  spec.partition.num_experts = kExperts;
  spec.experts_per_token = active;
  spec.gate = gate;
  spec.threads = 2;
  return spec;
}

/// Converts the tiny Llama with random routers.
void convert_to(const fs::path& out, GateMode gate, std::int64_t active) {
  const Checkpoint source = Checkpoint::open(dense_dir());
  const ConvertSpec spec = convert_spec(gate, active);
  write_conversion(out, source, convert(source, spec), "{}", {});
}

at::Tensor tokens_for(const ModelConfig& config, std::int64_t count) {
  return (torch::arange(count) * 7 % config.vocab_size).unsqueeze(0);
}

class TransformerRoundTrip : public ::testing::TestWithParam<GateMode> {
 protected:
  cleave::testing::TempDir dir_;
};

TEST_P(TransformerRoundTrip, LoadedExpertsAreTheDenseSlices) {
  const fs::path out = dir_.path() / "moe";
  convert_to(out, GetParam(), kActive);
  auto dense = TransformerImpl::load(Checkpoint::open(dense_dir()));
  auto moe = TransformerImpl::load(Checkpoint::open(out));
  ASSERT_TRUE(moe->provenance().has_value());
  const std::int64_t d = moe->config().hidden_size;
  for (std::size_t l = 0; l < moe->layers().size(); ++l) {
    const MoeFfn& layer = moe->layers()[l].moe;
    const DenseFfn& ffn = dense->layers()[l].dense;
    EXPECT_EQ(layer->spec.gate.mode, GetParam());
    EXPECT_EQ(layer->spec.scale, GetParam() == GateMode::kSoftmax ? 4.0 : 2.0);  // E or E / K
    // Contiguous split: stacking the experts gives the dense matrices back, bit for bit.
    EXPECT_TRUE(at::equal(layer->w_gate.reshape({-1, d}), ffn->gate));
    EXPECT_TRUE(at::equal(layer->w_up.reshape({-1, d}), ffn->up));
    EXPECT_TRUE(at::equal(layer->w_down.permute({1, 0, 2}).reshape({d, -1}), ffn->down));
  }
}

TEST_P(TransformerRoundTrip, EachLayersOwnScaleIsUndone) {
  const fs::path out = dir_.path() / "moe";
  const Checkpoint source = Checkpoint::open(dense_dir());
  ConvertSpec spec = convert_spec(GetParam(), kActive);  // with a text, the scale is fitted
  TokenWindows text;
  text.context = 16;
  for (std::int32_t t = 0; t < 16 * 40; ++t) text.tokens.push_back(t * t % 89);
  write_conversion(out, source, convert(source, spec, &text), "{}", {});
  auto dense = TransformerImpl::load(source);
  auto moe = TransformerImpl::load(Checkpoint::open(out));
  ASSERT_NE(moe->layers()[0].moe->spec.scale, moe->layers()[1].moe->spec.scale);
  for (std::size_t l = 0; l < moe->layers().size(); ++l) {
    const at::Tensor down = moe->layers()[l].moe->w_down.permute({1, 0, 2}).reshape({32, -1});
    const at::Tensor expected = dense->layers()[l].dense->down;
    // One rounding when it was folded, one of the float scale, one when it is undone.
    const at::Tensor bound = 3 * std::numeric_limits<float>::epsilon() * expected.abs();
    EXPECT_TRUE(((down - expected).abs() <= bound).all().item<bool>()) << "layer " << l;
  }
}

TEST_P(TransformerRoundTrip, AChangedGateIsWrittenAsItIs) {
  // Training may change the gate. Same ids, even weights: hard of scale s is softmax of scale s K
  // over a router so small that its weights are even.
  const fs::path first = dir_.path() / "first", second = dir_.path() / "second";
  convert_to(first, GetParam(), kActive);
  const Checkpoint source = Checkpoint::open(first);
  auto model = TransformerImpl::load(source);
  const GateMode other = GetParam() == GateMode::kHard ? GateMode::kSoftmax : GateMode::kHard;
  const double factor = other == GateMode::kHard ? 1.0 / kActive : kActive;
  for (MoeFfn& layer : model->moe_layers()) {
    layer->spec.gate.mode = other;
    layer->spec.scale *= factor;
  }
  Provenance provenance = *model->provenance();
  provenance.gate = other;
  provenance.router_epsilon = other == GateMode::kHard ? kHardGateEpsilon : 1.0;
  const MixtralShape shape{kExperts, kActive, model->config().intermediate_size};
  write_mixtral(second, source, shape, model->named_tensors(), provenance, {});
  auto again = TransformerImpl::load(Checkpoint::open(second));
  const torch::NoGradGuard no_grad;
  const at::Tensor tokens = tokens_for(model->config(), 20);
  EXPECT_TRUE(at::equal(model->forward(tokens), again->forward(tokens)));
}

TEST_P(TransformerRoundTrip, LoadWriteLoadIsBitwise) {
  const fs::path first = dir_.path() / "first", second = dir_.path() / "second";
  convert_to(first, GetParam(), kActive);
  const Checkpoint source = Checkpoint::open(first);
  auto model = TransformerImpl::load(source);
  {
    const torch::NoGradGuard no_grad;  // as training would leave it: nothing is a round number
    torch::manual_seed(1);
    for (MoeFfn& layer : model->moe_layers()) {
      for (at::Tensor& p : layer->parameters()) p.add_(0.01 * torch::randn_like(p));
    }
  }
  const MixtralShape shape{kExperts, kActive, model->config().intermediate_size};
  write_mixtral(second, source, shape, model->named_tensors(), *model->provenance(), {});
  auto again = TransformerImpl::load(Checkpoint::open(second));
  const auto before = model->named_parameters(), after = again->named_parameters();
  ASSERT_EQ(before.size(), after.size() - (after.contains("head") && !before.contains("head")));
  for (const auto& p : before) {
    EXPECT_TRUE(at::equal(p.value(), after[p.key()])) << p.key();
  }
  const at::Tensor tokens = tokens_for(model->config(), 20);
  EXPECT_TRUE(at::equal(model->forward(tokens), again->forward(tokens)));
}

TEST_P(TransformerRoundTrip, EqualsTheCoreModel) {
  const fs::path out = dir_.path() / "moe";
  convert_to(out, GetParam(), kActive);
  auto model = TransformerImpl::load(Checkpoint::open(out));
  const at::Tensor tokens = tokens_for(model->config(), 20);
  const torch::NoGradGuard no_grad;
  const at::Tensor logits = model->forward(tokens)[0];
  const at::Tensor expected = cleave::testing::core_logits(Checkpoint::open(out), tokens);
  if (GetParam() == GateMode::kSoftmax) {
    EXPECT_LT((logits - expected).abs().max().item<double>(), 2e-4);
  } else {
    // Core runs what is stored, where weights are 1/K only up to epsilon * (logit - mean).
    EXPECT_LT(logit_kl(logits, expected).item<double>(), 1e-4);
  }
}

TEST_P(TransformerRoundTrip, AllExpertsEqualTheDenseModel) {
  const fs::path out = dir_.path() / "moe";
  convert_to(out, GetParam(), kExperts);
  const torch::NoGradGuard no_grad;
  auto dense = TransformerImpl::load(Checkpoint::open(dense_dir()));
  auto moe = TransformerImpl::load(Checkpoint::open(out));
  const at::Tensor tokens = tokens_for(moe->config(), 20);
  const at::Tensor a = moe->forward(tokens)[0], b = dense->forward(tokens)[0];
  EXPECT_LT((a - b).abs().max().item<double>(), 2e-4);
  EXPECT_LT(logit_kl(a, b).item<double>(), 1e-7);
}

INSTANTIATE_TEST_SUITE_P(Gates, TransformerRoundTrip,
                         ::testing::Values(GateMode::kSoftmax, GateMode::kHard),
                         [](const auto& info) { return std::string(gate_mode_name(info.param)); });

}  // namespace
}  // namespace cleave::train
