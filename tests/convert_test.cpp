#include "cleave/convert.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "cleave/error.h"
#include "cleave/factorize.h"
#include "cleave/model.h"
#include "support/paths.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using testing::logits_of;
using testing::TempDir;
using testing::write_random_llama;

class Convert : public ::testing::Test {
 protected:
  Convert() {
    write_random_llama(dir_.path() / "dense", {});
    windows_.context = 16;
    std::mt19937 rng(5);
    for (int i = 0; i < 8 * 16; ++i)
      windows_.tokens.push_back(static_cast<std::int32_t>(rng() % 40));
  }

  Checkpoint dense() const { return Checkpoint::open(dir_.path() / "dense"); }
  std::vector<float> dense_logits() const {
    Model model = Model::load(dense(), {.threads = 1});
    return logits_of(model, windows_.window(0));
  }
  std::vector<float> logits_with(const Conversion& conversion) const {
    Model model = Model::load(dense(), {.threads = 1});
    for (std::size_t l = 0; l < conversion.layers.size(); ++l)
      model.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
    return logits_of(model, windows_.window(0));
  }

  TempDir dir_;
  TokenWindows windows_;
};

WriteSpec replacing() {
  WriteSpec spec;
  spec.overwrite = true;
  return spec;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, static_cast<double>(std::abs(a[i] - b[i])));
  return largest;
}

constexpr PartitionMethod kAllMethods[] = {PartitionMethod::kContiguous, PartitionMethod::kRandom,
                                           PartitionMethod::kKMeans};

TEST_F(Convert, AllExpertsActiveIsTheDenseModelBeforeAndAfterWriting) {
  const auto expected = dense_logits();
  for (const PartitionMethod method : kAllMethods)
    for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard}) {
      SCOPED_TRACE(fmt::format("{} {}", partition_method_name(method), gate_mode_name(gate)));
      const ConvertSpec spec{.partition = {.method = method, .num_experts = 6, .seed = 2},
                             .experts_per_token = 6,
                             .gate = gate,
                             .threads = 2};
      const Checkpoint source = dense();
      const Conversion conversion = convert(source, spec, &windows_);
      EXPECT_EQ(conversion.router, "zero");
      EXPECT_LT(largest_difference(logits_with(conversion), expected), 1e-5);

      const auto out = dir_.path() / "moe";
      write_conversion(out, source, conversion, "{}", replacing());
      Model reopened = Model::load(Checkpoint::open(out), {.threads = 1});
      EXPECT_TRUE(reopened.config().is_moe());
      EXPECT_LT(largest_difference(logits_of(reopened, windows_.window(0)), expected), 1e-5);
    }
}

TEST_F(Convert, WrittenAndReopenedComputesTheSame) {
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard}) {
    const ConvertSpec spec{
        .partition = {.num_experts = 6}, .experts_per_token = 2, .gate = gate, .threads = 1};
    const Checkpoint source = dense();
    const Conversion conversion = convert(source, spec, &windows_);
    const auto out = dir_.path() / "moe";
    write_conversion(out, source, conversion, R"({"k": 1})", replacing());
    Model reopened = Model::load(Checkpoint::open(out), {.threads = 1});
    // Stock classes know no hard gate; its stand-in is near, not equal (kHardGateEpsilon).
    EXPECT_LT(largest_difference(logits_of(reopened, windows_.window(0)), logits_with(conversion)),
              gate == GateMode::kSoftmax ? 2e-5 : 5e-2);
  }
}

TEST_F(Convert, WritesHowItWasMade) {
  const ConvertSpec spec{
      .partition = {.method = PartitionMethod::kRandom, .num_experts = 4, .seed = 9},
      .experts_per_token = 2,
      .scale = ScalePolicy::kActive,
      .threads = 1};
  const Checkpoint source = dense();
  const Conversion conversion = convert(source, spec, &windows_);
  write_conversion(dir_.path() / "moe", source, conversion, R"({"mine": 7})", {});
  const auto provenance = read_provenance(dir_.path() / "moe");
  ASSERT_TRUE(provenance);
  EXPECT_EQ(provenance->source, "dense");
  EXPECT_EQ(provenance->source_sha256, source.sha256());
  EXPECT_EQ(provenance->num_experts, 4);
  EXPECT_EQ(provenance->experts_per_token, 2);
  EXPECT_EQ(provenance->partition, "random");
  EXPECT_EQ(provenance->seed, 9u);
  EXPECT_EQ(provenance->router, "ridge");
  EXPECT_EQ(provenance->folded_scale, 2.0);
  ASSERT_EQ(provenance->neuron_order.size(), 2u);
  EXPECT_EQ(provenance->neuron_order[1], conversion.layers[1].experts.neuron_order);
  const auto settings = nlohmann::json::parse(provenance->spec_json);
  EXPECT_EQ(settings.at("mine"), 7);
  EXPECT_EQ(settings.at("scale"), "active");
  EXPECT_EQ(settings.at("calibration_tokens"), 8 * 15);
  EXPECT_THROW(write_conversion(dir_.path() / "moe2", source, conversion, "[1", {}),
               InvalidArgument);
}

