// Conversion to a budget: input that is broken, scarce or odd.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "budget_notices.h"
#include "cleave/error.h"
#include "support/budget.h"
#include "support/random_ffn.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

class BudgetInput : public testing::BudgetTest {
 protected:
  std::vector<DenseFfn> dense_ffns() const {
    Model dense = Model::load(source_);
    std::vector<DenseFfn> ffns;
    for (std::int64_t l = 0; l < dense.config().num_layers; ++l) ffns.push_back(dense.dense_ffn(l));
    return ffns;
  }
  /// The bundled model with other FFNs.
  Checkpoint write_dense(const std::string& name, const std::vector<DenseFfn>& ffns) const {
    Provenance provenance;
    for (const DenseFfn& ffn : ffns) {
      provenance.neuron_order.emplace_back(static_cast<std::size_t>(ffn.hidden));
      for (std::int64_t j = 0; j < ffn.hidden; ++j)
        provenance.neuron_order.back()[static_cast<std::size_t>(j)] = static_cast<std::int32_t>(j);
    }
    write_llama_dense(dir_.path() / name, source_, ffns, provenance, {.dtype = DType::kF32});
    return Checkpoint::open(dir_.path() / name);
  }
  /// Notices that hold a part.
  static std::int64_t count_notices(const Conversion& conversion, const std::string& part) {
    return std::count_if(
        conversion.notices.begin(), conversion.notices.end(),
        [&](const std::string& notice) { return notice.find(part) != std::string::npos; });
  }
};

/// A neuron whose gate is closed for the first tokens of a text and wide open for a later one, and
/// that token.
struct LateNeuron {
  std::int64_t neuron = -1, token = 0;
};
LateNeuron late_neuron(const DenseFfn& ffn, MatrixView<const float> x) {
  for (std::int64_t j = 0; j < ffn.hidden; ++j)
    for (std::int64_t t = 0; t < x.rows; ++t) {
      double gate = 0.0, up = 0.0;
      for (std::int64_t d = 0; d < ffn.d_model; ++d) {
        gate += ffn.gate[j * ffn.d_model + d] * x(t, d);
        up += ffn.up[j * ffn.d_model + d] * x(t, d);
      }
      if (gate < -0.2) continue;
      if (t > 2 && gate > 0.2 && std::abs(up) > 0.05) return {j, t};
      break;
    }
  return {};
}

TEST_F(BudgetInput, NamesLayerAndTokenOfWhatIsNotFinite) {
  Model dense = Model::load(source_);
  std::vector<DenseFfn> ffns = dense_ffns();
  LateNeuron late;
  KvCache cache(dense.config(), kContext);
  std::vector<float> hidden(static_cast<std::size_t>(kContext * dense.config().hidden_size));
  ForwardHooks hooks;
  hooks.ffn_input = [&](std::int64_t layer, MatrixView<const float> x) {
    if (layer == 1) late = late_neuron(ffns[1], x);
  };
  dense.forward(calibration_.window(0), cache,
                {hidden.data(), kContext, dense.config().hidden_size}, hooks);
  ASSERT_GE(late.neuron, 0);
  const std::int64_t D = dense.config().hidden_size;
  for (std::int64_t d = 0; d < D; ++d) {
    ffns[1].gate[late.neuron * D + d] *= 1e22f;  // open: 1e44, more than a float holds
    ffns[1].up[late.neuron * D + d] *= 1e22f;
  }
  const Checkpoint broken = write_dense("broken", ffns);
  const auto names_it = [&](const std::function<void()>& convert_it) {
    try {
      convert_it();
      ADD_FAILURE() << "infinite activations were taken";
    } catch (const FileError& error) {
      const std::string message = error.what(), token = std::to_string(late.token);
      EXPECT_NE(message.find("layer 1:"), std::string::npos) << message;
      EXPECT_NE(message.find("at token " + token + " of calibration window 0"), std::string::npos)
          << message << "; expected token " << token;
    }
  };
  // A share of 1, so that layer 0 stays what it is.
  names_it([&] { convert_to_budget(broken, budget(1.0), calibration_); });
  names_it([&] { convert(broken, {.partition = {.num_experts = 8}}, &calibration_); });
}

