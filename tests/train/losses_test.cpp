#include "cleave/train/losses.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "cleave/error.h"

namespace cleave::train {
namespace {

const PaForm kForms[] = {PaForm::kRouterFirst, PaForm::kTargetFirst, PaForm::kCrossEntropy};

at::Tensor random(at::IntArrayRef shape, std::uint64_t seed) {
  torch::manual_seed(seed);
  return torch::randn(shape, torch::kDouble);
}

at::Tensor k_hot(std::vector<double> row) {
  const auto size = static_cast<std::int64_t>(row.size());
  return torch::tensor(row, torch::kDouble).view({1, size});
}

/// The gradient of a scalar function by central differences. With step cbrt(eps) the truncation
/// (h^2) and the rounding (eps / h) of a function of order 1 are both about eps^(2/3) = 4e-11.
at::Tensor finite_differences(const std::function<double(const at::Tensor&)>& f,
                              const at::Tensor& at_point) {
  const double h = std::cbrt(std::numeric_limits<double>::epsilon());
  at::Tensor gradient = torch::zeros_like(at_point);
  for (std::int64_t i = 0; i < at_point.numel(); ++i) {
    at::Tensor up = at_point.clone(), down = at_point.clone();
    up.view(-1)[i] += h;
    down.view(-1)[i] -= h;
    gradient.view(-1)[i] = (f(up) - f(down)) / (2 * h);
  }
  return gradient;
}

void expect_gradient_matches(const std::function<at::Tensor(const at::Tensor&)>& loss,
                             const at::Tensor& point) {
  const at::Tensor x = point.clone().requires_grad_(true);
  loss(x).backward();
  const at::Tensor expected =
      finite_differences([&](const at::Tensor& t) { return loss(t).item<double>(); }, point);
  EXPECT_LT((x.grad() - expected).abs().max().item<double>(), 1e-8);
  EXPECT_GT(x.grad().abs().max().item<double>(), 1e-4) << "the check compares zeros";
}

/// The subset with the smallest |alpha sum - teacher|^2, by plain loops over bit masks.
std::vector<double> brute_force_labels(const at::Tensor& outputs, const at::Tensor& teacher,
                                       std::int64_t k, double alpha) {
  const std::int64_t num_experts = outputs.size(0), width = outputs.size(1);
  const auto o = outputs.accessor<double, 2>();
  const auto t = teacher.accessor<double, 1>();
  double best = std::numeric_limits<double>::infinity();
  std::vector<double> labels(num_experts);
  for (unsigned subset = 0; subset < (1u << num_experts); ++subset) {
    if (__builtin_popcount(subset) != k) continue;
    double error = 0;
    for (std::int64_t d = 0; d < width; ++d) {
      double sum = 0;
      for (std::int64_t e = 0; e < num_experts; ++e) sum += (subset >> e & 1) ? o[e][d] : 0;
      error += (alpha * sum - t[d]) * (alpha * sum - t[d]);
    }
    if (error >= best) continue;
    best = error;
    for (std::int64_t e = 0; e < num_experts; ++e) labels[e] = subset >> e & 1;
  }
  return labels;
}

TEST(PriorAllocation, HasTheSoftValuesOfTheRelease) {
  struct Case {
    std::vector<double> labels;
    double on, off;
  };
  for (const Case& c : {Case{{1, 0, 0, 0}, .4754, .1749}, Case{{1, 1, 0, 0}, .3655, .1345},
                        Case{{1, 1, 1, 0}, .2969, .1092}}) {
    const at::Tensor q = prior_allocation(k_hot(c.labels));
    for (std::size_t e = 0; e < 4; ++e) {
      EXPECT_NEAR(q[0][static_cast<std::int64_t>(e)].item<double>(), c.labels[e] ? c.on : c.off,
                  5e-5);
    }
    EXPECT_NEAR(q.sum().item<double>(), 1.0, 1e-15);
  }
}

TEST(PriorApproximateLoss, IsZeroAtALogitGapOfExactlyOne) {
  const at::Tensor q = prior_allocation(k_hot({0, 1, 1, 0}));
  const at::Tensor logits = k_hot({-3, -2, -2, -3});  // gap 1; a common shift does not matter
  const at::Tensor wider = k_hot({-3, -1, -1, -3});
  for (const PaForm form : {PaForm::kRouterFirst, PaForm::kTargetFirst}) {
    EXPECT_NEAR(prior_approximate_loss(logits, q, form).item<double>(), 0.0, 1e-15);
    EXPECT_GT(prior_approximate_loss(wider, q, form).item<double>(), 1e-2);
  }
  const double entropy = -(q * q.log()).sum().item<double>();
  EXPECT_NEAR(prior_approximate_loss(logits, q, PaForm::kCrossEntropy).item<double>(), entropy,
              1e-15);
}

TEST(PriorApproximateLoss, MatchesPlainSumsInBothDirections) {
  const at::Tensor logits = random({3, 5}, 1);
  const at::Tensor q = random({3, 5}, 2).softmax(1);
  double router_first = 0, target_first = 0, cross_entropy = 0;
  for (std::int64_t t = 0; t < 3; ++t) {
    double norm = 0;
    for (std::int64_t e = 0; e < 5; ++e) norm += std::exp(logits[t][e].item<double>());
    for (std::int64_t e = 0; e < 5; ++e) {
      const double pe = std::exp(logits[t][e].item<double>()) / norm;
      const double qe = q[t][e].item<double>();
      router_first += pe * std::log(pe / qe) / 3;
      target_first += qe * std::log(qe / pe) / 3;
      cross_entropy -= qe * std::log(pe) / 3;
    }
  }
  EXPECT_NEAR(prior_approximate_loss(logits, q, PaForm::kRouterFirst).item<double>(), router_first,
              1e-14);
  EXPECT_NEAR(prior_approximate_loss(logits, q, PaForm::kTargetFirst).item<double>(), target_first,
              1e-14);
  EXPECT_NEAR(prior_approximate_loss(logits, q, PaForm::kCrossEntropy).item<double>(),
              cross_entropy, 1e-14);
}

TEST(PriorApproximateLoss, GradientMatchesFiniteDifferences) {
  const at::Tensor q = random({4, 6}, 3).softmax(1);
  const at::Tensor mask = torch::tensor({1, 0, 1, 1}).to(torch::kBool);
  for (const PaForm form : kForms) {
    expect_gradient_matches(
        [&](const at::Tensor& x) { return prior_approximate_loss(x, q, form, mask); },
        random({4, 6}, 4));
  }
}

TEST(PriorApproximateLoss, TokensThatDoNotCountChangeNothing) {
  const at::Tensor q = random({4, 6}, 5).softmax(1);
  const at::Tensor mask = torch::tensor({1, 0, 0, 1}).to(torch::kBool);
  const at::Tensor kept = torch::tensor({0, 3});
  for (const PaForm form : kForms) {
    at::Tensor logits = random({4, 6}, 6);
    const double alone =
        prior_approximate_loss(logits.index_select(0, kept), q.index_select(0, kept), form)
            .item<double>();
    logits[1].fill_(std::numeric_limits<double>::quiet_NaN());  // padding may hold anything
    logits.requires_grad_(true);
    const at::Tensor loss = prior_approximate_loss(logits, q, form, mask);
    EXPECT_EQ(loss.item<double>(), alone);
    loss.backward();
    EXPECT_EQ(logits.grad().index_select(0, torch::tensor({1, 2})).abs().max().item<double>(), 0.0);
    EXPECT_GT(logits.grad()[0].abs().max().item<double>(), 0.0);
  }
}

TEST(PriorApproximateLoss, BatchOfFourIsTheMeanOfFourSingleOnes) {
  const at::Tensor logits = random({4, 6}, 7), q = random({4, 6}, 8).softmax(1);
  for (const PaForm form : kForms) {
    double mean = 0;
    for (std::int64_t t = 0; t < 4; ++t) {
      mean +=
          prior_approximate_loss(logits.narrow(0, t, 1), q.narrow(0, t, 1), form).item<double>() /
          4;
    }
    EXPECT_NEAR(prior_approximate_loss(logits, q, form).item<double>(), mean, 1e-15);
  }
}

TEST(Losses, AreZeroWithAGraphWhereNothingCounts) {
  const at::Tensor none = torch::zeros({3}, torch::kBool);
  const at::Tensor ids = torch::zeros({3, 1}, torch::kLong);
  const auto check = [](const std::function<at::Tensor(const at::Tensor&)>& loss) {
    const at::Tensor x = random({3, 4}, 9).requires_grad_(true);
    const at::Tensor value = loss(x);
    EXPECT_EQ(value.item<double>(), 0.0);
    value.backward();
    EXPECT_EQ(x.grad().abs().max().item<double>(), 0.0);
  };
  const at::Tensor q = random({3, 4}, 10).softmax(1);
  for (const PaForm form : kForms) {
    check([&](const at::Tensor& x) { return prior_approximate_loss(x, q, form, none); });
  }
  check([&](const at::Tensor& x) { return balance_loss(x, ids, BalanceKind::kSwitch, none); });
  check([&](const at::Tensor& x) { return balance_loss(x, ids, BalanceKind::kPaper, none); });
  check([&](const at::Tensor& x) {
    return language_model_loss(x, torch::full({3}, -100, torch::kLong));
  });
}

TEST(PriorLabels, PerExpertComparesEachAloneWithRealDivision) {
  // E = 4, K = 3: the teacher is divided by 4/3. Expert 0 equals teacher / (4/3), expert 3 equals
  // the undivided teacher: integer division (4 / 3 = 1) would call expert 3 the best.
  const at::Tensor teacher = torch::full({1, 2}, 4.0, torch::kDouble);
  const at::Tensor outputs =
      torch::tensor({3.0, 3.0, 2.5, 2.5, 3.4, 3.4, 4.0, 4.0}, torch::kDouble).view({1, 4, 2});
  EXPECT_TRUE(
      at::equal(prior_labels(outputs, teacher, 3, LabelKind::kPerExpert, 1), k_hot({1, 1, 1, 0})));
  const at::Tensor twice = teacher * 2;  // now every target is 6 (8 / (4/3)): the largest three
  EXPECT_TRUE(
      at::equal(prior_labels(outputs, twice, 3, LabelKind::kPerExpert, 1), k_hot({1, 0, 1, 1})));
}

TEST(PriorLabels, PerExpertMatchesPlainLoops) {
  const std::int64_t tokens = 20, num_experts = 6, width = 7;
  const at::Tensor outputs = random({tokens, num_experts, width}, 11);
  const at::Tensor teacher = outputs.sum(1);
  for (std::int64_t k = 1; k <= num_experts; ++k) {
    const at::Tensor labels = prior_labels(outputs, teacher, k, LabelKind::kPerExpert, 1);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<std::pair<double, std::int64_t>> errors;
      for (std::int64_t e = 0; e < num_experts; ++e) {
        const at::Tensor gap = outputs[t][e] - teacher[t] * k / num_experts;
        errors.emplace_back(gap.square().sum().item<double>(), e);
      }
      std::sort(errors.begin(), errors.end());
      for (std::int64_t i = 0; i < num_experts; ++i) {
        EXPECT_EQ(labels[t][errors[i].second].item<double>(), i < k ? 1.0 : 0.0) << t << " " << k;
      }
    }
  }
}

TEST(PriorLabels, ExhaustiveMatchesABruteForceSearch) {
  const std::int64_t tokens = 12, num_experts = 7, width = 5;
  for (const double alpha : {1.0, 7.0 / 3.0}) {
    const at::Tensor outputs = random({tokens, num_experts, width}, 12);
    const at::Tensor teacher = outputs.sum(1) + 0.3 * random({tokens, width}, 13);
    for (std::int64_t k = 1; k <= num_experts; ++k) {
      const at::Tensor labels = prior_labels(outputs, teacher, k, LabelKind::kExhaustive, alpha);
      for (std::int64_t t = 0; t < tokens; ++t) {
        EXPECT_TRUE(at::equal(labels.narrow(0, t, 1),
                              k_hot(brute_force_labels(outputs[t], teacher[t], k, alpha))))
            << "token " << t << " K " << k << " alpha " << alpha;
      }
    }
  }
}

TEST(PriorLabels, ExhaustiveSearchesInBlocks) {
  // C(16, 8) = 12870 subsets of 256 pairs: more than one block of the pair matrix. The teacher is
  // the sum of one known subset, which is then the only one without an error.
  const at::Tensor outputs = random({3, 16, 24}, 14);
  at::Tensor expected = torch::zeros({3, 16}, torch::kDouble);
  expected[0].narrow(0, 0, 8).fill_(1);
  expected[1].narrow(0, 8, 8).fill_(1);
  expected[2].narrow(0, 4, 8).fill_(1);
  const at::Tensor teacher = 2.0 * (expected.unsqueeze(2) * outputs).sum(1);
  EXPECT_TRUE(at::equal(prior_labels(outputs, teacher, 8, LabelKind::kExhaustive, 2.0), expected));
}

TEST(PriorLabels, HaveKOnesAndNoGradient) {
  const at::Tensor outputs = random({9, 5, 3}, 15).requires_grad_(true);
  for (const LabelKind kind : {LabelKind::kPerExpert, LabelKind::kExhaustive}) {
    const at::Tensor labels =
        prior_labels(outputs.to(torch::kFloat), outputs.to(torch::kFloat).sum(1), 2, kind, 2.5);
    EXPECT_FALSE(labels.requires_grad());
    EXPECT_EQ(labels.scalar_type(), torch::kFloat);
    EXPECT_TRUE(at::equal(labels.sum(1), torch::full({9}, 2.0f)));
    EXPECT_TRUE(at::equal(labels.square(), labels));
  }
}

TEST(PriorLabels, RejectsWhatItCannotDo) {
  const at::Tensor outputs = random({2, 4, 3}, 16);
  const at::Tensor teacher = outputs.sum(1);
  EXPECT_THROW(prior_labels(outputs, teacher, 0, LabelKind::kPerExpert, 1), InvalidArgument);
  EXPECT_THROW(prior_labels(outputs, teacher, 5, LabelKind::kPerExpert, 1), InvalidArgument);
  EXPECT_THROW(prior_labels(outputs, teacher[0], 1, LabelKind::kPerExpert, 1), InvalidArgument);
  const at::Tensor many = torch::zeros({1, 64, 2}, torch::kDouble);  // C(64, 32) = 1.8e18
  EXPECT_THROW(prior_labels(many, many.sum(1), 32, LabelKind::kExhaustive, 1), InvalidArgument);
  EXPECT_NO_THROW(prior_labels(many, many.sum(1), 32, LabelKind::kPerExpert, 1));
}

TEST(BalanceLoss, SwitchFormIsOneWhenEven) {
  const at::Tensor logits = torch::zeros({6, 3}, torch::kDouble);
  const at::Tensor ids = torch::tensor({0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0}).view({6, 2});
  EXPECT_NEAR(balance_loss(logits, ids, BalanceKind::kSwitch).item<double>(), 1.0, 1e-15);
  // All on one expert with all the probability: E.
  const at::Tensor collapsed = k_hot({200, 0, 0}).expand({6, 3});
  const at::Tensor first = torch::zeros({6, 1}, torch::kLong);
  EXPECT_NEAR(balance_loss(collapsed, first, BalanceKind::kSwitch).item<double>(), 3.0, 1e-12);
}

TEST(BalanceLoss, MatchesPlainLoops) {
  const std::int64_t tokens = 9, num_experts = 5, k = 2;
  const at::Tensor logits = random({tokens, num_experts}, 17);
  const at::Tensor ids = std::get<1>(logits.topk(k, 1));
  const at::Tensor p = logits.softmax(1);
  double paper = 0, switch_form = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    double f = 0, mean = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      mean += p[t][e].item<double>() / tokens;
      for (std::int64_t s = 0; s < k; ++s) {
        if (ids[t][s].item<std::int64_t>() != e) continue;
        f += 1.0 / (tokens * k);
        paper += p[t][e].item<double>() / (tokens * num_experts);
      }
    }
    switch_form += num_experts * f * mean;
  }
  EXPECT_NEAR(balance_loss(logits, ids, BalanceKind::kPaper).item<double>(), paper, 1e-15);
  EXPECT_NEAR(balance_loss(logits, ids, BalanceKind::kSwitch).item<double>(), switch_form, 1e-15);
}

