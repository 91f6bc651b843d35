#include "cleave/evaluate.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "cleave/error.h"
#include "cleave/text.h"
#include "cleave/tokenizer.h"
#include "support/tiny_models.h"

namespace cleave {
namespace {

using namespace testing;

std::vector<std::int32_t> random_ids(std::int64_t n, std::int32_t vocab) {
  std::mt19937 rng(11);
  std::vector<std::int32_t> ids(n);
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(rng() % vocab);
  return ids;
}

Model tiny(const char* name) {
  return Model::load(Checkpoint::open(tiny_golden(name).directory), {.threads = 2});
}

std::vector<double> log_softmax(std::span<const float> row) {
  double sum = 0.0;
  for (const float v : row) sum += std::exp(double{v});
  std::vector<double> result;
  for (const float v : row) result.push_back(v - std::log(sum));
  return result;
}

TEST(Evaluate, MatchesPlainSumsOverTheLogits) {
  Model model = tiny("llama"), reference = tiny("llama_long");
  constexpr std::int64_t kContext = 80, kVocab = 96;  // more positions than one piece of logits
  const TokenWindows text{random_ids(2 * kContext, kVocab), kContext};
  const EvalResult result = evaluate(model, text, &reference);
  double nll = 0.0, kl = 0.0, agree = 0.0;
  for (std::int64_t w = 0; w < 2; ++w) {
    const auto ids = text.window(w);
    const std::vector<float> a = all_logits(reference, ids), b = all_logits(model, ids);
    for (std::int64_t t = 0; t + 1 < kContext; ++t) {
      const auto p = log_softmax(std::span(a).subspan(t * kVocab, kVocab));
      const auto q = log_softmax(std::span(b).subspan(t * kVocab, kVocab));
      nll -= q[ids[t + 1]];
      for (std::int64_t v = 0; v < kVocab; ++v) kl += std::exp(p[v]) * (p[v] - q[v]);
      agree += std::max_element(p.begin(), p.end()) - p.begin() ==
                       std::max_element(q.begin(), q.end()) - q.begin()
                   ? 1.0
                   : 0.0;
    }
  }
  const double positions = 2.0 * (kContext - 1);
  EXPECT_NEAR(result.mean_nll, nll / positions, 1e-5);
  EXPECT_NEAR(result.perplexity, std::exp(nll / positions), 1e-4 * result.perplexity);
  EXPECT_NEAR(result.kl, kl / positions, 1e-5);
  EXPECT_NEAR(result.top1_agreement, agree / positions, 1e-12);
  EXPECT_TRUE(result.has_reference);
  EXPECT_EQ(result.windows, 2);
  EXPECT_EQ(result.tokens, 2 * kContext);
  EXPECT_EQ(result.predicted_tokens, 2 * (kContext - 1));
  EXPECT_GT(result.tokens_per_s, 0.0);
  EXPECT_GT(result.reference_tokens_per_s, 0.0);
}

TEST(Evaluate, AModelAgreesWithItself) {
  Model model = tiny("llama"), same = tiny("llama");
  const EvalResult result = evaluate(model, {random_ids(60, 96), 30}, &same);
  EXPECT_EQ(result.kl, 0.0);
  EXPECT_EQ(result.top1_agreement, 1.0);
}

TEST(Evaluate, CountsTheLoadOfEveryExpert) {
  Model model = tiny("mixtral");
  std::vector<std::int64_t> windows_seen;
  const EvalResult result = evaluate(model, {random_ids(70, 96), 20}, nullptr,
                                     [&](std::int64_t done, std::int64_t all, double so_far) {
                                       windows_seen.push_back(done);
                                       EXPECT_EQ(all, 3);
                                       EXPECT_GT(so_far, 1.0);
                                     });
  EXPECT_EQ(windows_seen, (std::vector<std::int64_t>{1, 2, 3}));
  EXPECT_FALSE(result.has_reference);
  ASSERT_EQ(result.load.size(), 2u);
  for (const LayerLoad& load : result.load) {
    ASSERT_EQ(load.share.size(), 4u);
    EXPECT_NEAR(std::accumulate(load.share.begin(), load.share.end(), 0.0), 1.0, 1e-12);
    double entropy = 0.0;
    for (const double share : load.share) entropy -= share > 0 ? share * std::log(share) : 0.0;
    EXPECT_NEAR(load.entropy, entropy, 1e-12);
    EXPECT_GT(load.entropy, 0.0);
    EXPECT_EQ(load.active_experts, static_cast<double>(model.config().experts_per_token));
  }
  EXPECT_TRUE(evaluate(model = tiny("llama"), {random_ids(20, 96), 20}).load.at(0).share.empty());
}

TEST(Evaluate, StatesStandForTheModelsTheyCameFrom) {
  Model model = tiny("llama"), reference = tiny("llama_long");
  const TokenWindows text{random_ids(160, 96), 80};
  const EvalResult expected = evaluate(model, text, &reference);
  const HiddenStates mine = hidden_states(model, text), theirs = hidden_states(reference, text);
  for (const HiddenStates* states : {static_cast<const HiddenStates*>(nullptr), &mine}) {
    const EvalResult result = evaluate(
        model, text, {.reference = &reference, .reference_states = &theirs, .states = states});
    EXPECT_EQ(result.mean_nll, expected.mean_nll);
    EXPECT_EQ(result.kl, expected.kl);
    EXPECT_EQ(result.top1_agreement, expected.top1_agreement);
  }
  const TokenWindows other{random_ids(80, 96), 80};
  EXPECT_THROW(evaluate(model, other, {.states = &mine}), InvalidArgument);
  EXPECT_THROW(evaluate(model, other, {.reference = &reference, .reference_states = &theirs}),
               InvalidArgument);
}

TEST(Evaluate, HooksReplaceFfns) {
  Model model = tiny("mixtral"), same = tiny("mixtral");
  const TokenWindows text{random_ids(40, 96), 20};
  int routed = 0;
  ForwardHooks hooks;
  hooks.ffn = [](std::int64_t layer, MatrixView<const float>, MatrixView<float>) {
    return layer == 1;  // gives 0
  };
  hooks.routing = [&](std::int64_t layer, const Routing&) { routed += layer == 0 ? 1 : 100; };
  const EvalResult result = evaluate(model, text, {.reference = &same, .hooks = hooks});
  EXPECT_GT(result.kl, 0.0);
  EXPECT_EQ(routed, 2);  // once a window, layer 0 alone
  EXPECT_EQ(result.load.at(0).share.size(), 4u);
  EXPECT_TRUE(result.load.at(1).share.empty());
}

TEST(Evaluate, RefusesTextsAndReferencesThatDoNotFit) {
  Model model = tiny("llama");
  EXPECT_THROW(evaluate(model, {{1, 2, 96, 3}, 4}), InvalidArgument);
  EXPECT_THROW(evaluate(model, {{1, 2, 3}, 4}), InvalidArgument);
  EXPECT_THROW(evaluate(model, {{}, 0}), InvalidArgument);
}

// How the weights are kept may cost a little; a wrong scale or a swapped lane costs nats. The
// bounds are some seven times what was measured (the model is stored in bf16, which loses nothing).
TEST(Evaluate, FewerBitsStayNearTheFloats) {
  const Checkpoint checkpoint = Checkpoint::open(demo_llama_dir());
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(checkpoint);
  const std::string sample = (demo_llama_dir() / "sample.txt").string();
  const TokenWindows text = make_windows(tokenizer.encode(read_text(sample)), 128, 1024, sample);
  Model floats = Model::load(checkpoint, {.threads = 2});
  // The weights are bfloat16 as they stand; with AVX512-BF16 prompts are rounded to it as well.
  const bool rounds_rows = std::string(isa_name()) == "avx512bf16";
  const std::pair<WeightType, double> bounds[] = {{WeightType::kBF16, rounds_rows ? 1e-5 : 1e-9},
                                                  {WeightType::kF16, 1e-9},
                                                  {WeightType::kInt8, 1.5e-4},
                                                  {WeightType::kInt4, 1.5e-2}};
  for (const auto& [type, bound] : bounds) {
    Model model = Model::load(checkpoint, {.threads = 2, .weights = type});
    EXPECT_LT(model.weight_bytes(), floats.weight_bytes()) << weight_type_name(type);
    const double kl = evaluate(model, text, &floats).kl;
    EXPECT_LT(kl, bound) << weight_type_name(type);
    RecordProperty(std::string("kl_") + weight_type_name(type), fmt::format("{:.3g}", kl));
  }
}

TEST(Evaluate, RefusesAReferenceOfAnotherVocabulary) {
  CLEAVE_SKIP_WITHOUT(tinystories_dir());
  Model model = tiny("llama"), other = Model::load(Checkpoint::open(tinystories_dir()));
  EXPECT_THROW(evaluate(model, {{1, 2, 3, 4}, 4}, &other), InvalidArgument);
}

TEST(LargeEvaluate, SmolLm2PerplexityEqualsTransformers) {
  CLEAVE_SKIP_WITHOUT(smollm2_gguf());
  std::ifstream stream(source_dir() / "tests" / "golden" / "logits_smollm2.json");
  const auto golden = nlohmann::json::parse(stream);
  Model model = Model::load(Checkpoint::open(smollm2_gguf()));
  const TokenWindows text{golden.at("text").get<std::vector<std::int32_t>>(),
                          golden.at("context").get<std::int64_t>()};
  const double expected = golden.at("perplexity").get<double>();
  EXPECT_NEAR(evaluate(model, text).perplexity, expected, 1e-5 * expected);
}

}  // namespace
}  // namespace cleave
