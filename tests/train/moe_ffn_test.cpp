#include "cleave/train/moe_ffn.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>
#include <vector>

#include "cleave/error.h"
#include "train/sparse_experts.h"

namespace cleave::train {
namespace {

struct Shape {
  std::int64_t tokens, d, num_experts, width, k;
  bool gated = true;
  std::string text() const {
    return fmt::format("T={} D={} E={} I={} K={} gated={}", tokens, d, num_experts, width, k,
                       gated);
  }
};

at::Tensor weight(at::IntArrayRef shape, at::ScalarType type) {
  return torch::randn(shape, torch::TensorOptions(type)).requires_grad_(true);
}

MoeFfn make_layer(const Shape& s, const GateSpec& gate, at::ScalarType type,
                  Activation activation = Activation::kSilu) {
  MoeFfnImpl::Spec spec;
  spec.num_experts = s.num_experts;
  spec.experts_per_token = s.k;
  spec.gate = gate;
  spec.scale = 1.75;
  spec.activation = activation;
  return MoeFfn(spec, s.gated ? weight({s.num_experts, s.width, s.d}, type) : at::Tensor(),
                weight({s.num_experts, s.width, s.d}, type),
                weight({s.num_experts, s.d, s.width}, type), weight({s.num_experts, s.d}, type));
}

/// Output and every gradient of one pass.
struct Pass {
  at::Tensor y, x, gate, up, down, router;
};

Pass run(MoeFfn& layer, const at::Tensor& x_in, const at::Tensor& grad, bool masked) {
  const at::Tensor x = x_in.detach().clone().requires_grad_(true);
  layer->zero_grad();
  const at::Tensor y = masked ? layer->forward_masked(x) : layer->forward(x);
  y.backward(grad);
  const auto copy = [](const at::Tensor& w) {
    return w.defined() && w.grad().defined() ? w.grad().clone() : at::Tensor();
  };
  return {y.detach(),          copy(x),
          copy(layer->w_gate), copy(layer->w_up),
          copy(layer->w_down), copy(layer->w_router)};
}

/// Sum of |terms| of every entry of a pass: the same formulas on absolute values, in double. The
/// activation gives way to a majorant of it (|act(x)| <= |x| for all but relu2) and the gradient of
/// the gate to |dz_e| <= w_e (|dw_e| + sum_j w_j |dw_j|), the softmax's Jacobian on absolute
/// values.
Pass magnitudes(MoeFfn& layer, const at::Tensor& x_in, const at::Tensor& grad) {
  const auto leaf = [](const at::Tensor& t) {
    return t.defined() ? t.detach().to(torch::kDouble).abs().requires_grad_(true) : at::Tensor();
  };
  const at::Tensor x = leaf(x_in), gate = leaf(layer->w_gate), up = leaf(layer->w_up),
                   down = leaf(layer->w_down), router = leaf(layer->w_router);
  const at::Tensor all = torch::zeros({x.size(0), layer->spec.num_experts}, torch::kDouble);
  const at::Tensor w =
      leaf(all.scatter(1, layer->last().ids, layer->last().weights.detach().to(torch::kDouble)));
  const bool square = layer->spec.activation == Activation::kRelu2;
  const auto project = [&](const at::Tensor& m) { return torch::einsum("td,eid->tei", {x, m}); };
  at::Tensor h = project(gate.defined() ? gate : up);
  if (square) h = h.square();
  if (gate.defined()) h = h * project(up);
  const at::Tensor y = layer->spec.scale * torch::einsum("te,tei,edi->td", {w, h, down});
  y.backward(grad.detach().to(torch::kDouble).abs());
  const torch::NoGradGuard no_grad;
  const at::Tensor dw = w.grad();
  // Straight-through differentiates a softmax over all experts, chosen or not.
  const at::Tensor p = layer->spec.gate.straight_through ? torch::ones_like(w) : w.detach();
  const at::Tensor dz = p * (dw + (p * dw).sum(1, true));
  const auto grad_of = [](const at::Tensor& t) { return t.defined() ? t.grad() : t; };
  return {y.detach(),      x.grad() + dz.matmul(router), grad_of(gate), grad_of(up), grad_of(down),
          dz.t().matmul(x)};
}

/// Both executions sum the same products in another order. A sum of n terms is off by at most
/// n eps (sum of |terms|). The longest chain: two products of D terms, a sum over I, one over K
/// experts, and for weights one over T tokens, forward and backward; 32 stands for the single
/// operations between them. 1.3 is the square of the steepest slope of an activation (GELU, 1.13),
/// and both sides may be off.
void expect_close(const char* what, const at::Tensor& sparse, const at::Tensor& masked,
                  const at::Tensor& magnitude, const Shape& s) {
  ASSERT_EQ(sparse.defined(), masked.defined()) << what;
  if (!sparse.defined() || sparse.numel() == 0) return;
  const double epsilon = sparse.scalar_type() == torch::kDouble
                             ? std::numeric_limits<double>::epsilon()
                             : std::numeric_limits<float>::epsilon();
  const auto terms = static_cast<double>(4 * s.d + 2 * s.width + 2 * s.num_experts + s.tokens + 32);
  const at::Tensor bound = 2 * 1.3 * epsilon * terms * magnitude;
  const at::Tensor ratio = (sparse - masked).to(torch::kDouble).abs() / (bound + 1e-300);
  EXPECT_LE(ratio.max().item<double>(), 1.0) << what << " " << s.text();
}

void expect_same(MoeFfn& layer, const at::Tensor& x, const Shape& s) {
  const at::Tensor grad = torch::randn_like(x);
  const Pass sparse = run(layer, x, grad, false), masked = run(layer, x, grad, true);
  const Pass bound = magnitudes(layer, x, grad);
  expect_close("y", sparse.y, masked.y, bound.y, s);
  expect_close("dx", sparse.x, masked.x, bound.x, s);
  expect_close("dgate", sparse.gate, masked.gate, bound.gate, s);
  expect_close("dup", sparse.up, masked.up, bound.up, s);
  expect_close("ddown", sparse.down, masked.down, bound.down, s);
  expect_close("drouter", sparse.router, masked.router, bound.router, s);
}

const GateSpec kSoftmaxGate{GateMode::kSoftmax, false};
const GateSpec kHardGate{GateMode::kHard, false};
const GateSpec kStraightThroughGate{GateMode::kHard, true};

TEST(TrainMoeFfn, SparseEqualsMaskedForwardAndGradients) {
  torch::manual_seed(1);
  const Shape shapes[] = {{7, 12, 4, 5, 2},         {1, 12, 4, 5, 2},  {33, 9, 6, 3, 3},
                          {16, 8, 4, 6, 4},         {16, 8, 4, 6, 1},  {1, 3, 1, 2, 1},
                          {24, 16, 8, 4, 2, false}, {40, 33, 16, 7, 4}};
  for (const Shape& s : shapes) {
    for (const GateSpec& gate : {kSoftmaxGate, kHardGate, kStraightThroughGate}) {
      for (const at::ScalarType type : {torch::kFloat, torch::kDouble}) {
        MoeFfn layer = make_layer(s, gate, type);
        expect_same(layer, torch::randn({s.tokens, s.d}, type), s);
      }
    }
  }
}

TEST(TrainMoeFfn, SparseEqualsMaskedForEveryActivation) {
  torch::manual_seed(2);
  for (const Activation activation :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu,
        Activation::kRelu2, Activation::kIdentity}) {
    for (const bool gated : {true, false}) {
      SCOPED_TRACE(activation_name(activation));
      const Shape s{11, 6, 4, 5, 2, gated};
      MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kDouble, activation);
      expect_same(layer, torch::randn({s.tokens, s.d}, torch::kDouble), s);
    }
  }
}