TEST(BalanceLoss, GradientMatchesFiniteDifferencesAndMasksTokens) {
  const at::Tensor logits = random({5, 4}, 18);
  const at::Tensor ids = std::get<1>(logits.topk(2, 1));
  const at::Tensor mask = torch::tensor({1, 1, 0, 1, 0}).to(torch::kBool);
  const at::Tensor kept = torch::tensor({0, 1, 3});
  for (const BalanceKind kind : {BalanceKind::kSwitch, BalanceKind::kPaper}) {
    const auto loss = [&](const at::Tensor& x) { return balance_loss(x, ids, kind, mask); };
    expect_gradient_matches(loss, logits);
    EXPECT_NEAR(
        loss(logits).item<double>(),
        balance_loss(logits.index_select(0, kept), ids.index_select(0, kept), kind).item<double>(),
        1e-15);
  }
}

TEST(LanguageModelLoss, LeavesOutIgnoredTargets) {
  const at::Tensor logits = random({4, 6}, 19);
  const at::Tensor targets = torch::tensor({2, -100, 5, -100});
  const at::Tensor log_p = logits.log_softmax(1);
  const double expected = -(log_p[0][2].item<double>() + log_p[2][5].item<double>()) / 2;
  EXPECT_NEAR(language_model_loss(logits, targets).item<double>(), expected, 1e-15);
  expect_gradient_matches([&](const at::Tensor& x) { return language_model_loss(x, targets); },
                          logits);
}

