#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cleave/convert.h"
#include "cleave/report.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using testing::demo_llama_dir;
using testing::TempDir;

class OracleOfAModel : public ::testing::Test {
 protected:
  OracleOfAModel() {
    testing::write_random_llama(dir_.path() / "dense", {.hidden = 64});
    text_.context = 16;
    std::mt19937 rng(5);
    for (int i = 0; i < 4 * 16; ++i) text_.tokens.push_back(static_cast<std::int32_t>(rng() % 40));
  }
  Model converted(std::int64_t active, GateMode gate) const {
    const Checkpoint source = Checkpoint::open(dir_.path() / "dense");
    const ConvertSpec spec{.partition = {.num_experts = 8},
                           .experts_per_token = active,
                           .gate = gate,
                           .scale = ScalePolicy::kActive,
                           .threads = 2};
    write_conversion(dir_.path() / "moe", source, convert(source, spec, &text_), "{}",
                     {.overwrite = true});
    return Model::load(Checkpoint::open(dir_.path() / "moe"), {.threads = 2});
  }
  TempDir dir_;
  TokenWindows text_;
};

double largest_gap(const HiddenStates& a, const HiddenStates& b) {
  EXPECT_EQ(a.values.size(), b.values.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < a.values.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a.values[i]) - b.values[i]));
  return largest;
}

/// Expert e's output for x, and the energy of its neurons, by plain loops.
std::pair<std::vector<double>, double> output_and_energy(const ExpertBank& bank, std::int64_t e,
                                                         const float* x) {
  std::vector<double> y(static_cast<std::size_t>(bank.d_model));
  double energy = 0.0;
  for (std::int64_t r = bank.begin[e]; r < bank.begin[e + 1]; ++r) {
    double gate = 0.0, up = 0.0, square = 0.0;
    for (std::int64_t d = 0; d < bank.d_model; ++d) {
      gate += static_cast<double>(bank.gate[r * bank.d_model + d]) * x[d];
      up += static_cast<double>(bank.up[r * bank.d_model + d]) * x[d];
    }
    const double h = activate(bank.activation, gate) * up;
    for (std::int64_t d = 0; d < bank.d_model; ++d) {
      const double down = bank.down_t[r * bank.d_model + d];
      y[d] += h * down;
      square += down * down;
    }
    energy += h * h * square;
  }
  return {y, energy};
}

// The same by hooks that stand in for the layers: the K experts of most energy, with the weights
// that the layer's gate gives these.
TEST_F(OracleOfAModel, TakesTheExpertsOfMostEnergy) {
  for (const GateMode gate : {GateMode::kHard, GateMode::kSoftmax}) {
    Model model = converted(3, gate);
    ForwardHooks hooks;
    int differs = 0;
    hooks.ffn = [&](std::int64_t l, MatrixView<const float> x, MatrixView<float> y) {
      const MoeLayer layer = model.moe_layer(l);
      for (std::int64_t t = 0; t < x.rows; ++t) {
        std::vector<double> energy(8), logit(8);
        std::vector<std::vector<double>> output(8);
        std::vector<std::int32_t> order(8);
        std::iota(order.begin(), order.end(), 0);
        for (std::int64_t e = 0; e < 8; ++e) {
          std::tie(output[e], energy[e]) = output_and_energy(layer.experts, e, x.row(t));
          for (std::int64_t d = 0; d < x.cols; ++d)
            logit[e] += static_cast<double>(layer.router.weight[e * x.cols + d]) * x(t, d);
        }
        std::sort(order.begin(), order.end(),
                  [&](std::int32_t a, std::int32_t b) { return energy[a] > energy[b]; });
        const auto best = std::max_element(logit.begin(), logit.end()) - logit.begin();
        differs += std::find(order.begin(), order.begin() + 3, best) == order.begin() + 3 ? 1 : 0;
        double sum = 0.0;
        for (int k = 0; k < 3; ++k) sum += std::exp(logit[order[k]]);
        for (int k = 0; k < 3; ++k)
          for (std::int64_t d = 0; d < x.cols; ++d)
            y(t, d) += static_cast<float>(layer.scale * std::exp(logit[order[k]]) / sum *
                                          output[order[k]][d]);
      }
      return true;
    };
    const HiddenStates expected = hidden_states(model, text_, hooks);
    // The final norm brings every state to a size near 1; two layers of products over 64 terms.
    EXPECT_LT(largest_gap(oracle_states(model, text_), expected), 5e-5);
    EXPECT_GT(differs, 0);  // somewhere even the router's first choice is another
    EXPECT_GT(largest_gap(hidden_states(model, text_), expected), 1e-2);
  }
}

TEST_F(OracleOfAModel, WithAllExpertsOnThereIsNothingToChoose) {
  Model model = converted(8, GateMode::kSoftmax);
  EXPECT_LT(largest_gap(oracle_states(model, text_), hidden_states(model, text_)), 5e-5);
}

