// Values and gradients written by scripts/golden/make_losses_golden.py (PyTorch, float64, seed 0).
// If they move, a formula moved: find out which one before updating them.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "cleave/train/losses.h"
#include "support/paths.h"

namespace cleave::train {
namespace {

const nlohmann::json& golden() {
  static const nlohmann::json file = nlohmann::json::parse(
      std::ifstream(cleave::testing::source_dir() / "tests" / "golden" / "losses.json"));
  return file;
}

void flatten(const nlohmann::json& node, std::vector<double>& values) {
  if (!node.is_array()) {
    values.push_back(node.is_boolean() ? node.get<bool>() : node.get<double>());
    return;
  }
  for (const auto& child : node) flatten(child, values);
}

at::Tensor tensor(const nlohmann::json& node) {
  std::vector<std::int64_t> shape;
  for (const auto* level = &node; level->is_array(); level = &level->at(0)) {
    shape.push_back(static_cast<std::int64_t>(level->size()));
  }
  std::vector<double> values;
  flatten(node, values);
  return torch::tensor(values, torch::kDouble).view(shape);
}

at::Tensor tensor(const char* name) { return tensor(golden().at(name)); }

void expect_equal(const at::Tensor& loss, const at::Tensor& logits,
                  const nlohmann::json& expected) {
  EXPECT_NEAR(loss.item<double>(), expected.at("value").get<double>(), 1e-14);
  const at::Tensor gradient = torch::autograd::grad({loss}, {logits})[0];
  EXPECT_LT((gradient - tensor(expected.at("gradient"))).abs().max().item<double>(), 1e-14);
}

TEST(LossesGolden, Labels) {
  const at::Tensor outputs = tensor("outputs"), teacher = tensor("teacher");
  const double alpha = golden().at("alpha");
  for (const std::int64_t k : {1, 2, 3}) {
    const std::string key = std::to_string(k);
    EXPECT_TRUE(at::equal(prior_labels(outputs, teacher, k, LabelKind::kPerExpert, alpha),
                          tensor(golden().at("per_expert").at(key))));
    EXPECT_TRUE(at::equal(prior_labels(outputs, teacher, k, LabelKind::kExhaustive, alpha),
                          tensor(golden().at("exhaustive").at(key))));
  }
  const at::Tensor target = prior_allocation(tensor(golden().at("per_expert").at("2")));
  EXPECT_LT((target - tensor("target")).abs().max().item<double>(), 1e-15);
}

TEST(LossesGolden, PriorApproximate) {
  const at::Tensor logits = tensor("logits").requires_grad_(true), target = tensor("target");
  const at::Tensor mask = tensor("mask").to(torch::kBool);
  const std::pair<const char*, PaForm> forms[] = {{"router_first", PaForm::kRouterFirst},
                                                  {"target_first", PaForm::kTargetFirst},
                                                  {"cross_entropy", PaForm::kCrossEntropy}};
  for (const auto& [name, form] : forms) {
    SCOPED_TRACE(name);
    expect_equal(prior_approximate_loss(logits, target, form), logits, golden().at("pa").at(name));
    expect_equal(prior_approximate_loss(logits, target, form, mask), logits,
                 golden().at("pa_masked").at(name));
  }
}

TEST(LossesGolden, Balance) {
  const at::Tensor logits = tensor("logits").requires_grad_(true);
  const at::Tensor ids = tensor("ids").to(torch::kLong);
  expect_equal(balance_loss(logits, ids, BalanceKind::kSwitch), logits,
               golden().at("balance").at("switch"));
  expect_equal(balance_loss(logits, ids, BalanceKind::kPaper), logits,
               golden().at("balance").at("paper"));
}

TEST(LossesGolden, LanguageModelAndLogitKl) {
  const at::Tensor student = tensor("student");
  EXPECT_NEAR(language_model_loss(student, tensor("targets").to(torch::kLong)).item<double>(),
              golden().at("language_model_loss").get<double>(), 1e-14);
  EXPECT_NEAR(logit_kl(student, tensor("dense")).item<double>(),
              golden().at("logit_kl").get<double>(), 1e-14);
}

}  // namespace
}  // namespace cleave::train