TEST_F(BudgetInput, RefusesWhatMakesNoSense) {
  expect_refused(budget(0.01), "less than one expert");
  expect_refused(budget(0.016),
                 "less than one expert of 16; give at least 0.03125");  // rounds to one
  expect_refused(budget(1.5), "active share 1.5");
  BudgetSpec spec = budget(0.5);
  spec.expert_width = 48;
  expect_refused(spec, "do not divide H = 512");
  spec = budget(0.5);
  spec.shared_share = -0.1;
  expect_refused(spec, "shared");
  spec = budget(0.5);
  spec.router_method = RouterMethod::kLowRank;
  spec.router_rank = 25;
  expect_refused(spec, "rank 25 for 24 experts");
  calibration_.tokens.resize(100);
  expect_refused(budget(0.5), "window");
}

/// Neuron j of a dense FFN does nothing any more: without gate, up or down, or any, as `part` says.
void kill_neuron(DenseFfn& ffn, std::int64_t j, int part) {
  const std::int64_t D = ffn.d_model, H = ffn.hidden;
  if (part == 0 || part == 3) std::fill_n(ffn.gate.begin() + j * D, D, 0.0f);
  if (part == 1 || part == 3) std::fill_n(ffn.up.begin() + j * D, D, 0.0f);
  if (part == 2 || part == 3)
    for (std::int64_t d = 0; d < D; ++d) ffn.down[d * H + j] = 0.0f;
}

TEST_F(BudgetInput, DeadNeuronsAreConvertedLikeAnyOther) {
  std::vector<DenseFfn> ffns = dense_ffns();
  for (DenseFfn& ffn : ffns)
    for (int j = 0; j < 80; ++j) kill_neuron(ffn, 6 * j, j % 4);
  source_ = write_dense("dead", ffns);
  for (const double shared : {0.5, 0.0, 1.0}) {
    SCOPED_TRACE(shared);
    BudgetSpec spec = budget(0.75);
    spec.shared_share = shared;
    const Conversion conversion = convert_to_budget(source_, spec, calibration_);
    const double written = evaluate_written(conversion).kl;
    EXPECT_LT(written, shared < 1.0 ? 0.02 : 0.06);
    if (conversion.layers.empty()) continue;
    // Rows of zeros at the end of a slice are read as padding, which changes nothing.
    Model dense = Model::load(source_), in_memory = Model::load(source_);
    for (std::size_t l = 0; l < conversion.layers.size(); ++l)
      in_memory.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
    EXPECT_NEAR(evaluate(in_memory, held_out_, &dense).kl, written, 0.02 * written);
  }
}

TEST_F(BudgetInput, ExpertsThatNoTokenChoosesAreToldAndKeepTheirWeights) {
  TokenWindows few;
  few.context = 8;
  few.tokens.assign(calibration_.tokens.begin(), calibration_.tokens.begin() + 16);
  BudgetSpec spec = budget(0.5);
  spec.expert_width = 4;
  spec.shared_share = 63.0 / 64.0;  // K = 1 of 65 experts: 16 tokens choose 16 of them at most
  const Conversion conversion = convert_to_budget(source_, spec, few);
  EXPECT_EQ(count_notices(conversion, "no calibration token chose"), 4);
  EXPECT_EQ(count_notices(conversion, "of the 65 experts; their weights stay"), 4);
  const std::vector<DenseFfn> ffns = dense_ffns();
  for (std::size_t l = 0; l < ffns.size(); ++l) {
    const ExpertBank& bank = conversion.layers[l].experts;
    std::int64_t unused = 0;
    for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
      if (conversion.expert_load[l][static_cast<std::size_t>(e)] > 0.0) continue;
      ++unused;
      for (std::int64_t r = bank.begin[e]; r < bank.begin[e + 1]; ++r)
        for (std::int64_t d = 0; d < bank.d_model; ++d)
          ASSERT_EQ(bank.down_t[r * bank.d_model + d],
                    ffns[l].down[d * ffns[l].hidden + bank.neuron_order[r]])
              << "layer " << l << " expert " << e;
    }
    EXPECT_GE(unused, 49);
  }
}

