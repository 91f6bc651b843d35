#include "cleave/model.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <system_error>
#include <utility>

#include "attention.h"
#include "cleave/export.h"
#include "decoder_weights.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "moe_layer_check.h"
#include "support/huge_pages.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

constexpr std::int64_t kRowGrain = 8;  // rows of norms and rotations worth a thread

KvLayout kv_layout(const ModelConfig& config, std::int64_t capacity) {
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
    normed = {memory + begin[1], T, D};
    branch = {memory + begin[2], T, D};
    qkv = {memory + begin[3], T, qkv_width};
    context = {memory + begin[4], T, queries};
    cosine = {memory + begin[5], T, c.head_dim / 2};
    sine = {memory + begin[6], T, c.head_dim / 2};
  }
  /// The part of one token.
  ForwardRoom row(std::int64_t t) const {
    ForwardRoom one = *this;
    for (MatrixView<float>* view :
         {&one.x, &one.normed, &one.branch, &one.qkv, &one.context, &one.cosine, &one.sine})
      *view = view->slice_rows(t, 1);
    return one;
  }
  MatrixView<float> x, normed;     // [T, D] the residual stream, and its norm
  MatrixView<float> branch;        // [T, D] of the FFN
  MatrixView<float> qkv, context;  // [T, query and key/value heads], [T, query heads]
  MatrixView<float> cosine, sine;  // [T, head_dim / 2] of each token's position
};

void check_threshold(const Checkpoint& checkpoint, float threshold) {
  if (!(threshold >= 0.0f && threshold <= 1.0f))
    fail_argument(
        "Model::load: router threshold {}; expected a share of the largest gate "
        "probability, from 0 (always K experts) to 1",
        threshold);
  if (threshold > 0.0f && !checkpoint.config().is_moe())
    fail_argument(
        "{}: has no experts, so a router threshold of {} makes no sense; convert it first",
        checkpoint.path().string(), threshold);
}

}  // namespace

KvCache::KvCache(const ModelConfig& config, std::int64_t capacity) : capacity_(capacity) {
  if (capacity < 1)
    fail_argument("KvCache: capacity is {} tokens; it must be at least 1", capacity);
  layer_size_ = kv_layout(config, capacity).size();
  const auto lines =
      static_cast<std::size_t>(config.num_layers * layer_size_) / std::size(CacheLine{}.values);
  memory_.reserve(lines);
  advise_huge_pages(memory_.data(), lines * sizeof(CacheLine));
  memory_.resize(lines);
}

struct Model::Impl {
  Impl(const Checkpoint& checkpoint, const ModelSpec& spec)
      : config(checkpoint.config()),
        pool(spec.threads),
        rope(config.rope, config.head_dim),
        type(spec.weights),
        loaded(
            load_decoder(checkpoint, spec.weights, spec.cache, spec.notice, pool.parallel_for())),
        thresholds(static_cast<std::size_t>(config.num_layers), spec.router_threshold),
        replaced(static_cast<std::size_t>(config.num_layers), 0) {
    std::error_code ignored;
    if (std::filesystem::is_directory(checkpoint.path(), ignored)) directory = checkpoint.path();
  }

  std::int64_t query_width() const { return config.num_heads * config.head_dim; }
  std::int64_t kv_width() const { return config.num_kv_heads * config.head_dim; }

  /// y[t] = norm(x[t]).
  void norm(MatrixView<const float> x, const std::vector<float>& weight, MatrixView<float> y) {
    pool.parallel_for()(x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        isa_kernels().rms_norm(x.row(t), weight.data(), static_cast<float>(config.rms_norm_eps),
                               y.row(t), x.cols);
    });
  }

  /// y[t] += x[t].
  void add(MatrixView<const float> x, MatrixView<float> y) {
    pool.parallel_for()(x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) isa_kernels().add(x.row(t), y.row(t), x.cols);
    });
  }

  /// Where a sequence goes on, in one layer.
  struct CachePart {
    std::int64_t position;
    KvLayout layout;
    float* memory;
  };
  /// room.x += attention(room.normed), and the layer's part of the cache is filled.
  void attend(const LayerWeights& w, const ForwardRoom& room, std::int64_t position,
              const KvLayout& layout, float* cache);
  /// The same where every row is the next token of a sequence of its own.
  void attend_each(const LayerWeights& w, const ForwardRoom& room,
                   std::span<const CachePart> sequences);
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
  /// Rotates and scales q in place; rotates k and moves k and v into the cache.
  void rotate_and_store(const ForwardRoom& room, std::int64_t position, const KvLayout& layout,
                        float* cache);

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
};

