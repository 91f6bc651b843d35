// Shared experts: in a layer, in the decoder, in its cache file, and as a GraniteMoeShared
// directory.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include <nlohmann/json.hpp>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/export.h"
#include "cleave/model.h"
#include "support/hand_split.h"
#include "support/paths.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using namespace testing;
namespace fs = std::filesystem;

double furthest(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double most = 0.0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    most = std::max(most, static_cast<double>(std::abs(a[i] - b[i])));
  return most;
}

TEST(SharedExperts, TheyAndAllOthersEqualTheDenseFfn) {
  const ParallelFor one_thread;
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard})
    for (const std::int64_t T : {1, 7, 64}) {
      SCOPED_TRACE(fmt::format("{} T={}", gate_mode_name(gate), T));
      const DenseFfn ffn = random_ffn({.hidden = 32, .d_model = 24});
      const MoeLayer layer =
          split_by_hand(ffn.view(), {.num_experts = 3, .experts_per_token = 3, .gate = gate});
      const std::vector<float> x = random_values(T * 24, 5);
      std::vector<float> y(x.size(), 0.5f);  // added to
      layer.forward({x.data(), T, 24}, {y.data(), T, 24}, one_thread);
      for (std::int64_t t = 0; t < T; ++t) {
        const std::vector<double> expected = ffn_in_double(ffn, x.data() + t * 24);
        for (std::int64_t c = 0; c < 24; ++c)
          ASSERT_NEAR(y[t * 24 + c], expected[c] + 0.5, 1e-5) << t << " " << c;
      }
    }
}

TEST(SharedExperts, ScaleAndRoutingDoNotTouchThem) {
  const ParallelFor one_thread;
  const DenseFfn ffn = random_ffn({.hidden = 32, .d_model = 16});
  MoeLayer layer = split_by_hand(ffn.view(), {.shared = 12, .num_experts = 4});
  const std::vector<float> x = random_values(3 * 16, 5);
  const auto run = [&] {
    std::vector<float> y(x.size());
    layer.forward({x.data(), 3, 16}, {y.data(), 3, 16}, one_thread);
    return y;
  };
  const std::vector<float> all = run();
  layer.scale = 0.0f;
  const std::vector<float> shared = run();
  const DenseFfn slice = first_neurons(ffn, 12);
  for (std::int64_t t = 0; t < 3; ++t) {
    const std::vector<double> expected = ffn_in_double(slice, x.data() + t * 16);
    for (std::int64_t c = 0; c < 16; ++c) ASSERT_NEAR(shared[t * 16 + c], expected[c], 1e-5);
  }
  EXPECT_GT(furthest(all, shared), 1e-2);
}

TEST(SharedExperts, RefusesWhatIsNoSlice) {
  const ParallelFor one_thread;
  const DenseFfn ffn = random_ffn({.hidden = 24, .d_model = 16});
  const MoeLayer good = split_by_hand(ffn.view(), {});
  const auto error_of = [&](const MoeLayer& layer) -> std::string {
    std::vector<float> x(16), y(16);
    try {
      layer.forward({x.data(), 1, 16}, {y.data(), 1, 16}, one_thread);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of(good), "");
  MoeLayer two = good;
  two.shared.begin = {0, 4, 8};
  EXPECT_NE(error_of(two).find("2 slices"), std::string::npos) << error_of(two);
  MoeLayer narrow = good;
  narrow.shared.d_model = 8;
  EXPECT_NE(error_of(narrow).find("D = 8"), std::string::npos) << error_of(narrow);
  MoeLayer biased = good;
  biased.shared.down_bias.resize(16);
  EXPECT_NE(error_of(biased).find("down_bias"), std::string::npos) << error_of(biased);
}

/// A random dense Llama, its FFNs cut by hand, and what becomes of them.
class SharedModel : public ::testing::Test {
 protected:
  SharedModel() {
    write_random_llama(dir_.path() / "dense", {});
    for (int i = 0; i < 20; ++i) ids_.push_back((i * 7 + 3) % 40);
  }
  Checkpoint dense() const { return Checkpoint::open(dir_.path() / "dense"); }
  Model load_dense() const { return Model::load(dense(), {.threads = 2}); }

  Conversion split(const HandSplit& s) const {
    const Model model = load_dense();
    Conversion conversion;
    conversion.router = "random";
    for (std::int64_t l = 0; l < model.config().num_layers; ++l) {
      HandSplit own = s;
      own.seed += static_cast<std::uint64_t>(l);
      conversion.layers.push_back(split_by_hand(model.dense_ffn(l).view(), own));
    }
    return conversion;
  }
  /// Logits with the layers in memory.
  std::vector<float> logits_with(const Conversion& conversion) const {
    Model model = load_dense();
    for (std::size_t l = 0; l < conversion.layers.size(); ++l)
      model.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
    return logits_of(model, ids_);
  }
  fs::path write(const Conversion& conversion) const {
    const fs::path out = dir_.path() / "moe";
    write_conversion(out, dense(), conversion, "{}", {.overwrite = true});
    return out;
  }
  std::vector<float> logits_from(const fs::path& directory, const ModelSpec& spec = {}) const {
    Model model = Model::load(Checkpoint::open(directory), spec);
    return logits_of(model, ids_);
  }

  TempDir dir_;
  std::vector<std::int32_t> ids_;
};

TEST_F(SharedModel, AllOnIsTheDenseModelBeforeAndAfterWriting) {
  Model model = load_dense();
  const std::vector<float> expected = logits_of(model, ids_);
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard}) {
    SCOPED_TRACE(gate_mode_name(gate));
    const Conversion all = split({.experts_per_token = 4, .gate = gate});
    EXPECT_LT(furthest(logits_with(all), expected), 1e-5);
    EXPECT_LT(furthest(logits_from(write(all)), expected), 1e-5);
  }
}

