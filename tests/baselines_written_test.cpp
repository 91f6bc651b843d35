// Rows of a report are masks of the dense model. Here they are written, re-read and measured again.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cleave/baselines.h"
#include "cleave/convert.h"
#include "cleave/factorize.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"

namespace cleave {
namespace {

using testing::demo_llama_dir;
using testing::TempDir;

constexpr std::int64_t kContext = 128;

class WrittenBaselines : public ::testing::Test {
 protected:
  WrittenBaselines()
      : source_(Checkpoint::open(demo_llama_dir())), dense_(Model::load(source_, {.threads = 2})) {
    const std::string sample = (demo_llama_dir() / "sample.txt").string();
    const TokenWindows all = make_windows(
        Tokenizer::from_checkpoint(source_).encode(read_text(sample)), kContext, 0, sample);
    calibration_.context = held_out_.context = kContext;
    const auto middle = all.tokens.begin() + 16 * kContext;
    calibration_.tokens.assign(all.tokens.begin(), middle);
    held_out_.tokens.assign(middle, middle + 4 * kContext);
    states_ = hidden_states(dense_, held_out_);
  }

  Baseline prepare(const std::string& method) {
    const auto specs = baseline_specs(BaselineSet::kAll, dense_.config().intermediate_size, 0.5);
    const auto spec = std::find_if(specs.begin(), specs.end(),
                                   [&](const BaselineSpec& s) { return s.method == method; });
    EXPECT_NE(spec, specs.end()) << method;
    return prepare_baselines(dense_, calibration_, {&*spec, 1}).front();
  }
  double kl(const Baseline& baseline) {
    return measure_baselines(dense_, {&baseline, 1}, held_out_, states_).front().kl;
  }
  double kl_written(const Conversion& conversion) {
    write_conversion(dir_.path() / "out", source_, conversion, "{}",
                     {.dtype = DType::kF32, .overwrite = true});
    Model model = Model::load(Checkpoint::open(dir_.path() / "out"), {.threads = 2});
    return evaluate(model, held_out_, {.reference = &dense_, .reference_states = &states_}).kl;
  }
  /// The neurons that are on, as an FFN of their own; what is off gives its constant.
  Conversion narrower(const Baseline& baseline) {
    Conversion conversion;
    for (std::int64_t l = 0; l < dense_.config().num_layers; ++l) {
      const DenseFfn ffn = dense_.dense_ffn(l);
      const BaselineLayer& layer = baseline.layers[l];
      ExpertBank bank = shared_slice(ffn.view(), {0, layer.expert_of_neuron});
      if (!layer.down_t.empty()) bank.down_t = layer.down_t;
      if (!layer.off_value.empty()) {
        bank.down_bias.assign(ffn.d_model, 0.0f);
        for (std::int64_t j = 0; j < ffn.hidden; ++j)
          for (std::int64_t d = 0; d < ffn.d_model; ++d)
            if (layer.expert_of_neuron[j] == BaselineLayer::kOff)
              bank.down_bias[d] += layer.off_value[j] * ffn.view().down(d, j);
      }
      conversion.pruned.push_back(std::move(bank));
    }
    return conversion;
  }
  /// Its experts, shared neurons and linear routers; chosen experts weigh 1.
  Conversion routed(const Baseline& baseline) {
    Conversion conversion;
    for (std::int64_t l = 0; l < dense_.config().num_layers; ++l) {
      const DenseFfn ffn = dense_.dense_ffn(l);
      const NeuronPartition partition{static_cast<std::int32_t>(baseline.spec.num_experts),
                                      baseline.layers[l].expert_of_neuron};
      MoeLayer layer;
      layer.experts = factorize(ffn.view(), partition);
      if (baseline.spec.shared > 0) layer.shared = shared_slice(ffn.view(), partition);
      layer.router = baseline.layers[l].router;
      // The order stays, and the softmax of a stock class comes nearer to 1 / K each.
      for (float& w : layer.router.weight) w /= 64.0f;
      layer.experts_per_token = baseline.spec.experts_per_token;
      layer.gate = GateMode::kHard;
      conversion.layers.push_back(std::move(layer));
    }
    return conversion;
  }

  TempDir dir_;
  Checkpoint source_;
  Model dense_;
  TokenWindows calibration_, held_out_;
  HiddenStates states_;
};

// The same sums of float32 values in another order, through 4 layers: some 1e-6 of a logit, and KL
// is a mean of 508 positions. FLAP's constant becomes the output bias of a Llama's FFN.
TEST_F(WrittenBaselines, APrunedRowIsTheNarrowerModel) {
  for (const char* method : {"static mask", "FLAP-style pruning", "static mask, refitted",
                             "FLAP-style pruning, refitted"}) {
    SCOPED_TRACE(method);
    const Baseline baseline = prepare(method);
    const double expected = kl(baseline);
    EXPECT_GT(expected, 0.01);
    EXPECT_NEAR(kl_written(narrower(baseline)), expected, 1e-4 * expected);
    const ModelConfig config = Checkpoint::open(dir_.path() / "out").config();
    EXPECT_EQ(config.intermediate_size, dense_.config().intermediate_size / 2);
    EXPECT_EQ(config.mlp_bias, baseline.spec.compensate);
  }
}

// A near-tie of two experts may fall the other way.
TEST_F(WrittenBaselines, ARoutedRowIsTheMixtureOfExperts) {
  for (const auto& [method, family] :
       {std::pair{"random split, E 8, ridge router", Family::kMixtral},
        std::pair{"half shared, k-means width 16, ridge router", Family::kGraniteMoeShared}}) {
    SCOPED_TRACE(method);
    const Baseline baseline = prepare(method);
    const double expected = kl(baseline);
    EXPECT_NEAR(kl_written(routed(baseline)), expected, 5e-4 * expected);
    EXPECT_EQ(Checkpoint::open(dir_.path() / "out").config().family, family);
  }
}

TEST_F(WrittenBaselines, ARefittedMaskIsTheConversionThatRoutesNothing) {
  BudgetSpec spec;
  spec.shared_share = 1.0;
  const double converted = kl_written(convert_to_budget(source_, spec, calibration_));
  EXPECT_NEAR(kl(prepare("static mask, refitted")), converted, 1e-4 * converted);
}

TEST_F(WrittenBaselines, RefittingRepairs) {
  for (const std::string method : {"static mask", "FLAP-style pruning"})
    EXPECT_LT(kl(prepare(method + ", refitted")), 0.8 * kl(prepare(method))) << method;
}

}  // namespace
}  // namespace cleave