TEST(TrainMoeFfn, SparseEqualsMaskedWhenOneExpertTakesAllTokens) {
  torch::manual_seed(3);
  const Shape s{10, 6, 5, 4, 1};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kDouble);
  const at::Tensor x = torch::rand({s.tokens, s.d}, torch::kDouble) + 0.1;  // all positive
  {
    const torch::NoGradGuard no_grad;
    layer->w_router.fill_(-1);
    layer->w_router[3].fill_(1);
  }
  expect_same(layer, x, s);
  EXPECT_TRUE(at::equal(layer->last().ids, torch::full({s.tokens, 1}, 3, torch::kLong)));
}

TEST(TrainMoeFfn, GradientMatchesFiniteDifferences) {
  // The pair sparse / masked could share a mistake; finite differences share nothing. Steps are
  // small against the gaps between logits, so that no token changes its experts.
  torch::manual_seed(4);
  const Shape s{5, 4, 4, 3, 2};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kDouble);
  const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble);
  const at::Tensor direction = torch::randn({s.tokens, s.d}, torch::kDouble);
  const Pass pass = run(layer, x, direction, false);
  const torch::NoGradGuard no_grad;
  const auto value = [&] { return (layer->forward(x) * direction).sum().item<double>(); };
  const auto check = [&](const char* what, at::Tensor parameter, const at::Tensor& gradient) {
    const double h = 1e-6;
    for (std::int64_t i = 0; i < parameter.numel(); ++i) {
      at::Tensor cell = parameter.view(-1)[i];
      const double original = cell.item<double>();
      cell.fill_(original + h);
      const double up = value();
      cell.fill_(original - h);
      const double down = value();
      cell.fill_(original);
      EXPECT_NEAR(gradient.view(-1)[i].item<double>(), (up - down) / (2 * h), 1e-6)
          << what << " " << i;
    }
  };
  check("x", x, pass.x);
  check("gate", layer->w_gate, pass.gate);
  check("up", layer->w_up, pass.up);
  check("down", layer->w_down, pass.down);
  check("router", layer->w_router, pass.router);
}