TEST_F(SharedModel, WrittenAndReopenedComputesTheSame) {
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard})
    for (const std::int64_t width : {8, 16}) {
      SCOPED_TRACE(fmt::format("{} {}", gate_mode_name(gate), width));
      const Conversion some = split({.shared = width, .gate = gate});
      const fs::path out = write(some);
      const Checkpoint reopened = Checkpoint::open(out);
      EXPECT_EQ(reopened.config().family, Family::kGraniteMoeShared);
      EXPECT_EQ(reopened.config().shared_intermediate_size, width);
      EXPECT_EQ(reopened.config().intermediate_size, (24 - width) / 4);
      EXPECT_FALSE(fs::exists(out / "model.safetensors.index.json"));
      // Stock classes know no hard gate; its stand-in is near, not equal (kHardGateEpsilon).
      EXPECT_LT(furthest(logits_from(out), logits_with(some)),
                gate == GateMode::kSoftmax ? 2e-5 : 5e-2);
    }
}

TEST_F(SharedModel, WithoutThemItIsAMixtral) {
  const fs::path out = write(split({.shared = 0}));
  EXPECT_EQ(Checkpoint::open(out).config().family, Family::kMixtral);
  EXPECT_EQ(read_all(out / "cleave.json").find("shared"), std::string::npos);
}

TEST_F(SharedModel, ItsOwnDirectoryHoldsTheTensorsOfTheFamily) {
  const Conversion some = split({});
  const fs::path out = write(some);
  const Checkpoint moe = Checkpoint::open(out);
  const ExpertBank& bank = some.layers[1].experts;
  const auto input = moe.read(GraniteMoeNames::input(1), {4, 8, 16});
  const auto output = moe.read(GraniteMoeNames::output(1), {4, 16, 4});
  for (std::int64_t e = 0; e < 4; ++e)
    for (std::int64_t j = 0; j < 4; ++j)
      for (std::int64_t c = 0; c < 16; ++c) {
        const std::int64_t row = (e * 4 + j) * 16 + c;
        ASSERT_EQ(input[(e * 8 + j) * 16 + c], bank.gate[row]);
        ASSERT_EQ(input[(e * 8 + 4 + j) * 16 + c], bank.up[row]);
        ASSERT_EQ(output[(e * 16 + c) * 4 + j], bank.down_t[row] * 2.0f);  // scale K
      }
  const auto shared_input = moe.read(GraniteMoeNames::shared_input(1), {16, 16});
  const auto shared_output = moe.read(GraniteMoeNames::shared_output(1), {16, 8});
  const ExpertBank& shared = some.layers[1].shared;
  for (std::int64_t j = 0; j < 8; ++j)
    for (std::int64_t c = 0; c < 16; ++c) {
      ASSERT_EQ(shared_input[j * 16 + c], shared.gate[j * 16 + c]);
      ASSERT_EQ(shared_input[(8 + j) * 16 + c], shared.up[j * 16 + c]);
      ASSERT_EQ(shared_output[c * 8 + j], shared.down_t[j * 16 + c]);  // not scaled
    }
  EXPECT_EQ(moe.read(GraniteMoeNames::router(1), {4, 16}), some.layers[1].router.weight);
  const auto config = nlohmann::json::parse(read_all(out / "config.json"));
  EXPECT_EQ(config["architectures"][0], "GraniteMoeSharedForCausalLM");
  EXPECT_EQ(config["attention_multiplier"], 0.5);  // head_dim 4
  for (const char* key : {"embedding_multiplier", "residual_multiplier", "logits_scaling"})
    EXPECT_EQ(config[key], 1.0) << key;
  EXPECT_EQ(config["rope_theta"], 10000.0);
  EXPECT_EQ(config["rope_parameters"]["rope_theta"], 10000.0);
}