void Model::Impl::rotate_and_store(const ForwardRoom& room, std::int64_t position,
                                   const KvLayout& layout, float* cache) {
  const std::int64_t d = config.head_dim;
  const float q_factor = 1.0f / std::sqrt(static_cast<float>(d));
  pool.parallel_for()(room.qkv.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float *cosine = room.cosine.row(t), *sine = room.sine.row(t);
      float* q = room.qkv.row(t);
      float* k = q + query_width();
      for (std::int64_t h = 0; h < config.num_heads; ++h)
        Rope::rotate(cosine, sine, q_factor, d, q + h * d);
      for (std::int64_t h = 0; h < config.num_kv_heads; ++h)
        Rope::rotate(cosine, sine, 1.0f, d, k + h * d);
    }
    const MatrixView<const float> keys(room.qkv.row(begin) + query_width(), end - begin, kv_width(),
                                       room.qkv.row_stride);
    const MatrixView<const float> values(keys.data + kv_width(), keys.rows, keys.cols,
                                         keys.row_stride);
    store_keys_and_values(layout, keys, values, position + begin, cache);
  });
}

void Model::Impl::attend(const LayerWeights& w, const ForwardRoom& room, std::int64_t position,
                         const KvLayout& layout, float* cache) {
  const std::int64_t T = room.x.rows;
  linear(w.qkv, room.normed, w.qkv_bias, room.qkv, /*add=*/false, workspace, pool.parallel_for());
  rotate_and_store(room, position, layout, cache);
  attention({config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window},
            {room.qkv.data, T, query_width(), room.qkv.row_stride}, layout, cache, position + T,
            room.context, workspace, pool.parallel_for());
  linear(w.output, room.context, w.output_bias, room.x, /*add=*/true, workspace,
         pool.parallel_for());
}

void Model::Impl::attend_each(const LayerWeights& w, const ForwardRoom& room,
                              std::span<const CachePart> sequences) {
  linear(w.qkv, room.normed, w.qkv_bias, room.qkv, /*add=*/false, workspace, pool.parallel_for());
  for (std::int64_t b = 0; b < room.x.rows; ++b) {
    const ForwardRoom one = room.row(b);
    const auto& [position, layout, memory] = sequences[b];
    rotate_and_store(one, position, layout, memory);
    attention({config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window},
              {one.qkv.data, 1, query_width(), one.qkv.row_stride}, layout, memory, position + 1,
              one.context, workspace, pool.parallel_for());
  }
  linear(w.output, room.context, w.output_bias, room.x, /*add=*/true, workspace,
         pool.parallel_for());
}

template <class Attend>
void Model::Impl::run_layers(const ForwardRoom& room, const ForwardHooks& hooks,
                             MatrixView<float> hidden, const Attend& attend) {
  const MatrixView<float> x = room.x, normed = room.normed, branch = room.branch;
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    const LayerWeights& w = weights.layers[l];
    norm(x, w.input_norm, normed);
    attend(l, w);
    norm(x, w.post_norm, normed);
    if (hooks.ffn_input) hooks.ffn_input(l, normed);
    // Not straight into x: the kernels add in many small parts, each of which would round to the
    // last digit of a residual that is a thousand times as large in some columns.
    std::fill_n(branch.data, x.rows * x.cols, 0.0f);
    if (hooks.ffn && hooks.ffn(l, normed, branch)) {
      // done
    } else if (const auto* dense = std::get_if<PackedExperts>(&w.ffn)) {
      cleave::dense_ffn(*dense, normed, branch, workspace, pool.parallel_for());
    } else {
      run_experts(std::get<PackedMoe>(w.ffn), thresholds[l], normed, branch);
      if (hooks.routing) hooks.routing(l, routing);
    }
    add(branch, x);
  }
  norm(x, weights.final_norm, hidden);
}