TEST(TrainMoeFfn, RunsExactlyTheChosenRows) {
  torch::manual_seed(5);
  const Shape s{13, 6, 8, 4, 3};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kFloat);
  layer->forward(torch::randn({s.tokens, s.d}));
  const at::Tensor ids = layer->last().ids;
  const PairsByExpert pairs = group_pairs(ids, s.num_experts);
  ASSERT_EQ(pairs.begin.size(), static_cast<std::size_t>(s.num_experts + 1));
  EXPECT_EQ(pairs.begin.back(), s.tokens * s.k);  // T * K rows, not T * E
  for (std::int64_t e = 0; e < s.num_experts; ++e) {
    for (std::int64_t p = pairs.begin[e]; p < pairs.begin[e + 1]; ++p) {
      const std::int64_t pair = pairs.pair[p].item<std::int64_t>();
      EXPECT_EQ(ids.reshape({-1})[pair].item<std::int64_t>(), e);
      EXPECT_EQ(pairs.token[p].item<std::int64_t>(), pair / s.k);
      EXPECT_EQ(pairs.place_of[pair].item<std::int64_t>(), p);
    }
  }
}

TEST(TrainMoeFfn, NeverReadsAnExpertWithoutTokens) {
  torch::manual_seed(6);
  const Shape s{9, 6, 4, 5, 2};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kFloat);
  {
    const torch::NoGradGuard no_grad;
    layer->w_router[2].fill_(-100);  // x is positive: expert 2 is never chosen
    for (const at::Tensor& w : {layer->w_gate, layer->w_up, layer->w_down}) {
      w[2].fill_(std::numeric_limits<float>::quiet_NaN());
    }
  }
  const at::Tensor x = torch::rand({s.tokens, s.d}) + 0.1f;
  const Pass pass = run(layer, x, torch::randn_like(x), false);
  for (const at::Tensor& t : {pass.y, pass.x, pass.gate, pass.up, pass.down, pass.router}) {
    EXPECT_FALSE(t.isnan().any().item<bool>());
  }
  EXPECT_EQ(pass.up[2].abs().max().item<float>(), 0.0f);
  EXPECT_EQ(pass.down[2].abs().max().item<float>(), 0.0f);
  EXPECT_TRUE(layer->forward_masked(x).isnan().any().item<bool>()) << "the control is not poisoned";
}

