#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "cleave/model.h"
#include "support/tiny_encoder.h"
#include "support/tiny_model.h"

namespace cleave {
namespace {

using namespace testing;

class Encoder : public ::testing::Test {
 protected:
  const Checkpoint source_ = Checkpoint::open(tiny_encoder_dir());
  const std::vector<EncoderWindow> windows_ = tiny_encoder_windows();
  Model model_ = Model::load(source_, {.threads = 2});
  const std::int64_t D_ = model_.config().hidden_size;

  std::string error_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  }
};

TEST_F(Encoder, FinalHiddenStatesEqualTransformers) {
  ASSERT_EQ(windows_.size(), 4u);
  for (const int threads : {1, 2, 5}) {
    Model model = Model::load(source_, {.threads = threads});
    for (const EncoderWindow& window : windows_) {
      const std::vector<float> hidden = hidden_of(model, window.ids);
      ASSERT_EQ(hidden.size(), window.hidden.size());
      const double bound = hidden_tolerance(model.config(), window.ids.size());
      for (std::size_t i = 0; i < hidden.size(); ++i)
        ASSERT_NEAR(hidden[i], window.hidden[i], bound)
            << threads << " threads, T = " << window.ids.size() << ", cell " << i;
    }
  }
}

// What the two tests around this one would miss if their bound were wide.
TEST_F(Encoder, AnotherGeluOrEpsilonIsOutsideTheBound) {
  const EncoderWindow& window = windows_[3];
  const double bound = hidden_tolerance(model_.config(), window.ids.size());
  const std::pair<const char*, nlohmann::json> changes[] = {{"hidden_act", "gelu_new"},
                                                            {"layer_norm_eps", 1e-12}};
  for (const auto& [key, value] : changes) {
    const TempDir dir;
    std::filesystem::copy_file(tiny_encoder_dir() / "model.safetensors",
                               dir.path() / "model.safetensors");
    nlohmann::json config;
    std::ifstream(tiny_encoder_dir() / "config.json") >> config;
    config[key] = value;
    write_text(dir.path() / "config.json", config.dump());
    Model model = Model::load(Checkpoint::open(dir.path()));
    const std::vector<float> hidden = hidden_of(model, window.ids);
    double apart = 0.0;
    for (std::size_t i = 0; i < hidden.size(); ++i)
      apart = std::max(apart, std::abs(double{hidden[i]} - window.hidden[i]));
    EXPECT_GT(apart, 4.0 * bound) << key;
  }
}

TEST_F(Encoder, FfnInputsEqualTransformers) {
  for (const EncoderWindow& window : windows_) {
    const double bound = hidden_tolerance(model_.config(), window.ids.size());
    std::int64_t layers = 0;
    ForwardHooks hooks;
    hooks.ffn_input = [&](std::int64_t l, MatrixView<const float> input) {
      ++layers;
      const float* expected = window.ffn_input.data() + l * input.rows * input.cols;
      for (std::int64_t t = 0; t < input.rows; ++t)
        for (std::int64_t d = 0; d < input.cols; ++d)
          ASSERT_NEAR(input(t, d), expected[t * input.cols + d], bound)
              << "layer " << l << ", token " << t;
    };
    hidden_of(model_, window.ids, hooks);
    EXPECT_EQ(layers, 3);
  }
}

TEST_F(Encoder, StepsEqualForward) {
  for (const EncoderWindow& window : windows_) {
    const auto T = static_cast<std::int64_t>(window.ids.size());
    std::vector<float> x(T * D_), normed(T * D_), branch(T * D_), hidden(T * D_);
    const MatrixView<float> x_view(x.data(), T, D_);
    KvCache cache(model_.config(), T + 3);
    model_.embed(window.ids, x_view);
    for (std::int64_t l = 0; l < model_.config().num_layers; ++l) {
      model_.attend(l, cache, x_view, {normed.data(), T, D_});
      ASSERT_EQ(x, normed) << "layer " << l;
      const DenseFfn ffn = model_.dense_ffn(l);
      std::fill(branch.begin(), branch.end(), 0.0f);
      dense_ffn_reference(ffn.view(), {normed.data(), T, D_}, {branch.data(), T, D_});
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += branch[i];
    }
    model_.finish(x_view, {hidden.data(), T, D_});
    const std::vector<float> whole = hidden_of(model_, window.ids);
    const double bound = hidden_tolerance(model_.config(), window.ids.size());
    for (std::size_t i = 0; i < hidden.size(); ++i) ASSERT_NEAR(hidden[i], whole[i], bound);
  }
}

TEST_F(Encoder, EveryTokenSeesTheLast) {
  std::vector<std::int32_t> ids = windows_[2].ids;
  const std::vector<float> before = hidden_of(model_, ids);
  ids.back() = (ids.back() + 1) % 64;
  const std::vector<float> after = hidden_of(model_, ids);
  for (std::size_t t = 0; t < ids.size(); ++t) {
    double change = 0.0;
    for (std::int64_t d = 0; d < D_; ++d)
      change += std::abs(after[t * D_ + d] - before[t * D_ + d]);
    EXPECT_GT(change, 1e-3) << "token " << t;
  }
}

TEST_F(Encoder, RefusesWhatAnEncoderCannotDo) {
  const std::vector<std::int32_t> ids = windows_[2].ids;
  const auto T = static_cast<std::int64_t>(ids.size());
  KvCache cache(model_.config(), 100);
  std::vector<float> hidden(100 * D_), logits(64);
  model_.forward(ids, cache, {hidden.data(), T, D_});
  EXPECT_EQ(cache.size(), T);
  EXPECT_NE(error_of([&] {
              model_.forward(ids, cache, {hidden.data(), T, D_});
            }).find("clear()"),
            std::string::npos);
  cache.clear();
  model_.forward(ids, cache, {hidden.data(), T, D_});

  KvCache* const caches[] = {&cache};
  EXPECT_NE(error_of([&] {
              model_.forward_step(std::span(ids).first(1), caches, {hidden.data(), 1, D_});
            }).find("forward_step"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              model_.logits({hidden.data(), 1, D_}, {logits.data(), 1, 64});
            }).find("no head"),
            std::string::npos);
  EXPECT_NE(error_of([&] { generate(model_, ids, {}); }).find("encoder"), std::string::npos);

  const std::vector<std::int32_t> long_ids(41, 3);
  cache.clear();
  const std::string too_long = error_of([&] {
    model_.forward(long_ids, cache, {hidden.data(), 41, D_});
  });
  EXPECT_NE(too_long.find("41 tokens; the model has positions for 40"), std::string::npos)
      << too_long;
  EXPECT_NE(error_of([&] {
              model_.embed(long_ids, {hidden.data(), 41, D_});
            }).find("for 40"),
            std::string::npos);
  const std::vector<std::int32_t> unknown = {64};
  EXPECT_THROW(model_.forward(unknown, cache, {hidden.data(), 1, D_}), InvalidArgument);
}

TEST_F(Encoder, AnEmptyWindowIsNoFault) {
  KvCache cache(model_.config(), 1);
  model_.forward({}, cache, {nullptr, 0, D_});
  EXPECT_EQ(cache.size(), 0);
}

}  // namespace
}  // namespace cleave