TEST(LogitKl, MatchesDoubleLoopsAndSparesTheTeacher) {
  const at::Tensor student = random({3, 8}, 20).requires_grad_(true);
  const at::Tensor teacher = random({3, 8}, 21).requires_grad_(true);
  const at::Tensor p = student.softmax(1), q = teacher.softmax(1);
  double expected = 0;
  for (std::int64_t n = 0; n < 3; ++n) {
    for (std::int64_t v = 0; v < 8; ++v) {
      const double qv = q[n][v].item<double>();
      expected += qv * std::log(qv / p[n][v].item<double>()) / 3;
    }
  }
  const at::Tensor loss = logit_kl(student, teacher);
  EXPECT_NEAR(loss.item<double>(), expected, 1e-14);
  loss.backward();
  EXPECT_FALSE(teacher.grad().defined());
  EXPECT_GT(student.grad().abs().max().item<double>(), 0.0);
  EXPECT_NEAR(logit_kl(teacher, teacher).item<double>(), 0.0, 1e-15);
}

TEST(Losses, RejectDisagreeingShapes) {
  const at::Tensor logits = random({3, 4}, 22);
  EXPECT_THROW(prior_approximate_loss(logits, random({3, 5}, 1), PaForm::kRouterFirst),
               InvalidArgument);
  EXPECT_THROW(
      prior_approximate_loss(logits, logits, PaForm::kRouterFirst, torch::ones({2}, torch::kBool)),
      InvalidArgument);
  EXPECT_THROW(balance_loss(logits, torch::zeros({2, 1}, torch::kLong), BalanceKind::kSwitch),
               InvalidArgument);
  EXPECT_THROW(language_model_loss(logits, torch::zeros({2}, torch::kLong)), InvalidArgument);
  EXPECT_THROW(logit_kl(logits, random({3, 5}, 1)), InvalidArgument);
}

}  // namespace
}  // namespace cleave::train