TEST(TrainMoeFfn, TakesNoTokensAtAll) {
  const Shape s{0, 6, 4, 5, 2};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kFloat);
  const at::Tensor x = torch::zeros({0, 6}).requires_grad_(true);
  const at::Tensor y = layer->forward(x);
  EXPECT_EQ(y.sizes(), x.sizes());
  y.sum().backward();
  EXPECT_EQ(layer->w_up.grad().abs().max().item<float>(), 0.0f);
}

TEST(TrainMoeFfn, RouterGradientFollowsTheGate) {
  torch::manual_seed(7);
  const auto router_gradient = [](const GateSpec& gate, std::int64_t k) {
    const Shape s{12, 6, 4, 5, k};
    MoeFfn layer = make_layer(s, gate, torch::kDouble);
    const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble);
    const Pass pass = run(layer, x, torch::randn_like(x), false);
    return pass.router.defined() ? pass.router.abs().max().item<double>() : 0.0;
  };
  EXPECT_GT(router_gradient(kSoftmaxGate, 2), 1e-3);
  EXPECT_EQ(router_gradient(kSoftmaxGate, 1), 0.0);  // softmax over one logit is the constant 1
  EXPECT_EQ(router_gradient(kHardGate, 2), 0.0);
  EXPECT_GT(router_gradient(kStraightThroughGate, 2), 1e-3);
  EXPECT_GT(router_gradient(kStraightThroughGate, 1), 1e-3);
}

TEST(TrainMoeFfn, WeightsSumToOneOrAreOneEach) {
  torch::manual_seed(8);
  const Shape s{20, 6, 8, 5, 3};
  const at::Tensor x = torch::randn({s.tokens, s.d});
  const at::Tensor ones = torch::ones({s.tokens, s.k});
  MoeFfn softmax = make_layer(s, kSoftmaxGate, torch::kFloat);
  softmax->forward(x);
  EXPECT_LT((softmax->last().weights.sum(1) - 1).abs().max().item<float>(), 1e-6f);
  MoeFfn hard = make_layer(s, kHardGate, torch::kFloat);
  hard->forward(x);
  EXPECT_TRUE(at::equal(hard->last().weights, ones));
  MoeFfn straight = make_layer(s, kStraightThroughGate, torch::kFloat);
  straight->forward(x);
  EXPECT_TRUE(at::equal(straight->last().weights, ones));  // exactly, not up to rounding
}

TEST(TrainMoeFfn, SelectsTheLargestLogitsAndTheLowerIdOnTies) {
  const Shape s{2, 3, 4, 2, 2};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kFloat);
  {
    const torch::NoGradGuard no_grad;
    layer->w_router.zero_();
    layer->w_router[2][0] = 1;
  }
  layer->forward(torch::tensor({1.f, 0.f, 0.f, -1.f, 0.f, 0.f}).view({2, 3}));
  EXPECT_TRUE(at::equal(layer->last().ids, torch::tensor({2, 0, 0, 1}).view({2, 2})));
}