TEST_F(Convert, WithoutCalibrationTheRouterIsSeededAndTheScaleIsE) {
  ConvertSpec spec{
      .partition = {.num_experts = 6, .seed = 1}, .experts_per_token = 2, .threads = 1};
  const Conversion a = convert(dense(), spec), b = convert(dense(), spec);
  EXPECT_EQ(a.router, "random");
  EXPECT_EQ(a.calibration_tokens, 0);
  EXPECT_EQ(a.scale, ScalePolicy::kExperts);
  EXPECT_EQ(a.layers[0].scale, 6.0f);
  EXPECT_EQ(a.layers[0].router.weight, b.layers[0].router.weight);
  EXPECT_NE(a.layers[0].router.weight, a.layers[1].router.weight);
  spec.partition.seed = 2;
  EXPECT_NE(a.layers[0].router.weight, convert(dense(), spec).layers[0].router.weight);
  spec.gate = GateMode::kHard;
  EXPECT_EQ(convert(dense(), spec).layers[0].scale, 3.0f);
  spec.scale = ScalePolicy::kActive;
  EXPECT_EQ(convert(dense(), spec).layers[0].scale, 1.0f);
  spec.gate = GateMode::kSoftmax;
  EXPECT_EQ(convert(dense(), spec).layers[0].scale, 2.0f);
}

TEST_F(Convert, FittedRoutersBeatRandomOnes) {
  ConvertSpec spec{.partition = {.num_experts = 6}, .experts_per_token = 3, .threads = 1};
  const auto expected = dense_logits();
  const auto error_of = [&](const Conversion& conversion) {
    const auto logits = logits_with(conversion);
    double error = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) error += std::pow(logits[i] - expected[i], 2);
    return error;
  };
  const Conversion fitted = convert(dense(), spec, &windows_);
  EXPECT_EQ(fitted.router, "ridge");
  EXPECT_EQ(fitted.calibration_tokens, 8 * 15);
  ASSERT_EQ(fitted.layer_error.size(), 2u);
  EXPECT_LT(error_of(fitted), 0.7 * error_of(convert(dense(), spec)));
}

TEST_F(Convert, ThreadsDoNotChangeTheExperts) {
  ConvertSpec spec{.partition = {.num_experts = 6}, .experts_per_token = 3, .threads = 1};
  const Conversion one = convert(dense(), spec, &windows_);
  spec.threads = 3;
  const Conversion three = convert(dense(), spec, &windows_);
  for (std::size_t l = 0; l < one.layers.size(); ++l) {
    EXPECT_EQ(one.layers[l].experts.neuron_order, three.layers[l].experts.neuron_order);
    for (std::size_t i = 0; i < one.layers[l].router.weight.size(); ++i)
      EXPECT_NEAR(one.layers[l].router.weight[i], three.layers[l].router.weight[i], 1e-3);
  }
}

TEST_F(Convert, RefusesWhatItCannotHonour) {
  const Checkpoint source = dense();
  EXPECT_THROW(convert(source, {.partition = {.num_experts = 7}}), InvalidArgument);
  EXPECT_THROW(convert(source, {.partition = {.num_experts = 4}, .experts_per_token = 5}),
               InvalidArgument);
  EXPECT_THROW(convert(source, {.partition = {.num_experts = 4}, .experts_per_token = 0}),
               InvalidArgument);
  TokenWindows empty{.tokens = {1, 2, 3}, .context = 16};
  EXPECT_THROW(convert(source, {.partition = {.num_experts = 4}, .experts_per_token = 2}, &empty),
               InvalidArgument);
  const ConvertSpec spec{.partition = {.num_experts = 4}, .experts_per_token = 2, .threads = 1};
  write_conversion(dir_.path() / "moe", source, convert(source, spec), "", {});
  try {
    convert(Checkpoint::open(dir_.path() / "moe"), spec);
    FAIL() << "converted a mixture of experts";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("already a mixture of experts"), std::string::npos);
  }
}

TEST_F(Convert, NanWeightsAreTheFilesFault) {
  const Checkpoint source = dense();
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  // The writer refuses NaN, so the file is damaged afterwards.
  const auto file = dir_.path() / "dense" / "model.safetensors";
  const auto raw = source.raw(name);
  std::string bytes;
  {
    std::ifstream in(file, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  const std::string needle(reinterpret_cast<const char*>(raw.data()), 64);
  const auto at = bytes.find(needle);
  ASSERT_NE(at, std::string::npos);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  bytes.replace(at, sizeof(nan), reinterpret_cast<const char*>(&nan), sizeof(nan));
  std::filesystem::create_directories(dir_.path() / "nan");
  std::filesystem::copy(dir_.path() / "dense" / "config.json", dir_.path() / "nan");
  std::ofstream(dir_.path() / "nan" / "model.safetensors", std::ios::binary) << bytes;
  const ConvertSpec spec{.partition = {.num_experts = 4}, .experts_per_token = 2, .threads = 2};
  for (const TokenWindows* calibration :
       {static_cast<const TokenWindows*>(nullptr), static_cast<const TokenWindows*>(&windows_)}) {
    try {
      convert(Checkpoint::open(dir_.path() / "nan"), spec, calibration);
      FAIL() << "took NaN";
    } catch (const FileError& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

TEST_F(Convert, ReportsProgressOfEveryPhase) {
  std::vector<std::string> phases;
  std::int64_t last_done = 0, last_all = 0;
  convert(dense(), {.partition = {.num_experts = 4}, .experts_per_token = 2, .threads = 2},
          &windows_, [&](const std::string& what, std::int64_t done, std::int64_t all) {
            if (phases.empty() || phases.back() != what) {
              EXPECT_EQ(last_done, last_all);
              phases.push_back(what);
            }
            last_done = done;
            last_all = all;
          });
  EXPECT_EQ(phases, (std::vector<std::string>{"split", "calibrate", "fit"}));
  EXPECT_EQ(last_done, last_all);
}

}  // namespace
}  // namespace cleave
