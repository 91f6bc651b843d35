#pragma once

#include <cstdint>
#include <filesystem>
#include <iterator>
#include <span>
#include <vector>

#include "attention.h"
#include "cleave/model.h"
#include "decoder_weights.h"
#include "fail.h"
#include "support/thread_pool.h"

// What a Model is made of.
namespace cleave {

inline KvLayout kv_layout(const ModelConfig& config, std::int64_t capacity) {
  return {config.num_kv_heads, config.head_dim, capacity};
}

/// What a forward pass of T tokens writes beside its result. Lives in a workspace.
struct ForwardRoom {
  ForwardRoom(const ModelConfig& c, std::int64_t T, Workspace& workspace) {
    const std::int64_t D = c.hidden_size, queries = c.num_heads * c.head_dim;
    const std::int64_t qkv_width = queries + 2 * c.num_kv_heads * c.head_dim;
    const std::int64_t sizes[] = {
        T * D, T * D, T * D, T * qkv_width, T * queries, T * c.head_dim / 2, T * c.head_dim / 2};
    std::int64_t begin[std::size(sizes) + 1] = {};
    for (std::size_t i = 0; i < std::size(sizes); ++i)
      begin[i + 1] = begin[i] + (sizes[i] + 15) / 16 * 16;  // whole cache lines
    auto* memory = reinterpret_cast<float*>(
        workspace.get(static_cast<std::size_t>(begin[std::size(sizes)]) * sizeof(float)));
    x = {memory + begin[0], T, D};
    normed = c.norm_place == NormPlace::kAfter ? x : MatrixView<float>(memory + begin[1], T, D);
    branch = {memory + begin[2], T, D};
    qkv = {memory + begin[3], T, qkv_width};
    context = {memory + begin[4], T, queries};
    cosine = {memory + begin[5], T, c.head_dim / 2};
    sine = {memory + begin[6], T, c.head_dim / 2};
  }
  /// The part of some tokens.
  ForwardRoom rows(std::int64_t first, std::int64_t count) const {
    ForwardRoom some = *this;
    for (MatrixView<float>* view :
         {&some.x, &some.normed, &some.branch, &some.qkv, &some.context, &some.cosine, &some.sine})
      *view = view->slice_rows(first, count);
    return some;
  }
  MatrixView<float> x, normed;     // [T, D] the residual stream, and its norm: the same memory
                                   // where the norm takes its place (NormPlace::kAfter)
  MatrixView<float> branch;        // [T, D] of the FFN
  MatrixView<float> qkv, context;  // [T, query and key/value heads], [T, query heads]
  MatrixView<float> cosine, sine;  // [T, head_dim / 2] of each token's position
};

struct Model::Impl {
  Impl(const Checkpoint& checkpoint, const ModelSpec& spec);

  std::int64_t query_width() const { return config.num_heads * config.head_dim; }
  std::int64_t kv_width() const { return config.num_kv_heads * config.head_dim; }

  /// y[t] = norm(x[t]); may be the same.
  void norm(MatrixView<const float> x, const NormWeights& weights, MatrixView<float> y);
  /// y[t] += x[t].
  void add(MatrixView<const float> x, MatrixView<float> y);

  /// Rows of a pass that go on with one sequence, in one layer.
  struct Sequence {
    std::int64_t rows, position;
    KvLayout layout;
    float* cache;
  };
  /// room.x += attention(room.normed), and the layer's part of the caches is filled. The sequences'
  /// rows follow each other.
  void attend(const LayerWeights& w, const ForwardRoom& room, std::span<const Sequence> sequences);
  /// room.x [T, D] through all layers and the final norm: hidden [T, D].
  /// @param attend  (layer, weights): room.x += attention(room.normed)
  template <class Attend>
  void run_layers(const ForwardRoom& room, const ForwardHooks& hooks, MatrixView<float> hidden,
                  const Attend& attend);
  /// y += the layer's experts, shared ones included, on `normed`; `routing` tells which.
  void run_experts(const PackedMoe& moe, float threshold, MatrixView<const float> normed,
                   MatrixView<float> y);
  /// Hard gates are written as a softmax of nearly equal logits (kHardGateEpsilon): 1 / K each, and
  /// K times `down`. With another number of experts in use that holds no longer; so they become
  /// what they were.
  void restore_hard_gates();
  /// Rotates (ModelConfig::rotary) and scales q in place; rotates k and moves k and v into the
  /// cache.
  void rotate_and_store(const ForwardRoom& room, std::int64_t position, const KvLayout& layout,
                        float* cache);

  /// T tokens behind `past` others: whether the model can see them as one text.
  void check_window(const char* function, std::int64_t past, std::int64_t tokens) const;

  const LayerWeights& layer(const char* function, std::int64_t l) const {
    if (l < 0 || l >= config.num_layers)
      fail_argument("{}: layer {} of a model with {} layers", function, l, config.num_layers);
    return weights.layers[l];
  }

  ModelConfig config;
  ThreadPool pool;
  Rope rope;
  WeightType type;
  LoadedDecoder loaded;
  DecoderWeights& weights = loaded.weights;
  std::vector<float> thresholds;     // [L], RouteSpec::threshold
  std::vector<char> replaced;        // [L], by set_moe()
  std::filesystem::path directory;   // empty: not loaded from one
  Workspace workspace;               // of the op that runs
  Workspace forward_memory;          // of a ForwardRoom
  std::vector<float> router_logits;  // [T, E] of the layer that ran last
  Routing routing;                   // the same
  std::vector<Sequence> sequences;   // of forward_step()
};

}  // namespace cleave
