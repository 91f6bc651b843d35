#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/evaluate.h"
#include "cleave/model.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using testing::logits_of;
using testing::TempDir;

/// The bundled model: 4 layers, D 128, H 512; calibration and evaluation on different parts of its
/// sample text.
class Budget : public ::testing::Test {
 protected:
  static constexpr std::int64_t kContext = 256;
  Budget() : source_(Checkpoint::open(testing::demo_llama_dir())) {
    const auto file = testing::demo_llama_dir() / "sample.txt";
    const TokenWindows all = make_windows(
        Tokenizer::from_checkpoint(source_).encode(read_text(file)), kContext, 0, "sample.txt");
    calibration_ = part(all, 0, 12);
    held_out_ = part(all, all.count() - 3, all.count());
  }
  static TokenWindows part(const TokenWindows& all, std::int64_t first, std::int64_t last) {
    TokenWindows windows;
    windows.context = all.context;
    windows.tokens.assign(all.tokens.begin() + first * kContext,
                          all.tokens.begin() + last * kContext);
    return windows;
  }
  static BudgetSpec budget(double share) {
    BudgetSpec spec;
    spec.active_share = share;
    spec.router.steps = 30;
    spec.router.batch = 512;
    return spec;
  }
  /// Written, re-read, and compared with the dense model.
  EvalResult evaluate_written(const Conversion& conversion) {
    write_conversion(dir_.path() / "out", source_, conversion, "{}", {.overwrite = true});
    Model dense = Model::load(source_), model = Model::load(Checkpoint::open(dir_.path() / "out"));
    return evaluate(model, held_out_, &dense);
  }
  double kl(const BudgetSpec& spec) {
    return evaluate_written(convert_to_budget(source_, spec, calibration_)).kl;
  }

  TempDir dir_;
  Checkpoint source_;
  TokenWindows calibration_, held_out_;
};

TEST_F(Budget, RoutingAndRefitBothPay) {
  BudgetSpec spec = budget(0.5);
  const double routed = kl(spec);
  spec.refit = false;
  const double unrepaired = kl(spec);
  spec.shared_share = 1.0;
  const double cut = kl(spec);
  spec.refit = true;
  const double cut_repaired = kl(spec);
  EXPECT_LT(routed, 0.8 * unrepaired);
  EXPECT_LT(routed, cut_repaired);
  EXPECT_LT(unrepaired, cut);
}

TEST_F(Budget, MoreNeuronsAreBetterAndAllAreTheDenseModel) {
  const double quarter = kl(budget(0.25)), most = kl(budget(0.75));
  EXPECT_LT(most, 0.7 * quarter);
  EXPECT_LT(kl(budget(1.0)), 1e-3);
}

TEST_F(Budget, WithoutSharedExpertsItIsMixtral) {
  BudgetSpec spec = budget(0.5);
  spec.shared_share = 0.0;
  const Conversion conversion = convert_to_budget(source_, spec, calibration_);
  EXPECT_GT(evaluate_written(conversion).kl, 0.0);
  const ModelConfig config = Checkpoint::open(dir_.path() / "out").config();
  EXPECT_EQ(config.family, Family::kMixtral);
  EXPECT_EQ(config.num_experts, 32);
  EXPECT_EQ(config.experts_per_token, 16);
}

TEST_F(Budget, WrittenModelIsWhatWasConverted) {
  const Conversion conversion = convert_to_budget(source_, budget(0.5), calibration_);
  Model in_memory = Model::load(source_);
  for (std::size_t l = 0; l < conversion.layers.size(); ++l)
    in_memory.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
  write_conversion(dir_.path() / "moe", source_, conversion, "{}", {});
  const Checkpoint written = Checkpoint::open(dir_.path() / "moe");
  EXPECT_EQ(written.config().family, Family::kGraniteMoeShared);
  EXPECT_EQ(written.config().shared_intermediate_size, 128);
  EXPECT_EQ(written.config().num_experts, 24);
  EXPECT_EQ(written.config().experts_per_token, 8);
  Model re_read = Model::load(written);
  const auto a = logits_of(in_memory, held_out_.window(0));
  const auto b = logits_of(re_read, held_out_.window(0));
  ASSERT_EQ(a.size(), b.size());
  // The gates are 1 / K only up to the router's epsilon, and a near-tie may fall the other way.
  double square = 0.0, size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    square += std::pow(a[i] - b[i], 2);
    size += std::pow(a[i], 2);
  }
  EXPECT_LT(square / size, 1e-4);
}

TEST_F(Budget, TheStreamIsThatOfTheConvertedModel) {
  // Of one layer, the reported error is that of the layer as it will run.
  const Conversion conversion = convert_to_budget(source_, budget(0.5), calibration_);
  ASSERT_EQ(conversion.layer_error.size(), 4u);
  for (const double error : conversion.layer_error) {
    EXPECT_GT(error, 0.0);
    EXPECT_LT(error, 0.5);
  }
  for (std::size_t l = 0; l < 4; ++l) {
    EXPECT_LE(conversion.captured_energy[l], conversion.oracle_energy[l] + 1e-9);
    EXPECT_GT(conversion.router_recall[l], 0.4);
  }
}

TEST_F(Budget, TheCorrectionAimsAtTheDenseStream) {
  BudgetSpec spec = budget(0.5);
  spec.correction = 0.5;
  EXPECT_TRUE(std::isfinite(kl(spec)));
}

TEST_F(Budget, RefusesWhatMakesNoSense) {
  const auto refused = [&](const BudgetSpec& spec, const std::string& part) {
    try {
      convert_to_budget(source_, spec, calibration_);
      ADD_FAILURE() << "not refused: " << part;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  refused(budget(0.01), "less than one expert");
  refused(budget(1.5), "active share 1.5");
  BudgetSpec spec = budget(0.5);
  spec.expert_width = 48;
  refused(spec, "do not divide H = 512");
  spec = budget(0.5);
  spec.shared_share = -0.1;
  refused(spec, "shared");
  calibration_.tokens.resize(100);
  refused(budget(0.5), "window");
}

}  // namespace
}  // namespace cleave