TEST(TrainMoeFfn, AllExpertsWithAZeroRouterEqualTheDenseFfn) {
  torch::manual_seed(9);
  const std::int64_t d = 10, num_experts = 4, width = 6, hidden = num_experts * width;
  const auto type = torch::kDouble;
  const at::Tensor gate = torch::randn({hidden, d}, type), up = torch::randn({hidden, d}, type);
  const at::Tensor down = torch::randn({d, hidden}, type);
  const at::Tensor x = torch::randn({7, d}, type);
  const at::Tensor dense = DenseFfn(gate, up, down, Activation::kSilu)->forward(x);
  for (const GateMode mode : {GateMode::kSoftmax, GateMode::kHard}) {
    MoeFfnImpl::Spec spec;
    spec.num_experts = spec.experts_per_token = num_experts;
    spec.gate.mode = mode;
    // Softmax weights sum to 1, so E gives every expert 1. Hard weights are 1 already: E / K = 1.
    spec.scale = mode == GateMode::kSoftmax ? static_cast<double>(num_experts) : 1.0;
    MoeFfn moe(spec, gate.view({num_experts, width, d}), up.view({num_experts, width, d}),
               down.view({d, num_experts, width}).transpose(0, 1).contiguous(),
               torch::zeros({num_experts, d}, type));
    EXPECT_LT((moe->forward(x) - dense).abs().max().item<double>(), 1e-12);
    EXPECT_LT((moe->expert_outputs(x).sum(1) - dense).abs().max().item<double>(), 1e-12);
  }
}

TEST(TrainMoeFfn, FrozenTensorsGetNoGradientBuffer) {
  torch::manual_seed(10);
  const Shape s{12, 6, 4, 5, 2};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kFloat);
  for (const at::Tensor& w : {layer->w_gate, layer->w_up, layer->w_down}) w.requires_grad_(false);
  layer->forward(torch::randn({s.tokens, s.d})).sum().backward();  // router phase
  EXPECT_TRUE(layer->w_router.grad().defined());
  for (const at::Tensor& w : {layer->w_gate, layer->w_up, layer->w_down}) {
    EXPECT_FALSE(w.grad().defined());
  }
  layer->w_router.requires_grad_(false);
  EXPECT_FALSE(layer->forward(torch::randn({s.tokens, s.d})).requires_grad());
}

TEST(TrainMoeFfn, GradientsAccumulateOverBackwardPasses) {
  torch::manual_seed(11);
  const Shape s{12, 6, 4, 5, 2};
  MoeFfn layer = make_layer(s, kSoftmaxGate, torch::kDouble);
  const at::Tensor x = torch::randn({s.tokens, s.d}, torch::kDouble);
  layer->forward(x).sum().backward();
  const at::Tensor once = layer->w_up.grad().clone();
  layer->forward(x).sum().backward();
  EXPECT_LT((layer->w_up.grad() - 2 * once).abs().max().item<double>(), 1e-12);
}

TEST(TrainMoeFfn, PublicMembersAreTheParameters) {
  MoeFfn layer = make_layer({2, 4, 3, 2, 1}, kSoftmaxGate, torch::kFloat);
  EXPECT_EQ(layer->parameters().size(), 4u);
  layer->to(torch::kDouble);
  EXPECT_EQ(layer->w_up.scalar_type(), torch::kDouble);
  EXPECT_TRUE(layer->named_parameters()["w_router"].is_same(layer->w_router));
}

TEST(TrainMoeFfn, RejectsDisagreeingShapes) {
  MoeFfnImpl::Spec spec;
  spec.num_experts = 4;
  spec.experts_per_token = 5;
  const auto make = [&](at::IntArrayRef up, at::IntArrayRef down) {
    MoeFfn(spec, at::Tensor(), torch::zeros(up), torch::zeros(down), torch::zeros({4, 3}));
  };
  EXPECT_THROW(make({4, 2, 3}, {4, 3, 2}), InvalidArgument);  // K > E
  spec.experts_per_token = 2;
  EXPECT_NO_THROW(make({4, 2, 3}, {4, 3, 2}));
  EXPECT_THROW(make({4, 2, 3}, {4, 2, 3}), InvalidArgument);
  EXPECT_THROW(make({3, 2, 3}, {3, 3, 2}), InvalidArgument);
  MoeFfn layer = make_layer({2, 4, 3, 2, 1}, kSoftmaxGate, torch::kFloat);
  EXPECT_THROW(layer->forward(torch::zeros({2, 5})), InvalidArgument);
}

}  // namespace
}  // namespace cleave::train
