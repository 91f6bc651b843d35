#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "cleave/packed.h"
#include "ffn_setup.h"

// Layers that the suite runs in rotation.
namespace cleave::bench {

using Task = std::function<void(std::int64_t)>;

/// Layers that are run one after the other where a call takes at most a few milliseconds, as a
/// model runs them: a single call would measure how threads wake up.
inline constexpr std::int64_t kRowOfLayers = 8;
inline std::int64_t layers_in_a_row(const FfnShape& shape, std::int64_t tokens) {
  constexpr std::int64_t kShortCall = 5'000'000'000;  // multiply-adds of the dense FFN
  return 3 * tokens * shape.d_model * shape.hidden < kShortCall ? kRowOfLayers : 1;
}

/// Layers of a setup that runs eight in a row: the timed ones were not read by the call before.
inline constexpr std::int64_t kTwoRows = 2 * kRowOfLayers;

/// Runs a setup's layers in rotation on the same tokens.
class Runner {
 public:
  Runner(const FfnSetup& setup, Routing routing, const ParallelFor& parallel)
      : setup_(setup), routing_(std::move(routing)), parallel_(parallel) {
    const std::int64_t n = routing_.num_tokens * setup.shape().d_model;
    x_ = random_values(n, 4);
    y_.resize(n);
  }
  void run_layer(std::int64_t layer) {
    const std::int64_t T = routing_.num_tokens, D = setup_.shape().d_model;
    moe_ffn(setup_.layer(layer), routing_, 1.0f, {x_.data(), T, D}, {y_.data(), T, D}, workspace_,
            parallel_);
  }
  Task task() {
    return [this](std::int64_t run) {
      const std::int64_t n = layers_in_a_row(setup_.shape(), routing_.num_tokens);
      for (std::int64_t i = 0; i < n; ++i) run_layer(run * n + i);
    };
  }

 private:
  const FfnSetup& setup_;
  Routing routing_;
  ParallelFor parallel_;
  Workspace workspace_;
  std::vector<float> x_, y_;
};

/// Layers of 96 experts of 16 neurons, of which 24 are always on, as the decoder runs them: 24 of
/// 72 by a router of bfloat16, which is part of the price, and the shared ones as one slice.
class FineLayers {
 public:
  static FfnShape shape() { return {576, 1536, 96, 48, 24}; }

  FineLayers(std::int64_t T, const ParallelFor& parallel)
      : T_(T),
        parallel_(parallel),
        routed_(with_layers({576, 1152, 72, 24}), parallel),
        shared_(with_layers({576, 384, 1, 1}), parallel),
        x_(random_values(T * 576, 7)),
        y_(x_.size()),
        logits_(static_cast<std::size_t>(T * 72)) {
    const auto weights = random_values(72 * 576, 6);
    router_ = PackedLinear({weights.data(), 72, 576}, WeightType::kBF16);
  }
  /// 318 MB of bfloat16, so that the weights of few tokens come from memory.
  static constexpr std::int64_t kLayers = 60, kFewTokens = 128;
  std::int64_t layers() const { return routed_.shape().layers; }

  Task task() {
    return [this](std::int64_t run) {
      const std::int64_t n = layers_in_a_row(shape(), T_);
      for (std::int64_t i = 0; i < n; ++i) run_layer(run * n + i);
    };
  }

 private:
  FfnShape with_layers(FfnShape s) const {
    s.layers = T_ <= kFewTokens ? kLayers : kTwoRows;
    return s;
  }
  void run_layer(std::int64_t layer) {
    const MatrixView<const float> x(x_.data(), T_, 576);
    const MatrixView<float> y(y_.data(), T_, 576), logits(logits_.data(), T_, 72);
    moe_ffn({router_, {.experts_per_token = 24, .mode = GateMode::kSoftmax}, logits, routing_},
            routed_.layer(layer), 1.0f, shared_.layer(layer), x, y, workspace_, parallel_);
  }

  std::int64_t T_;
  ParallelFor parallel_;
  FfnSetup routed_, shared_;
  std::vector<float> x_, y_, logits_;
  PackedLinear router_;
  Routing routing_;
  Workspace workspace_;
};

}  // namespace cleave::bench
