// Experts run as masked hidden values, the slice that always runs, and the gradient that a hard
// gate gets through its soft border.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <vector>

#include "cleave/error.h"
#include "cleave/train/losses.h"
#include "cleave/train/moe_ffn.h"

namespace cleave::train {
namespace {

struct FineShape {
  std::int64_t tokens, d, num_experts, width, k;
  bool gated = true;
  std::int64_t shared = 0;
};

const GateSpec kPlainSoftmax{GateMode::kSoftmax, false, 0.0};
const GateSpec kPlainHard{GateMode::kHard, false, 0.0};
const GateSpec kSoftmaxStraightThrough{GateMode::kHard, true, 0.0};
const GateSpec kSoftBorder{GateMode::kHard, false, 0.3};

at::Tensor leaf(at::IntArrayRef shape, at::ScalarType type) {
  return torch::randn(shape, torch::TensorOptions(type)).requires_grad_(true);
}

MoeFfn fine_layer(const FineShape& s, const GateSpec& gate, at::ScalarType type = torch::kDouble,
                  Activation activation = Activation::kSilu) {
  MoeFfnImpl::Spec spec{s.num_experts, s.k, gate, 1.75, activation, Execution::kMaskedHidden, true};
  DenseFfn shared(nullptr);
  if (s.shared > 0)
    shared = DenseFfn(s.gated ? leaf({s.shared, s.d}, type) : at::Tensor(),
                      leaf({s.shared, s.d}, type), leaf({s.d, s.shared}, type), activation);
  return MoeFfn(spec, s.gated ? leaf({s.num_experts, s.width, s.d}, type) : at::Tensor(),
                leaf({s.num_experts, s.width, s.d}, type),
                leaf({s.num_experts, s.d, s.width}, type), leaf({s.num_experts, s.d}, type),
                shared);
}

/// Output, dx and the gradients of all parameters.
std::vector<at::Tensor> pass(MoeFfn& layer, const at::Tensor& x_in, const at::Tensor& grad,
                             bool definition) {
  const at::Tensor x = x_in.detach().clone().requires_grad_(true);
  layer->zero_grad();
  const at::Tensor y = definition ? layer->forward_masked(x) : layer->forward(x);
  y.backward(grad);
  std::vector<at::Tensor> all{y.detach(), x.grad().clone()};
  for (const auto& p : layer->parameters())
    all.push_back(p.grad().defined() ? p.grad().clone() : at::Tensor());
  return all;
}

/// Sums of a few hundred terms of size about 1 in another order; 1e-12 (double) and 1e-4 (float)
/// are some hundred roundings of the largest entry.
void expect_equals_definition(MoeFfn& layer, const FineShape& s, at::ScalarType type) {
  const at::Tensor x = torch::randn({s.tokens, s.d}, type), grad = torch::randn_like(x);
  const auto fast = pass(layer, x, grad, false), slow = pass(layer, x, grad, true);
  const double tolerance = type == torch::kDouble ? 1e-12 : 1e-4;
  for (std::size_t i = 0; i < fast.size(); ++i) {
    ASSERT_EQ(fast[i].defined(), slow[i].defined()) << i;
    if (!fast[i].defined() || fast[i].numel() == 0) continue;
    EXPECT_TRUE(fast[i].is_contiguous()) << i;
    const double size = slow[i].abs().max().item<double>();
    EXPECT_LE((fast[i] - slow[i]).abs().max().item<double>(), tolerance * (size + 1.0))
        << fmt::format("{}: T={} D={} E={} I={} K={}", i, s.tokens, s.d, s.num_experts, s.width,
                       s.k);
  }
}

TEST(MaskedHidden, EqualsTheDefinition) {
  torch::manual_seed(21);
  const FineShape shapes[] = {{7, 12, 4, 5, 2},
                              {1, 12, 4, 5, 2, true, 3},
                              {33, 9, 6, 3, 3, true, 7},
                              {16, 8, 4, 6, 4},
                              {16, 8, 4, 6, 1},
                              {1, 3, 1, 2, 1, true, 1},
                              {24, 16, 8, 4, 2, false},
                              {24, 16, 8, 4, 2, false, 5},
                              {40, 33, 24, 7, 8, true, 20},
                              {0, 6, 4, 5, 2}};
  for (const FineShape& s : shapes)
    for (const GateSpec& gate : {kPlainSoftmax, kPlainHard, kSoftmaxStraightThrough, kSoftBorder})
      for (const at::ScalarType type : {torch::kFloat, torch::kDouble}) {
        MoeFfn layer = fine_layer(s, gate, type);
        expect_equals_definition(layer, s, type);
      }
}

TEST(MaskedHidden, EqualsTheDefinitionForEveryActivation) {
  torch::manual_seed(22);
  for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                      Activation::kRelu, Activation::kRelu2, Activation::kIdentity})
    for (const bool gated : {true, false}) {
      SCOPED_TRACE(activation_name(activation));
      const FineShape s{11, 6, 4, 5, 2, gated, 3};
      MoeFfn layer = fine_layer(s, kSoftBorder, torch::kDouble, activation);
      expect_equals_definition(layer, s, torch::kDouble);
    }
}

