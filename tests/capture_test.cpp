#include "capture.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "cleave/error.h"
#include "support/random.h"

namespace cleave {
namespace {

/// Tokens of `kinds` kinds, each of which makes its own block of neurons fire; and neurons that
/// fire always. Neurons are shuffled, so that no block is contiguous.
struct PlantedLayer {
  std::int64_t kinds = 8, width = 4, always = 8, d_model = 16, num_tokens = 1200;
  std::vector<float> input, hidden, weight, down_square;
  std::vector<std::int32_t> block_of;  // [H], kinds: always on

  PlantedLayer() {
    std::mt19937_64 rng(7);
    const std::int64_t H = kinds * width + always;
    for (std::int64_t j = 0; j < H; ++j)
      block_of.push_back(static_cast<std::int32_t>(std::min(j / width, kinds)));
    shuffle(block_of, rng);
    std::vector<float> centre(kinds * d_model);
    for (float& c : centre) c = static_cast<float>(normal_draw(rng));
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      const std::int64_t kind = t % kinds, second = (t / kinds) % kinds;
      for (std::int64_t d = 0; d < d_model; ++d)
        input.push_back(centre[kind * d_model + d] + centre[second * d_model + d] +
                        0.1f * static_cast<float>(normal_draw(rng)));
      for (std::int64_t j = 0; j < H; ++j) {
        const bool on = block_of[j] == kind || block_of[j] == second || block_of[j] == kinds;
        hidden.push_back(static_cast<float>((on ? 1.0 : 0.05) * normal_draw(rng)));
      }
    }
    weight.assign(num_tokens, 1.0f);
    down_square.assign(H, 1.0f);
  }
  LayerTokens tokens() const {
    const auto H = static_cast<std::int64_t>(block_of.size());
    return {
        {input.data(), num_tokens, d_model}, {hidden.data(), num_tokens, H}, weight, down_square};
  }
  CaptureSpec spec() const {
    CaptureSpec spec;
    spec.width = width;
    spec.shared = always;
    spec.experts = kinds;
    spec.active = 2;
    spec.training.batch = 256;
    return spec;
  }
};

TEST(Capture, FindsPlantedBlocksAndWhoIsAlwaysOn) {
  const PlantedLayer layer;
  const Capture capture = capture_energy(layer.tokens(), layer.spec(), {});
  std::vector<std::set<std::int32_t>> blocks(layer.kinds);
  for (std::size_t j = 0; j < layer.block_of.size(); ++j) {
    const std::int32_t e = capture.partition.expert_of_neuron[j];
    if (layer.block_of[j] == layer.kinds)
      EXPECT_EQ(e, NeuronPartition::kShared) << j;
    else if (e >= 0)
      blocks[e].insert(layer.block_of[j]);
  }
  for (const auto& block : blocks) EXPECT_EQ(block.size(), 1u);  // no expert mixes two blocks
  EXPECT_GT(capture.recall, 0.9);
  EXPECT_GT(capture.energy, 0.97);
  EXPECT_LE(capture.energy, capture.oracle_energy + 1e-9);
}

TEST(Capture, EveryExpertGetsItsWidth) {
  const PlantedLayer layer;
  CaptureSpec spec = layer.spec();
  spec.shared = 4;
  spec.experts = 9;
  spec.active = 3;
  const Capture capture = capture_energy(layer.tokens(), spec, {});
  std::vector<std::int64_t> size(9, 0);
  std::int64_t shared = 0;
  for (const std::int32_t e : capture.partition.expert_of_neuron) ++(e < 0 ? shared : size[e]);
  EXPECT_EQ(shared, 4);
  for (const std::int64_t n : size) EXPECT_EQ(n, 4);
}

TEST(Capture, TheSameSeedGivesTheSameSplit) {
  const PlantedLayer layer;
  const Capture a = capture_energy(layer.tokens(), layer.spec(), {});
  const Capture b = capture_energy(layer.tokens(), layer.spec(), {});
  EXPECT_EQ(a.partition.expert_of_neuron, b.partition.expert_of_neuron);
  EXPECT_EQ(a.router.weight, b.router.weight);
}

TEST(Capture, StaticKeepsTheMostEnergy) {
  const PlantedLayer layer;
  const Capture capture = keep_highest(layer.tokens(), layer.always, StaticScore::kEnergy, {});
  for (std::size_t j = 0; j < layer.block_of.size(); ++j)
    EXPECT_EQ(capture.partition.expert_of_neuron[j], layer.block_of[j] == layer.kinds
                                                         ? NeuronPartition::kShared
                                                         : NeuronPartition::kDropped);
}

// A neuron that gives the same to every token has energy and no fluctuation.
TEST(Capture, FluctuationIsTheEnergyWithoutThatOfTheMean) {
  const std::int64_t T = 50, H = 3;
  std::vector<float> hidden, weight, square = {1.0f, 4.0f, 1.0f};
  for (std::int64_t t = 0; t < T; ++t) {
    const float sign = t % 2 == 0 ? 1.0f : -1.0f;
    hidden.insert(hidden.end(), {3.0f, 1.0f + 0.5f * sign, 1.2f * sign});
    weight.push_back(t % 3 == 0 ? 2.0f : 1.0f);
  }
  const LayerTokens tokens{
      .input = {}, .hidden = {hidden.data(), T, H}, .weight = weight, .down_square = square};
  const auto kept = [&](std::int64_t count, StaticScore score) {
    return keep_highest(tokens, count, score, {}).partition.expert_of_neuron;
  };
  constexpr std::int32_t kOn = NeuronPartition::kShared, kOff = NeuronPartition::kDropped;
  using Ids = std::vector<std::int32_t>;
  EXPECT_EQ(kept(1, StaticScore::kEnergy), (Ids{kOn, kOff, kOff}));       // 9, 5, 1.44
  EXPECT_EQ(kept(1, StaticScore::kFluctuation), (Ids{kOff, kOff, kOn}));  // 0, 1, 1.44
  EXPECT_EQ(kept(2, StaticScore::kFluctuation), (Ids{kOff, kOn, kOn}));
}

TEST(Capture, RefusesShapesThatDoNotAddUp) {
  const PlantedLayer layer;
  CaptureSpec spec = layer.spec();
  spec.shared = 7;
  EXPECT_THROW(capture_energy(layer.tokens(), spec, {}), InvalidArgument);
  spec = layer.spec();
  spec.active = 9;
  EXPECT_THROW(capture_energy(layer.tokens(), spec, {}), InvalidArgument);
}

double collected(const PlantedLayer& layer, const std::vector<float>& gain,
                 const LinearRouter& router, std::int64_t k) {
  const auto ids = choose_experts(layer.tokens().input, router, k, {});
  double sum = 0.0;
  for (std::int64_t t = 0; t < layer.num_tokens; ++t)
    for (std::int64_t i = 0; i < k; ++i) sum += gain[t * layer.kinds + ids[t * k + i]];
  return sum;
}

TEST(TrainRouter, CollectsMoreThanItsStart) {
  const PlantedLayer layer;
  const std::int64_t E = layer.kinds, D = layer.d_model;
  // Kind 0 pays ten times as much: what counts is the gain, not how often an expert is best.
  std::vector<float> gain(layer.num_tokens * E, 0.0f);
  for (std::int64_t t = 0; t < layer.num_tokens; ++t)
    for (const std::int64_t kind : {t % E, (t / E) % E})
      gain[t * E + kind] = kind == 0 ? 10.0f : 1.0f;
  const LinearRouter start = random_router(E, D, 3);
  RouterTrainSpec spec;
  spec.batch = 256;
  const LinearRouter trained =
      train_router(layer.tokens().input, {gain.data(), layer.num_tokens, E}, 2, start, spec, {});
  const double before = collected(layer, gain, start, 2),
               after = collected(layer, gain, trained, 2);
  const double best = std::accumulate(gain.begin(), gain.end(), 0.0);
  EXPECT_LT(before, 0.6 * best);
  EXPECT_GT(after, 0.97 * best);
}

TEST(TrainRouter, LeavesARouterAloneThatChoosesAll) {
  const PlantedLayer layer;
  const std::vector<float> gain(layer.num_tokens * layer.kinds, 1.0f);
  const LinearRouter start = random_router(layer.kinds, layer.d_model, 3);
  const MatrixView<const float> gains(gain.data(), layer.num_tokens, layer.kinds);
  EXPECT_EQ(train_router(layer.tokens().input, gains, layer.kinds, start, {}, {}).weight,
            start.weight);
}

TEST(TrainRouter, RefusesBadInput) {
  const PlantedLayer layer;
  std::vector<float> gain(layer.num_tokens * layer.kinds, 1.0f);
  const MatrixView<const float> gains(gain.data(), layer.num_tokens, layer.kinds);
  const LinearRouter start = random_router(layer.kinds, layer.d_model, 3);
  const auto input = layer.tokens().input;
  EXPECT_THROW(train_router(input, gains, 0, start, {}, {}), InvalidArgument);
  EXPECT_THROW(train_router(input, gains, 2, random_router(3, 16, 1), {}, {}), InvalidArgument);
  EXPECT_THROW(train_router(input, gains, 2, start, {.batch = 0}, {}), InvalidArgument);
  gain[5] = NAN;
  EXPECT_THROW(train_router(input, gains, 2, start, {}, {}), InvalidArgument);
}

}  // namespace
}  // namespace cleave