void Model::Impl::run_experts(const PackedMoe& moe, float threshold, MatrixView<const float> normed,
                              MatrixView<float> y) {
  const std::int64_t E = moe.experts.num_experts();
  router_logits.resize(static_cast<std::size_t>(normed.rows * E));
  const MatrixView<float> logits(router_logits.data(), normed.rows, E);
  linear(moe.router, normed, {}, logits, /*add=*/false, workspace, pool.parallel_for());
  route(logits,
        {.experts_per_token = moe.experts_per_token, .mode = moe.gate, .threshold = threshold},
        routing, pool.parallel_for());
  moe_ffn(moe.experts, routing, moe.scale, normed, y, workspace, pool.parallel_for());
  if (moe.shared.num_experts() > 0)
    cleave::dense_ffn(moe.shared, normed, y, workspace, pool.parallel_for());
  if (moe.experts.down_bias().empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t)
    isa_kernels().add(moe.experts.down_bias().data(), y.row(t), y.cols);
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const Checkpoint& checkpoint, const ModelSpec& spec) {
  check_threshold(checkpoint, spec.router_threshold);
  Model model(std::make_unique<Impl>(checkpoint, spec));
  if (spec.router_threshold > 0.0f) model.impl_->restore_hard_gates();
  if (spec.experts_per_token != 0) model.set_active_experts(spec.experts_per_token);
  return model;
}

const ModelConfig& Model::config() const { return impl_->config; }
bool Model::cached() const { return impl_->loaded.mapped; }
int Model::threads() const { return impl_->pool.threads(); }
ParallelFor Model::parallel() const { return impl_->pool.parallel_for(); }

void Model::check_cache(const char* function, const KvCache& cache, std::int64_t used,
                        std::int64_t tokens) const {
  const ModelConfig& c = impl_->config;
  if (used + tokens > cache.capacity_)
    fail_argument(
        "{}: the cache holds {} of {} tokens; {} more do not fit; make it larger or clear() it",
        function, used, cache.capacity_, tokens);
  const KvLayout layout = kv_layout(c, cache.capacity_);
  if (cache.layer_size_ != layout.size() ||
      cache.memory_.size() * sizeof(KvCache::CacheLine) !=
          static_cast<std::size_t>(c.num_layers * layout.size()) * sizeof(float))
    fail_argument("{}: the cache was made for a model of another shape", function);
}

void Model::embed(std::span<const std::int32_t> tokens, MatrixView<float> x) const {
  const ModelConfig& c = impl_->config;
  const auto T = static_cast<std::int64_t>(tokens.size());
  if (x.rows != T || x.cols != c.hidden_size)
    fail_argument("Model::embed: x is [{}, {}]; expected [T, D] = [{}, {}]", x.rows, x.cols, T,
                  c.hidden_size);
  for (std::int64_t t = 0; t < T; ++t) {
    if (tokens[t] < 0 || tokens[t] >= c.vocab_size)
      fail_argument(
          "Model: token {} has id {}; expected 0 to {}; was the text encoded with another "
          "tokenizer?",
          t, tokens[t], c.vocab_size - 1);
    impl_->weights.embedding.unpack_row(tokens[t], x.row(t));
  }
}

void Model::attend(std::int64_t layer, KvCache& cache, MatrixView<float> x,
                   MatrixView<float> normed) {
  const ModelConfig& c = impl_->config;
  const std::int64_t T = x.rows, D = c.hidden_size;
  const LayerWeights& w = impl_->layer("Model::attend", layer);
  if (x.cols != D || normed.rows != T || normed.cols != D)
    fail_argument("Model::attend: x is [{}, {}] and normed [{}, {}]; expected both [T, D = {}]",
                  x.rows, x.cols, normed.rows, normed.cols, D);
  check_cache("Model::attend", cache, 0, T);
  if (T == 0) return;
  ForwardRoom room(c, T, impl_->forward_memory);
  room.x = x;
  for (std::int64_t t = 0; t < T; ++t) impl_->rope.angles(t, room.cosine.row(t), room.sine.row(t));
  impl_->norm(x, w.input_norm, room.normed);
  impl_->attend(w, room, 0, kv_layout(c, cache.capacity_), cache.layer(layer));
  impl_->norm(x, w.post_norm, normed);
}

void Model::finish(MatrixView<const float> x, MatrixView<float> hidden) {
  const std::int64_t D = impl_->config.hidden_size;
  if (x.cols != D || hidden.cols != D || x.rows != hidden.rows)
    fail_argument("Model::finish: x is [{}, {}] and hidden [{}, {}]; expected both [T, D = {}]",
                  x.rows, x.cols, hidden.rows, hidden.cols, D);
  impl_->norm(x, impl_->weights.final_norm, hidden);
}