/// The bundled model, half of its FFN, written and re-read; a report on text that it has not seen.
class ReportOfABudget : public ::testing::Test {
 protected:
  static constexpr std::int64_t kContext = 128;
  ReportOfABudget() : source_(Checkpoint::open(demo_llama_dir())) {
    const std::string sample = (demo_llama_dir() / "sample.txt").string();
    const TokenWindows all = make_windows(
        Tokenizer::from_checkpoint(source_).encode(read_text(sample)), kContext, 0, sample);
    const auto middle = all.tokens.begin() + 16 * kContext;
    calibration_ = {{all.tokens.begin(), middle}, kContext};
    text_ = {"sample", {{middle, middle + 4 * kContext}, kContext}};
  }
  Model convert_half(double shared_share) {
    BudgetSpec spec;
    spec.shared_share = shared_share;
    spec.router.steps = 50;
    write_conversion(dir_.path() / "out", source_, convert_to_budget(source_, spec, calibration_),
                     "{}", {.dtype = DType::kF32, .overwrite = true});
    return Model::load(Checkpoint::open(dir_.path() / "out"), {.threads = 2});
  }
  TempDir dir_;
  Checkpoint source_;
  TokenWindows calibration_;
  NamedText text_;
};

const QualityRow& row_of(const ConversionReport& report, const std::string& method) {
  const auto& rows = report.texts.front().rows;
  return *std::find_if(rows.begin(), rows.end(),
                       [&](const QualityRow& row) { return row.method == method; });
}

TEST_F(ReportOfABudget, TellsWhatTheRoutersStillCost) {
  Model model = convert_half(0.5), dense = Model::load(source_, {.threads = 2});
  const ConversionReport report = make_report(model, dense, {&text_, 1}, &calibration_, {});
  const QualityRow& ours = row_of(report, "this conversion");
  const QualityRow& oracle = row_of(report, "this conversion, oracle router");
  EXPECT_LT(oracle.kl, 0.9 * ours.kl);
  EXPECT_FALSE(oracle.deployable);
  EXPECT_FALSE(oracle.ours);
  ASSERT_TRUE(ours.router);
  EXPECT_TRUE(ours.router->recall > 0.5 && ours.router->recall < 1.0) << ours.router->recall;
  EXPECT_GT(ours.router->captured, ours.router->recall);
  EXPECT_DOUBLE_EQ(ours.active_share, ours.rho + ours.router_share);
  EXPECT_TRUE(verdict(report).starts_with("This conversion beats static pruning on every text"));

  // Another K at run time: more experts are better than fewer, and the model is what it was.
  const std::vector<ActivePoint>& sweep = report.texts[0].sweep;
  ASSERT_EQ(sweep.size(), 5u);
  const std::vector<std::int64_t> counts = {2, 4, 8, 16, 24};
  for (std::size_t i = 0; i < sweep.size(); ++i) EXPECT_EQ(sweep[i].experts_per_token, counts[i]);
  EXPECT_EQ(sweep[2].kl, ours.kl);
  EXPECT_EQ(sweep[2].active_share, ours.active_share);
  EXPECT_GT(sweep[0].kl, sweep[1].kl);
  EXPECT_GT(sweep[1].kl, sweep[2].kl);
  EXPECT_DOUBLE_EQ(sweep[4].rho, 1.0);
  EXPECT_EQ(model.config().experts_per_token, 8);
  EXPECT_NEAR(evaluate(model, text_.windows, &dense).kl, ours.kl, 1e-2 * ours.kl);
}

TEST_F(ReportOfABudget, AConversionThatRoutesNothingHasOneToo) {
  Model model = convert_half(1.0), dense = Model::load(source_, {.threads = 2});
  const ConversionReport report = make_report(model, dense, {&text_, 1}, &calibration_, {});
  EXPECT_DOUBLE_EQ(report.rho, 0.5);
  const QualityRow& ours = row_of(report, "this conversion");
  EXPECT_FALSE(ours.routed);
  EXPECT_FALSE(ours.router);
  EXPECT_NEAR(ours.kl, row_of(report, "static mask, refitted").kl, 1e-4 * ours.kl);
  EXPECT_NE(verdict(report).find("this conversion, which routes nothing, has KL "),
            std::string::npos)
      << verdict(report);
  EXPECT_TRUE(report.texts[0].sweep.empty());
  for (const QualityRow& row : report.texts[0].rows)
    EXPECT_NE(row.method, "this conversion, oracle router");
  ASSERT_EQ(report.layers.size(), 4u);
  for (const LayerReport& layer : report.layers) {
    EXPECT_GT(layer.relative_error, 0.0);
    EXPECT_TRUE(layer.load.empty());
  }
  EXPECT_NE(report_markdown(report).find(" | - | - | - | - | - |"), std::string::npos);
  const std::string html = report_html(report);
  EXPECT_NE(html.find("Error of each layer"), std::string::npos);
  EXPECT_EQ(html.find("Load of the experts"), std::string::npos);
  EXPECT_EQ(html.find("nan"), std::string::npos);
}

}  // namespace
}  // namespace cleave