TEST_F(SharedModel, WritesHowItWasMade) {
  const fs::path out = write(split({}));
  const auto made = read_provenance(out);
  ASSERT_TRUE(made);
  EXPECT_EQ(made->shared_width, 8);
  EXPECT_EQ(made->shared_experts, 2);  // of 4 neurons
  ASSERT_EQ(made->shared_neurons.size(), 2u);
  EXPECT_EQ(made->shared_neurons[1], (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  ASSERT_EQ(made->neuron_order[1].size(), 16u);
  EXPECT_EQ(made->neuron_order[1].front(), 8);
  EXPECT_NE(read_all(out / "README.md").find("8 shared neurons"), std::string::npos);

  const fs::path odd = write(split({.shared = 12, .num_experts = 2}));
  EXPECT_EQ(read_provenance(odd)->shared_experts, 2);
  const fs::path uneven = write(split({.shared = 9, .num_experts = 3}));
  EXPECT_EQ(read_provenance(uneven)->shared_experts, 0);  // 9 / 5
  EXPECT_EQ(read_provenance(uneven)->shared_width, 9);
}

TEST_F(SharedModel, PackedWeightsAreMappedAndCounted) {
  const fs::path out = write(split({}));
  const fs::path file = dir_.path() / "weights.packed";
  for (const WeightType type : {WeightType::kF32, WeightType::kBF16, WeightType::kInt8}) {
    SCOPED_TRACE(weight_type_name(type));
    const std::vector<float> expected = logits_from(out, {.weights = type});
    std::vector<std::string> told;
    ModelSpec spec{.weights = type, .cache = {.file = file}};
    spec.notice = [&](const std::string& line) { told.push_back(line); };
    Model first = Model::load(Checkpoint::open(out), spec);
    EXPECT_TRUE(first.cached()) << (told.empty() ? "" : told.front());
    Model second = Model::load(Checkpoint::open(out), {.weights = type, .cache = {.file = file}});
    EXPECT_EQ(logits_of(second, ids_), expected);
    EXPECT_EQ(second.weight_bytes(), first.weight_bytes());
  }
  // The same neurons, 8 of 24 of them shared or all routed: as many bytes but for panels.
  Model model = load_dense();
  const std::int64_t before = model.weight_bytes();
  for (std::int64_t l = 0; l < 2; ++l)
    model.set_moe(l, split_by_hand(model.dense_ffn(l).view(),
                                   {.shared = 16, .num_experts = 1, .experts_per_token = 1}));
  EXPECT_GE(model.weight_bytes(), before);
}

TEST_F(SharedModel, SetMoeRefusesASliceThatDoesNotFit) {
  Model model = load_dense();
  MoeLayer layer = split_by_hand(model.dense_ffn(0).view(), {});
  layer.shared.begin = {0, 4, 8};
  EXPECT_THROW(model.set_moe(0, layer), InvalidArgument);
}

TEST_F(SharedModel, RefusesWhatTheFamilyCannotHold) {
  const Checkpoint source = dense();
  const Conversion good = split({});
  const auto error_of = [&](const std::vector<MoeLayer>& layers) -> std::string {
    try {
      granite_moe_shared_tensors(source, layers);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of(good.layers), "");
  const auto expect = [&](const std::vector<MoeLayer>& layers, const char* part) {
    EXPECT_NE(error_of(layers).find(part), std::string::npos) << error_of(layers);
  };
  auto broken = good.layers;
  broken[1] = split({.shared = 0}).layers[1];
  expect(broken, "layer 1 differs");
  broken = good.layers;
  broken[0].shared.gate.clear();
  expect(broken, "shared experts have no gate");
  broken = good.layers;
  broken[1].shared.up_bias.resize(8);
  expect(broken, "biases");
  broken.pop_back();
  expect(broken, "1 layers given");
  EXPECT_THROW(mixtral_tensors(source, good.layers), InvalidArgument);

  const auto tensors = granite_moe_shared_tensors(source, good.layers);
  Provenance provenance;
  const fs::path out = dir_.path() / "bad";
  EXPECT_THROW(write_granite_moe_shared(out, source, {4, 5, 4, 8}, tensors, provenance, {}),
               InvalidArgument);
  EXPECT_THROW(write_granite_moe_shared(out, source, {4, 2, 4, 9}, tensors, provenance, {}),
               InvalidArgument);
  EXPECT_FALSE(fs::exists(out));
}

TEST_F(SharedModel, RefusesAttentionThatTheFamilyLacks) {
  const auto rewrite = [&](const char* key, const nlohmann::json& value) {
    const fs::path file = dir_.path() / "dense" / "config.json";
    auto config = nlohmann::json::parse(read_all(file));
    config["model_type"] = "mistral";
    config["architectures"] = {"MistralForCausalLM"};
    config[key] = value;
    std::ofstream(file) << config.dump();
  };
  const Conversion good = split({});
  rewrite("sliding_window", 16);
  EXPECT_THROW(granite_moe_shared_tensors(dense(), good.layers), InvalidArgument);
  rewrite("sliding_window", 128);  // as long as the longest text: it does nothing
  EXPECT_NO_THROW(granite_moe_shared_tensors(dense(), good.layers));
  EXPECT_EQ(Checkpoint::open(write(good)).config().sliding_window, 0);
}

TEST_F(SharedModel, RoundsNothingUnasked) {
  Conversion some = split({});
  ModelConfig config = dense().config();
  config.dtype = DType::kBF16;
  EXPECT_EQ(default_write_dtype(config, some.layers), DType::kF32);  // its weights are float32's
  for (MoeLayer& layer : some.layers)
    for (ExpertBank* bank : {&layer.experts, &layer.shared})
      for (auto* matrix : {&bank->gate, &bank->up, &bank->down_t})
        for (float& value : *matrix) value = std::round(value * 16.0f) / 16.0f;
  EXPECT_EQ(default_write_dtype(config, some.layers), DType::kBF16);
  some.layers[1].shared.down_t[3] = 1.001f;
  EXPECT_EQ(default_write_dtype(config, some.layers), DType::kF32);
  some.layers[1].shared.down_t[3] = 1.0f;
  some.layers[1].scale = 3.0f;
  EXPECT_EQ(default_write_dtype(config, some.layers), DType::kF32);
}

/// Static pruning: the same model with narrower FFNs.
class PrunedModel : public SharedModel {
 protected:
  /// The first H' neurons of each layer, and a constant for those that are gone.
  std::vector<DenseFfn> keep(std::int64_t hidden, bool bias) const {
    const Model model = load_dense();
    std::vector<DenseFfn> ffns;
    for (std::int64_t l = 0; l < model.config().num_layers; ++l) {
      ffns.push_back(first_neurons(model.dense_ffn(l), hidden));
      if (bias) ffns.back().down_bias = random_values(16, 30 + static_cast<std::uint64_t>(l));
    }
    return ffns;
  }
  fs::path write_pruned(const std::vector<DenseFfn>& ffns, const WriteSpec& spec = {}) const {
    Provenance made;
    made.source = "dense";
    made.source_sha256 = dense().sha256();
    made.partition = "first";
    made.router = "none";
    for (const DenseFfn& ffn : ffns) {
      made.neuron_order.emplace_back();
      for (std::int64_t j = 0; j < ffn.hidden; ++j)
        made.neuron_order.back().push_back(static_cast<std::int32_t>(j));
    }
    const fs::path out = dir_.path() / "pruned";
    WriteSpec replacing = spec;
    replacing.overwrite = true;
    write_llama_dense(out, dense(), ffns, made, replacing);
    return out;
  }
};

TEST_F(PrunedModel, WrittenAndReopenedComputesTheSame) {
  for (const bool bias : {false, true}) {
    SCOPED_TRACE(bias);
    const std::vector<DenseFfn> ffns = keep(10, bias);
    const fs::path out = write_pruned(ffns);
    const Checkpoint pruned = Checkpoint::open(out);
    EXPECT_EQ(pruned.config().family, Family::kLlama);
    EXPECT_EQ(pruned.config().intermediate_size, 10);
    EXPECT_EQ(pruned.config().mlp_bias, bias);
    // The same in memory: the kept neurons as one expert that is always on.
    Model model = load_dense();
    for (std::int64_t l = 0; l < 2; ++l) {
      MoeLayer one = split_by_hand(ffns[static_cast<std::size_t>(l)].view(),
                                   {.shared = 0, .num_experts = 1, .experts_per_token = 1});
      one.experts.down_bias = ffns[static_cast<std::size_t>(l)].down_bias;
      model.set_moe(l, one);
    }
    EXPECT_LT(furthest(logits_from(out), logits_of(model, ids_)), 2e-5);
    const auto made = read_provenance(out);
    ASSERT_TRUE(made);
    EXPECT_EQ(made->num_experts, 0);
    EXPECT_EQ(made->neuron_order[1].size(), 10u);
    EXPECT_EQ(read_all(out / "README.md").find("expert"), std::string::npos);
  }
}

TEST_F(PrunedModel, AllNeuronsAreTheSource) {
  Model model = load_dense();
  EXPECT_EQ(logits_from(write_pruned(keep(24, false))), logits_of(model, ids_));
}

TEST_F(PrunedModel, OneBiasMakesTheOthersZero) {
  std::vector<DenseFfn> ffns = keep(10, false);
  ffns[1].down_bias.assign(16, 0.25f);
  const Checkpoint pruned = Checkpoint::open(write_pruned(ffns));
  EXPECT_EQ(pruned.read("model.layers.0.mlp.down_proj.bias", {16}), std::vector<float>(16));
  EXPECT_EQ(pruned.read("model.layers.1.mlp.down_proj.bias", {16}), std::vector<float>(16, 0.25f));
  EXPECT_EQ(pruned.read("model.layers.1.mlp.gate_proj.bias", {10}), std::vector<float>(10));
}

TEST_F(PrunedModel, ATiedHeadStaysTiedAndTheTypeStaysWhereNothingIsRounded) {
  // The bundled model is tied; its weights are kept, so they are values of its own type.
  const Checkpoint source = Checkpoint::open(demo_llama_dir());
  const Model model = Model::load(source);
  std::vector<DenseFfn> ffns;
  for (std::int64_t l = 0; l < source.config().num_layers; ++l)
    ffns.push_back(first_neurons(model.dense_ffn(l), 48));
  const fs::path out = dir_.path() / "demo";
  write_llama_dense(out, source, ffns, {}, {});
  EXPECT_EQ(Checkpoint::open(out).config().dtype, source.config().dtype);
  EXPECT_EQ(Checkpoint::open(out).config().tie_word_embeddings,
            source.config().tie_word_embeddings);
  ffns[0].down[5] = 0.1f;  // no value of bfloat16 or float16
  write_llama_dense(out, source, ffns, {}, {.overwrite = true});
  EXPECT_EQ(Checkpoint::open(out).config().dtype, DType::kF32);
}

TEST_F(PrunedModel, RefusesWhatLlamaCannotHold) {
  const std::vector<DenseFfn> good = keep(10, true);
  const auto error_of = [&](const std::vector<DenseFfn>& ffns) -> std::string {
    try {
      write_pruned(ffns);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  const auto expect = [&](const std::vector<DenseFfn>& ffns, const char* part) {
    EXPECT_NE(error_of(ffns).find(part), std::string::npos) << error_of(ffns);
  };
  auto broken = good;
  broken[1] = keep(9, true)[1];
  expect(broken, "layer 1 has 9 neurons");
  broken = good;
  broken[1].activation = Activation::kGelu;
  expect(broken, "activation gelu");
  broken = good;
  broken[0].gate.clear();
  expect(broken, "gate has 0 values");
  broken = good;
  broken[1].down_bias.resize(3);
  expect(broken, "down_bias has 3 values");
  broken = good;
  broken[0].down[7] = std::numeric_limits<float>::quiet_NaN();
  expect(broken, "down_proj.weight");
  broken = good;
  broken.pop_back();
  expect(broken, "1 FFNs given");
  EXPECT_FALSE(fs::exists(dir_.path() / "pruned"));
}

}  // namespace
}  // namespace cleave