void Model::forward(std::span<const std::int32_t> tokens, KvCache& cache, MatrixView<float> hidden,
                    const ForwardHooks& hooks) {
  const ModelConfig& c = impl_->config;
  const auto T = static_cast<std::int64_t>(tokens.size());
  const std::int64_t D = c.hidden_size, position = cache.size_;
  if (hidden.rows != T || hidden.cols != D)
    fail_argument("Model::forward: hidden is [{}, {}]; expected [T, D] = [{}, {}]", hidden.rows,
                  hidden.cols, T, D);
  check_cache("Model::forward", cache, position, T);
  const KvLayout layout = kv_layout(c, cache.capacity_);

  const ForwardRoom room(c, T, impl_->forward_memory);
  embed(tokens, room.x);
  if (T == 0) return;
  for (std::int64_t t = 0; t < T; ++t)
    impl_->rope.angles(position + t, room.cosine.row(t), room.sine.row(t));
  impl_->run_layers(room, hooks, hidden, [&](std::int64_t l, const LayerWeights& w) {
    impl_->attend(w, room, position, layout, cache.layer(l));
  });
  cache.size_ += T;
}

void Model::forward_step(std::span<const std::int32_t> tokens, std::span<KvCache* const> caches,
                         MatrixView<float> hidden) {
  const ModelConfig& c = impl_->config;
  const auto B = static_cast<std::int64_t>(tokens.size());
  if (caches.size() != tokens.size() || hidden.rows != B || hidden.cols != c.hidden_size)
    fail_argument(
        "Model::forward_step: {} tokens, {} caches and hidden [{}, {}]; expected a cache for each "
        "token and [B, D = {}]",
        B, caches.size(), hidden.rows, hidden.cols, c.hidden_size);
  for (std::int64_t b = 0; b < B; ++b) {
    check_cache("Model::forward_step", *caches[b], caches[b]->size_, 1);
    if (std::find(caches.begin(), caches.begin() + b, caches[b]) != caches.begin() + b)
      fail_argument(
          "Model::forward_step: token {} has the cache of an earlier one; every sequence "
          "needs its own",
          b);
  }
  const ForwardRoom room(c, B, impl_->forward_memory);
  embed(tokens, room.x);
  if (B == 0) return;
  std::vector<Impl::CachePart> parts;
  for (std::int64_t b = 0; b < B; ++b) {
    parts.push_back({caches[b]->size_, kv_layout(c, caches[b]->capacity_), nullptr});
    impl_->rope.angles(caches[b]->size_, room.cosine.row(b), room.sine.row(b));
  }
  impl_->run_layers(room, {}, hidden, [&](std::int64_t l, const LayerWeights& w) {
    for (std::int64_t b = 0; b < B; ++b) parts[b].memory = caches[b]->layer(l);
    impl_->attend_each(w, room, parts);
  });
  for (KvCache* cache : caches) ++cache->size_;
}

void Model::logits(MatrixView<const float> hidden, MatrixView<float> out) {
  const ModelConfig& c = impl_->config;
  if (hidden.cols != c.hidden_size || out.rows != hidden.rows || out.cols != c.vocab_size)
    fail_argument(
        "Model::logits: hidden is [{}, {}] and out [{}, {}]; expected [T, {}] and [T, {}]",
        hidden.rows, hidden.cols, out.rows, out.cols, c.hidden_size, c.vocab_size);
  linear(impl_->weights.head, hidden, {}, out, /*add=*/false, impl_->workspace, parallel());
}

DenseFfn Model::dense_ffn(std::int64_t layer) const {
  const auto* dense = std::get_if<PackedExperts>(&impl_->layer("Model::dense_ffn", layer).ffn);
  if (dense == nullptr) fail_argument("Model::dense_ffn: layer {} holds experts", layer);
  ExpertBank bank = dense->unpack();
  DenseFfn ffn;
  ffn.hidden = bank.dense_hidden;
  ffn.d_model = bank.d_model;
  ffn.gate = std::move(bank.gate);
  ffn.up = std::move(bank.up);
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  ffn.down.resize(D * H);
  for (std::int64_t j = 0; j < H; ++j)
    for (std::int64_t c = 0; c < D; ++c) ffn.down[c * H + j] = bank.down_t[j * D + c];
  ffn.gate_bias = std::move(bank.gate_bias);
  ffn.up_bias = std::move(bank.up_bias);
  ffn.down_bias = std::move(bank.down_bias);
  ffn.activation = bank.activation;
  return ffn;
}