TEST(MaskedHidden, EqualsTheSparseExecution) {
  torch::manual_seed(23);
  const FineShape s{19, 10, 8, 4, 3, true, 6};
  for (const GateSpec& gate : {kPlainSoftmax, kPlainHard, kSoftmaxStraightThrough}) {
    MoeFfn layer = fine_layer(s, gate);
    const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble), g = torch::randn_like(x);
    const auto masked = pass(layer, x, g, false);
    layer->spec.execution = Execution::kSparse;
    layer->spec.record_energy = false;
    const auto sparse = pass(layer, x, g, false);
    for (std::size_t i = 0; i < masked.size(); ++i) {
      ASSERT_EQ(masked[i].defined(), sparse[i].defined());
      if (!masked[i].defined()) continue;
      EXPECT_LT((masked[i] - sparse[i]).abs().max().item<double>(), 1e-11) << i;
    }
  }
}

TEST(MaskedHidden, GradientMatchesFiniteDifferences) {
  // Of a softmax gate, which is differentiable where no token changes its experts; shared slice
  // included.
  torch::manual_seed(24);
  const FineShape s{5, 4, 4, 3, 2, true, 3};
  MoeFfn layer = fine_layer(s, kPlainSoftmax);
  const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble);
  const at::Tensor direction = torch::randn_like(x);
  const auto gradients = pass(layer, x, direction, false);
  const torch::NoGradGuard no_grad;
  const auto value = [&] { return (layer->forward(x) * direction).sum().item<double>(); };
  const auto parameters = layer->parameters();
  ASSERT_EQ(parameters.size(), 7u);
  for (std::size_t p = 0; p <= parameters.size(); ++p) {
    at::Tensor flat = p == 0 ? x.view(-1) : parameters[p - 1].view(-1);
    const at::Tensor gradient = gradients[p + 1].view(-1);
    for (std::int64_t i = 0; i < flat.numel(); ++i) {
      const double h = 1e-6, original = flat[i].item<double>();
      flat[i].fill_(original + h);
      const double up = value();
      flat[i].fill_(original - h);
      const double down = value();
      flat[i].fill_(original);
      EXPECT_NEAR(gradient[i].item<double>(), (up - down) / (2 * h), 1e-6) << p << " " << i;
    }
  }
}

TEST(MaskedHidden, RecordsWhatEveryExpertWouldAdd) {
  torch::manual_seed(25);
  const FineShape s{6, 5, 4, 3, 2, true, 2};
  MoeFfn layer = fine_layer(s, kSoftBorder);
  const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble);
  layer->forward(x);
  const at::Tensor energy = layer->last().energy;
  ASSERT_TRUE(energy.defined());
  EXPECT_FALSE(energy.requires_grad());
  const torch::NoGradGuard no_grad;
  for (std::int64_t e = 0; e < s.num_experts; ++e) {
    const at::Tensor h = at::silu(x.matmul(layer->w_gate[e].t())) * x.matmul(layer->w_up[e].t());
    const at::Tensor expected = h.square().matmul(layer->w_down[e].square().sum(0));
    EXPECT_LT((energy.select(1, e) - expected).abs().max().item<double>(), 1e-12);
  }
  layer->spec.record_energy = false;
  layer->forward(x);
  EXPECT_FALSE(layer->last().energy.defined());
}

/// Halfway between the K-th and the next of a row, by hand.
double border_of(const at::Tensor& row, std::int64_t k) {
  const at::Tensor sorted = std::get<0>(row.sort(/*dim=*/0, /*descending=*/true));
  return 0.5 * (sorted[k - 1].item<double>() + sorted[k].item<double>());
}

/// Root mean square over the tokens of the deviation over the experts.
double spread_of(const at::Tensor& logits) {
  double sum = 0.0;
  for (std::int64_t t = 0; t < logits.size(0); ++t)
    sum += (logits[t] - logits[t].mean()).square().mean().item<double>();
  return std::sqrt(sum / static_cast<double>(logits.size(0)));
}

TEST(SoftBorder, GradientEqualsTheFormula) {
  torch::manual_seed(26);
  const FineShape s{9, 6, 7, 3, 3, true, 2};
  MoeFfn layer = fine_layer(s, kSoftBorder);
  const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble);
  const at::Tensor grad = torch::randn_like(x);
  const auto all = pass(layer, x, grad, false);
  EXPECT_TRUE(
      at::equal(layer->last().weights, torch::ones({s.tokens, s.k}, torch::kDouble)));  // exactly
  const at::Tensor actual = layer->w_router.grad().clone();
  const torch::NoGradGuard no_grad;
  const at::Tensor z = x.matmul(layer->w_router.t());
  const at::Tensor slope =
      layer->spec.scale * (layer->expert_outputs(x) * grad.unsqueeze(1)).sum(2);  // dL/dm [T, E]
  at::Tensor dz = torch::zeros_like(z);
  const double tau = 0.3 * spread_of(z);
  for (std::int64_t t = 0; t < s.tokens; ++t)
    for (std::int64_t e = 0; e < s.num_experts; ++e) {
      const double distance = z[t][e].item<double>() - border_of(z[t], s.k);
      const double p = 1.0 / (1.0 + std::exp(-distance / tau));
      dz[t][e] = slope[t][e].item<double>() * p * (1.0 - p) / tau;
    }
  EXPECT_LT((actual - dz.t().matmul(x)).abs().max().item<double>(), 1e-11);
  EXPECT_GT(dz.abs().min().item<double>(), 0.0) << "experts not chosen learn as well";
  // The output is that of the plain hard gate.
  layer->spec.gate = kPlainHard;
  EXPECT_LT((layer->forward(x) - all[0]).abs().max().item<double>(), 1e-12);
}