TEST_F(BudgetInput, ABudgetOfOneExpertSaysThatNothingIsRouted) {
  BudgetSpec spec = budget(1.0 / 32.0);
  spec.refit = false;
  const Conversion halved = convert_to_budget(source_, spec, calibration_);
  EXPECT_EQ(halved.pruned.size(), 4u);
  EXPECT_EQ(count_notices(halved, "nothing is routed: of a budget of 16 neurons"), 1);
  spec.shared_share = 1.0;  // asked for
  EXPECT_EQ(count_notices(convert_to_budget(source_, spec, calibration_), "nothing is routed"), 0);
  spec.shared_share = 0.0;
  const Conversion routed = convert_to_budget(source_, spec, calibration_);
  EXPECT_EQ(routed.layers.size(), 4u);
  EXPECT_EQ(count_notices(routed, "nothing is routed"), 0);
}

TEST_F(BudgetInput, ScarceTextNamesTheLayersAndWhatARoutedNeuronSees) {
  calibration_.tokens.resize(5 * kContext);
  const Conversion scarce = convert_to_budget(source_, budget(0.5), calibration_);
  // 8 of 24 experts: a third of 1280 tokens, for 256 neurons that run.
  EXPECT_EQ(count_notices(scarce,
                          "layers 0 to 3 are under-determined: in layer 0 a routed neuron sees 427 "
                          "of the 1280 calibration tokens on average, fewer than 4 for each of the "
                          "256 neurons that run; the ridge penalty keeps"),
            1);
  BudgetSpec spec = budget(0.5);
  spec.shared_share = 1.0;
  EXPECT_EQ(count_notices(convert_to_budget(source_, spec, calibration_), "under-determined"), 0);
  spec.shared_share = 0.5;
  spec.refit = false;  // nothing to determine
  EXPECT_EQ(count_notices(convert_to_budget(source_, spec, calibration_), "under-determined"), 0);
}

TEST(TextNotice, ListsTheLayersAndTellsOfTheWorst) {
  const auto fit = [](std::int64_t layer, double seen, std::int64_t running) {
    return FitText{layer, 1000, seen, true, running};
  };
  EXPECT_FALSE(text_notice({}).has_value());
  EXPECT_FALSE(text_notice({fit(0, 400.0, 100)}).has_value());
  const auto one = text_notice({fit(0, 400.0, 100), fit(1, 399.0, 100)});
  ASSERT_TRUE(one.has_value());
  EXPECT_EQ(one->find("layer 1 is under-determined: in layer 1 a routed neuron sees 399"), 0u)
      << *one;
  const auto many = text_notice({fit(0, 300.0, 100), fit(1, 300.0, 100), fit(2, 900.0, 100),
                                 fit(3, 300.0, 150), fit(5, 300.0, 100)});
  ASSERT_TRUE(many.has_value());
  EXPECT_EQ(many->find("layers 0 to 1, 3, 5 are under-determined: in layer 3"), 0u) << *many;
}

TEST(FitText, PaddingIsNoUnknownAndItsExpertsSeeNothing) {
  const SplitSource source(testing::random_ffn({.hidden = 16, .d_model = 4, .seed = 1}));
  NeuronPartition partition{3, {}};  // 4 shared neurons, 3 experts of 4
  for (std::int32_t j = 0; j < 16; ++j)
    partition.expert_of_neuron.push_back(j < 4 ? NeuronPartition::kShared : (j - 4) / 4);
  BudgetRows rows(source.ffn.view(), partition);
  std::vector<std::int32_t> dense(16);
  for (std::int32_t j = 0; j < 16; ++j) dense[j] = j < 11 ? j : ExpertBank::kPadding;
  rows.name_neurons(dense, 11);  // a neuron of expert 1 and all of expert 2 are padding
  const Routing routing{5, 1, {0, 0, 1, 1, 1}, std::vector<float>(5, 1.0f)};
  const FitText fit = fit_text(rows, routing, 5, 7);
  EXPECT_EQ(fit.layer, 7);
  EXPECT_NEAR(fit.seen, (4 * 2 + 3 * 3) / 7.0, 1e-12);
  EXPECT_EQ(fit.running, 4 + 3);  // 17 / 5 of them, rounded
  EXPECT_FALSE(unused_notice(rows, expert_loads(routing, 3), 7).has_value());
  const FitText all_shared = fit_text(rows, Routing{}, 5, 7);
  EXPECT_EQ(all_shared.seen, 5.0);
  EXPECT_FALSE(all_shared.routed);
}

}  // namespace
}  // namespace cleave
