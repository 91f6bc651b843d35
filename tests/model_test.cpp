#include "cleave/model.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "support/paths.h"
#include "support/tiny_models.h"

namespace cleave {
namespace {

using namespace testing;

// Transformers' float32 logits (scripts/golden/make_logits_golden.py); the bound is what the
// project promises for every model.
constexpr double kLogitTolerance = 2e-4;

class TinyModel : public ::testing::TestWithParam<const char*> {
 protected:
  const TinyGolden golden_ = tiny_golden(GetParam());
};

TEST_P(TinyModel, LogitsEqualTransformers) {
  Model model = Model::load(Checkpoint::open(golden_.directory), {.threads = 2});
  const std::vector<float> logits = all_logits(model, golden_.ids);
  ASSERT_EQ(logits.size(), golden_.logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i)
    ASSERT_NEAR(logits[i], golden_.logits[i], kLogitTolerance)
        << "position " << i / model.config().vocab_size;
}

TEST_P(TinyModel, PiecesAndSingleTokensEqualTheWhole) {
  Model model = Model::load(Checkpoint::open(golden_.directory), {.threads = 2});
  const std::vector<float> whole = all_logits(model, golden_.ids);
  for (const std::size_t piece : {1, 5, 13}) {
    const std::vector<float> pieces = all_logits(model, golden_.ids, piece);
    for (std::size_t i = 0; i < whole.size(); ++i)
      ASSERT_NEAR(pieces[i], whole[i], 1e-4)
          << "pieces of " << piece << ", position " << i / model.config().vocab_size;
  }
}

/// Sequences of different lengths take steps together, one after the other of them has begun.
TEST_P(TinyModel, StepsOfSeveralSequencesEqualEachAlone) {
  Model model = Model::load(Checkpoint::open(golden_.directory), {.threads = 2});
  const std::int64_t D = model.config().hidden_size, V = model.config().vocab_size;
  constexpr std::int64_t kSteps = 6;
  const std::int64_t started[] = {0, 3, 1};  // tokens of each sequence before the first step
  std::vector<KvCache> caches(3, KvCache(model.config(), 3 + kSteps));
  std::vector<KvCache*> all;
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<float> room(3 * D);
  for (std::int64_t b = 0; b < 3; ++b) {
    const auto first = golden_.ids.begin() + 2 * b;
    ids.emplace_back(first, first + started[b] + kSteps);
    all.push_back(&caches[b]);
    model.forward(std::span(ids[b]).first(started[b]), caches[b], {room.data(), started[b], D});
  }
  std::vector<std::vector<float>> alone;
  for (const auto& sequence : ids) alone.push_back(all_logits(model, sequence));
  std::vector<float> hidden(3 * D), logits(3 * V);
  for (std::int64_t step = 0; step < kSteps; ++step) {
    std::vector<std::int32_t> tokens;
    for (std::int64_t b = 0; b < 3; ++b) tokens.push_back(ids[b][started[b] + step]);
    model.forward_step(tokens, all, {hidden.data(), 3, D});
    model.logits({hidden.data(), 3, D}, {logits.data(), 3, V});
    for (std::int64_t b = 0; b < 3; ++b)
      for (std::int64_t v = 0; v < V; ++v)
        ASSERT_NEAR(logits[b * V + v], alone[b][(started[b] + step) * V + v], 1e-4)
            << "sequence " << b << ", step " << step;
  }
  EXPECT_EQ(caches[1].size(), 3 + kSteps);
}

TEST_P(TinyModel, TheSameCallGivesTheSameBits) {
  Model first = Model::load(Checkpoint::open(golden_.directory), {.threads = 2});
  Model second = Model::load(Checkpoint::open(golden_.directory), {.threads = 2});
  EXPECT_EQ(all_logits(first, golden_.ids), all_logits(second, golden_.ids));
}

INSTANTIATE_TEST_SUITE_P(Families, TinyModel,
                         ::testing::Values("llama", "llama_long", "mixtral", "granitemoeshared"),
                         [](const auto& info) { return std::string(info.param); });

void expect_golden_subset(const std::filesystem::path& model_path, const char* file) {
  std::ifstream stream(source_dir() / "tests" / "golden" / file);
  const auto golden = nlohmann::json::parse(stream);
  Model model = Model::load(Checkpoint::open(model_path));
  const auto ids = golden.at("ids").get<std::vector<std::int32_t>>();
  const std::vector<float> logits = all_logits(model, ids);
  for (std::size_t p = 0; p < golden.at("positions").size(); ++p)
    for (std::size_t c = 0; c < golden.at("columns").size(); ++c) {
      const auto position = golden["positions"][p].get<std::int64_t>();
      const auto column = golden["columns"][c].get<std::int64_t>();
      ASSERT_NEAR(logits[position * model.config().vocab_size + column],
                  golden["logits"][p][c].get<double>(), kLogitTolerance)
          << "position " << position << " token " << column;
    }
}

TEST(RealModel, TinyStoriesLogitsEqualTransformers) {
  CLEAVE_SKIP_WITHOUT(tinystories_dir());
  expect_golden_subset(tinystories_dir(), "logits_tinystories.json");
}

TEST(LargeModel, SmolLm2LogitsEqualTransformers) {
  CLEAVE_SKIP_WITHOUT(smollm2_gguf());
  expect_golden_subset(smollm2_gguf(), "logits_smollm2.json");
}

// A dense FFN as one layer of E equal slices, all of them on.
MoeLayer all_on(const FfnView& ffn, std::int64_t E) {
  MoeLayer layer;
  ExpertBank& bank = layer.experts;
  const std::int64_t H = ffn.up.rows, D = ffn.up.cols;
  bank.d_model = D;
  bank.dense_hidden = H;
  bank.activation = ffn.activation;
  bank.gate.assign(ffn.gate.data, ffn.gate.data + H * D);
  bank.up.assign(ffn.up.data, ffn.up.data + H * D);
  bank.gate_bias.assign(ffn.gate_bias.begin(), ffn.gate_bias.end());
  bank.up_bias.assign(ffn.up_bias.begin(), ffn.up_bias.end());
  bank.down_bias.assign(ffn.down_bias.begin(), ffn.down_bias.end());
  for (std::int64_t e = 0; e <= E; ++e) bank.begin.push_back(e * H / E);
  for (std::int64_t j = 0; j < H; ++j) {
    bank.neuron_order.push_back(static_cast<std::int32_t>(j));
    for (std::int64_t c = 0; c < D; ++c) bank.down_t.push_back(ffn.down(c, j));
  }
  layer.router = {E, D, std::vector<float>(E * D, 0.0f)};
  layer.experts_per_token = E;
  layer.scale = static_cast<float>(E);
  return layer;
}

TEST(Model, ALayerOfAllExpertsEqualsTheDenseOne) {
  const TinyGolden golden = tiny_golden("llama_long");
  Model model = Model::load(Checkpoint::open(golden.directory), {.threads = 2});
  const std::vector<float> dense = all_logits(model, golden.ids);
  EXPECT_EQ(model.num_experts(0), 0);
  for (std::int64_t l = 0; l < model.config().num_layers; ++l)
    model.set_moe(l, all_on(model.dense_ffn(l).view(), 4));
  ASSERT_EQ(model.num_experts(1), 4);
  EXPECT_THROW(model.dense_ffn(1), InvalidArgument);
  const std::vector<float> routed = all_logits(model, golden.ids);
  for (std::size_t i = 0; i < dense.size(); ++i) ASSERT_NEAR(routed[i], dense[i], 1e-4);
}

TEST(Model, HooksSeeEveryLayer) {
  const TinyGolden golden = tiny_golden("mixtral");
  Model model = Model::load(Checkpoint::open(golden.directory));
  KvCache cache(model.config(), 8);
  std::vector<float> hidden(3 * model.config().hidden_size);
  std::vector<std::int64_t> inputs, routings;
  ForwardHooks hooks;
  hooks.ffn_input = [&](std::int64_t layer, MatrixView<const float> input) {
    inputs.push_back(layer);
    EXPECT_EQ(input.rows, 3);
    EXPECT_EQ(input.cols, model.config().hidden_size);
  };
  hooks.routing = [&](std::int64_t layer, const Routing& routing) {
    routings.push_back(layer);
    EXPECT_EQ(routing.ids.size(), 3u * model.config().experts_per_token);
  };
  model.forward(std::span(golden.ids).first(3), cache,
                {hidden.data(), 3, model.config().hidden_size}, hooks);
  EXPECT_EQ(inputs, (std::vector<std::int64_t>{0, 1}));
  EXPECT_EQ(routings, inputs);
  EXPECT_EQ(cache.size(), 3);
}

TEST(Model, RouterThresholdTakesExpertsAway) {
  const TinyGolden golden = tiny_golden("mixtral");
  const Checkpoint checkpoint = Checkpoint::open(golden.directory);
  const auto pairs = [&](float threshold, std::vector<float>& logits) {
    Model model = Model::load(checkpoint, {.threads = 2, .router_threshold = threshold});
    KvCache cache(model.config(), static_cast<std::int64_t>(golden.ids.size()));
    const auto T = static_cast<std::int64_t>(golden.ids.size());
    std::vector<float> hidden(T * model.config().hidden_size);
    std::int64_t used = 0;
    ForwardHooks hooks;
    hooks.routing = [&](std::int64_t, const Routing& routing) {
      used += std::count_if(routing.ids.begin(), routing.ids.end(),
                            [](std::int32_t id) { return id != Routing::kUnused; });
    };
    model.forward(golden.ids, cache, {hidden.data(), T, model.config().hidden_size}, hooks);
    logits = all_logits(model, golden.ids);
    return used;
  };
  const ModelConfig& c = checkpoint.config();
  std::vector<float> plain, some, one;
  const auto tokens = static_cast<std::int64_t>(golden.ids.size());
  EXPECT_EQ(pairs(0.0f, plain), tokens * c.num_layers * c.experts_per_token);
  const std::int64_t used = pairs(0.8f, some);
  EXPECT_LT(used, tokens * c.num_layers * c.experts_per_token);
  EXPECT_GT(used, tokens * c.num_layers);
  EXPECT_EQ(pairs(1.0f, one), tokens * c.num_layers);
  EXPECT_NE(plain, some);
  EXPECT_NE(some, one);
}

TEST(Model, RefusesARouterThresholdThatMakesNoSense) {
  const Checkpoint moe = Checkpoint::open(tiny_golden("mixtral").directory);
  EXPECT_THROW(Model::load(moe, {.router_threshold = 1.5f}), InvalidArgument);
  EXPECT_THROW(Model::load(moe, {.router_threshold = -0.5f}), InvalidArgument);
  EXPECT_THROW(
      Model::load(Checkpoint::open(tiny_golden("llama").directory), {.router_threshold = 0.5f}),
      InvalidArgument);
}

TEST(Model, RefusesWhatDoesNotFit) {
  Model model = Model::load(Checkpoint::open(tiny_golden("llama").directory));
  const std::int64_t D = model.config().hidden_size;
  std::vector<float> hidden(3 * D), logits(96);
  KvCache cache(model.config(), 2);
  const std::vector<std::int32_t> three = {1, 2, 3}, wrong = {96}, negative = {-1};
  EXPECT_THROW(model.forward(three, cache, {hidden.data(), 3, D}), InvalidArgument);
  EXPECT_THROW(model.forward(wrong, cache, {hidden.data(), 1, D}), InvalidArgument);
  EXPECT_THROW(model.forward(negative, cache, {hidden.data(), 1, D}), InvalidArgument);
  EXPECT_THROW(model.forward(std::span(three).first(2), cache, {hidden.data(), 1, D}),
               InvalidArgument);
  EXPECT_EQ(cache.size(), 0);
  EXPECT_THROW(model.logits({hidden.data(), 1, D}, {logits.data(), 1, 95}), InvalidArgument);
  EXPECT_THROW(model.dense_ffn(2), InvalidArgument);
  EXPECT_THROW(model.set_moe(0, MoeLayer()), InvalidArgument);
  EXPECT_THROW(KvCache(model.config(), 0), InvalidArgument);
}

TEST(Model, RefusesStepsThatDoNotFit) {
  Model model = Model::load(Checkpoint::open(tiny_golden("llama").directory));
  const std::int64_t D = model.config().hidden_size;
  KvCache a(model.config(), 1), b(model.config(), 2);
  std::vector<float> hidden(2 * D);
  const std::vector<std::int32_t> tokens = {1, 2};
  std::vector<KvCache*> same = {&b, &b}, one = {&b}, both = {&a, &b};
  const MatrixView<float> out(hidden.data(), 2, D);
  EXPECT_THROW(model.forward_step(tokens, same, out), InvalidArgument);
  EXPECT_THROW(model.forward_step(tokens, one, out), InvalidArgument);
  model.forward_step(tokens, both, out);
  EXPECT_THROW(model.forward_step(tokens, both, out), InvalidArgument);  // `a` is full
  EXPECT_EQ(b.size(), 1);
}

TEST(Model, AMissingTensorIsNamed) {
  const TempDir copy;
  const auto source = tiny_golden("llama").directory;
  std::filesystem::copy(source / "config.json", copy.path() / "config.json");
  std::ifstream stream(source / "model.safetensors", std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const std::size_t place = bytes.find(name);
  ASSERT_NE(place, std::string::npos);
  bytes[place + name.size() - 1] = 'X';  // the header keeps its length
  std::ofstream(copy.path() / "model.safetensors", std::ios::binary) << bytes;
  try {
    Model::load(Checkpoint::open(copy.path()));
    FAIL() << "loaded without a tensor";
  } catch (const FileError& error) {
    EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace cleave