TEST(SoftBorder, NeedsAHardGateAndMaskedHiddenValues) {
  const at::Tensor x = torch::randn({3, 4}, torch::kDouble);
  MoeFfn layer = fine_layer({3, 4, 4, 2, 2}, kSoftBorder);
  EXPECT_NO_THROW(layer->forward(x));
  layer->spec.execution = Execution::kSparse;
  EXPECT_THROW(layer->forward(x), InvalidArgument);
  layer->spec.execution = Execution::kMaskedHidden;
  layer->spec.gate.mode = GateMode::kSoftmax;
  EXPECT_THROW(layer->forward(x), InvalidArgument);
  layer->spec.gate = {GateMode::kHard, true, 0.3};
  EXPECT_THROW(layer->forward(x), InvalidArgument);
}

TEST(MaskedHidden, FrozenTensorsGetNoGradientBuffer) {
  torch::manual_seed(27);
  MoeFfn layer = fine_layer({12, 6, 4, 5, 2, true, 3}, kSoftBorder);
  for (auto& p : layer->parameters()) p.requires_grad_(p.is_same(layer->w_router));
  layer->forward(torch::randn({12, 6}, torch::kDouble)).sum().backward();
  for (const auto& p : layer->parameters())
    EXPECT_EQ(p.grad().defined(), p.is_same(layer->w_router));
  layer->w_router.requires_grad_(false);
  EXPECT_FALSE(layer->forward(torch::randn({12, 6}, torch::kDouble)).requires_grad());
}

TEST(MaskedHidden, IsForFineExperts) {
  EXPECT_EQ(choose_execution(16), Execution::kMaskedHidden);
  EXPECT_EQ(choose_execution(192), Execution::kSparse);
}

TEST(SharedSlice, MustFitTheExperts) {
  const auto make = [](std::int64_t d, Activation activation) {
    MoeFfnImpl::Spec spec{2, 1, {}, 1.0, Activation::kSilu, Execution::kSparse, false};
    const DenseFfn shared(torch::zeros({5, d}), torch::zeros({5, d}), torch::zeros({d, 5}),
                          activation);
    MoeFfn(spec, torch::zeros({2, 4, 3}), torch::zeros({2, 4, 3}), torch::zeros({2, 3, 4}),
           torch::zeros({2, 3}), shared);
  };
  EXPECT_NO_THROW(make(3, Activation::kSilu));
  EXPECT_THROW(make(4, Activation::kSilu), InvalidArgument);
  EXPECT_THROW(make(3, Activation::kRelu), InvalidArgument);
}

TEST(RouterSupervision, EqualsTheFormula) {
  torch::manual_seed(28);
  const std::int64_t tokens = 8, experts = 6, k = 2;
  const double temperature = 0.4;
  const at::Tensor z = torch::randn({tokens, experts}, torch::kDouble).requires_grad_(true);
  const at::Tensor energy = torch::rand({tokens, experts}, torch::kDouble).requires_grad_(true);
  const at::Tensor loss = router_supervision_loss(z, energy, k, temperature);
  loss.backward();
  EXPECT_FALSE(energy.grad().defined());
  const torch::NoGradGuard no_grad;
  const double tau = temperature * spread_of(z);
  double value = 0.0;
  at::Tensor gradient = torch::zeros_like(z);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const at::Tensor share = energy[t] / energy[t].sum();
    for (std::int64_t e = 0; e < experts; ++e) {
      const double advantage = share[e].item<double>() - border_of(share, k);
      const double p = 1.0 / (1.0 + std::exp((border_of(z[t], k) - z[t][e].item<double>()) / tau));
      value -= advantage * p / static_cast<double>(tokens);
      gradient[t][e] = -advantage * p * (1.0 - p) / tau / static_cast<double>(tokens);
    }
  }
  EXPECT_NEAR(loss.item<double>(), value, 1e-14);
  EXPECT_LT((z.grad() - gradient).abs().max().item<double>(), 1e-14);
  // All experts chosen: nothing to learn.
  EXPECT_EQ(router_supervision_loss(z, energy, experts, 1.0).item<double>(), 0.0);
  EXPECT_THROW(router_supervision_loss(z, energy.narrow(1, 0, 2), k, 1.0), InvalidArgument);
  EXPECT_THROW(router_supervision_loss(z, energy, experts + 1, 1.0), InvalidArgument);
  EXPECT_THROW(router_supervision_loss(z, energy, k, 0.0), InvalidArgument);
}

}  // namespace
}  // namespace cleave::train