MoeLayer Model::moe_layer(std::int64_t layer) const {
  const auto* moe = std::get_if<PackedMoe>(&impl_->layer("Model::moe_layer", layer).ffn);
  if (moe == nullptr) fail_argument("Model::moe_layer: layer {} is dense", layer);
  MoeLayer result;
  result.experts = moe->experts.unpack();
  const std::int64_t E = result.experts.num_experts(), D = result.experts.d_model;
  result.router = {E, D, std::vector<float>(static_cast<std::size_t>(E * D))};
  for (std::int64_t e = 0; e < E; ++e)
    moe->router.unpack_row(e, result.router.weight.data() + e * D);
  result.experts_per_token = moe->experts_per_token;
  result.gate = moe->gate;
  result.scale = moe->scale;
  if (moe->shared.num_experts() > 0) result.shared = moe->shared.unpack();
  return result;
}

std::int64_t Model::num_experts(std::int64_t layer) const {
  const auto* moe = std::get_if<PackedMoe>(&impl_->layer("Model::num_experts", layer).ffn);
  return moe != nullptr ? moe->experts.num_experts() : 0;
}

std::int64_t Model::weight_bytes() const {
  const DecoderWeights& w = impl_->weights;
  std::int64_t bytes = w.embedding.bytes();
  if (w.head.data() != w.embedding.data()) bytes += w.head.bytes();
  for (const LayerWeights& layer : w.layers) {
    bytes += layer.qkv.bytes() + layer.output.bytes();
    if (const auto* moe = std::get_if<PackedMoe>(&layer.ffn))
      bytes += moe->experts.bytes() + moe->shared.bytes() + moe->router.bytes();
    else
      bytes += std::get<PackedExperts>(layer.ffn).bytes();
  }
  return bytes;
}

void Model::Impl::restore_hard_gates() {
  if (directory.empty()) return;
  const auto provenance = read_provenance(directory);
  directory.clear();  // once
  if (!provenance || provenance->gate != GateMode::kHard ||
      provenance->experts_per_token != config.experts_per_token)
    return;
  for (std::size_t l = 0; l < weights.layers.size(); ++l) {
    auto* moe = std::get_if<PackedMoe>(&weights.layers[l].ffn);
    if (moe == nullptr || replaced[l] != 0) continue;
    moe->gate = GateMode::kHard;
    moe->scale /= static_cast<float>(moe->experts_per_token);
  }
}

void Model::set_active_experts(std::int64_t experts_per_token) {
  const std::int64_t E = impl_->config.num_experts;
  if (!impl_->config.is_moe())
    fail_argument("Model::set_active_experts: the model has no experts; convert it first");
  if (experts_per_token < 1 || experts_per_token > E)
    fail_argument("Model::set_active_experts: K = {}; must be in [1, E = {}]", experts_per_token,
                  E);
  impl_->restore_hard_gates();
  impl_->config.experts_per_token = experts_per_token;
  for (LayerWeights& layer : impl_->weights.layers)
    if (auto* moe = std::get_if<PackedMoe>(&layer.ffn))
      moe->experts_per_token = std::min(experts_per_token, moe->experts.num_experts());
}

void Model::set_router_threshold(std::int64_t layer, float threshold) {
  if (num_experts(layer) == 0)
    fail_argument("Model::set_router_threshold: layer {} has no experts", layer);
  if (!(threshold >= 0.0f && threshold <= 1.0f))
    fail_argument("Model::set_router_threshold: {}; must be in [0, 1]", threshold);
  impl_->restore_hard_gates();
  impl_->thresholds[layer] = threshold;
}

void Model::set_moe(std::int64_t layer, const MoeLayer& moe) {
  impl_->layer("Model::set_moe", layer);
  if (moe.experts.d_model != impl_->config.hidden_size)
    fail_argument("Model::set_moe: the experts have width D = {}, the model {}",
                  moe.experts.d_model, impl_->config.hidden_size);
  check_shared("Model::set_moe", moe);
  impl_->weights.layers[layer].ffn = pack(moe, impl_->type, parallel());
  impl_->replaced[layer] = 1;
}

}  // namespace cleave
