#include "cleave/model.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <system_error>
#include <utility>

#include "fail.h"
#include "kernels/dispatch.h"
#include "model_impl.h"
#include "support/huge_pages.h"

namespace cleave {
namespace {

constexpr std::int64_t kRowGrain = 8;  // rows of norms and rotations worth a thread

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

Model::Impl::Impl(const Checkpoint& checkpoint, const ModelSpec& spec)
    : config(checkpoint.config()),
      pool(spec.threads),
      rope(config.rope, config.head_dim),
      type(spec.weights),
      loaded(load_decoder(checkpoint, spec.weights, spec.cache, spec.notice, pool.parallel_for())),
      thresholds(static_cast<std::size_t>(config.num_layers), spec.router_threshold),
      replaced(static_cast<std::size_t>(config.num_layers), 0) {
  std::error_code ignored;
  if (std::filesystem::is_directory(checkpoint.path(), ignored)) directory = checkpoint.path();
}

void Model::Impl::norm(MatrixView<const float> x, const NormWeights& weights, MatrixView<float> y) {
  const auto eps = static_cast<float>(config.rms_norm_eps);
  const float *weight = weights.weight.data(), *bias = weights.bias.data();
  pool.parallel_for()(x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      if (config.layer_norm)
        isa_kernels().layer_norm(x.row(t), weight, bias, eps, y.row(t), x.cols);
      else
        isa_kernels().rms_norm(x.row(t), weight, eps, y.row(t), x.cols);
    }
  });
}

void Model::Impl::add(MatrixView<const float> x, MatrixView<float> y) {
  pool.parallel_for()(x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) isa_kernels().add(x.row(t), y.row(t), x.cols);
  });
}

void Model::Impl::rotate_and_store(const ForwardRoom& room, std::int64_t position,
                                   const KvLayout& layout, float* cache) {
  const std::int64_t d = config.head_dim;
  const float q_factor = 1.0f / std::sqrt(static_cast<float>(d));
  pool.parallel_for()(room.qkv.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* q = room.qkv.row(t);
      float* k = q + query_width();
      if (!config.rotary) {
        isa_kernels().scale(q_factor, q, query_width());
        continue;
      }
      const float *cosine = room.cosine.row(t), *sine = room.sine.row(t);
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

void Model::Impl::attend(const LayerWeights& w, const ForwardRoom& room,
                         std::span<const Sequence> sequences) {
  linear(w.qkv, room.normed, w.qkv_bias, room.qkv, /*add=*/false, workspace, pool.parallel_for());
  std::int64_t first = 0;
  for (const auto& [rows, position, layout, cache] : sequences) {
    const ForwardRoom own = room.rows(first, rows);
    rotate_and_store(own, position, layout, cache);
    attention({config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window,
               config.causal},
              {own.qkv.data, rows, query_width(), own.qkv.row_stride}, layout, cache,
              position + rows, own.context, workspace, pool.parallel_for());
    first += rows;
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
  const RouteSpec spec{
      .experts_per_token = moe.experts_per_token, .mode = moe.gate, .threshold = threshold};
  if (moe.shared.num_experts() > 0) {
    moe_ffn({moe.router, spec, logits, routing}, moe.experts, moe.scale, moe.shared, normed, y,
            workspace, pool.parallel_for());
  } else {
    linear(moe.router, normed, {}, logits, /*add=*/false, workspace, pool.parallel_for());
    route(logits, spec, routing, pool.parallel_for());
    moe_ffn(moe.experts, routing, moe.scale, normed, y, workspace, pool.parallel_for());
  }
  if (moe.experts.down_bias().empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t)
    isa_kernels().add(moe.experts.down_bias().data(), y.row(t), y.cols);
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const Checkpoint& checkpoint, const ModelSpec& spec) {
  isa_name();  // chosen now, so that a wrong CLEAVE_ISA shows before anything is written
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

void Model::Impl::check_window(const char* function, std::int64_t past, std::int64_t tokens) const {
  if (!config.causal && past > 0)
    fail_argument(
        "{}: the cache holds {} tokens, but a token of this model (an encoder) sees its whole "
        "window, which is one call; clear() the cache before it",
        function, past);
  if (!config.rotary && past + tokens > config.max_position_embeddings)
    fail_argument("{}: {} tokens; the model has positions for {}; give shorter windows", function,
                  past + tokens, config.max_position_embeddings);
}

void Model::embed(std::span<const std::int32_t> tokens, MatrixView<float> x) const {
  const auto T = static_cast<std::int64_t>(tokens.size());
  impl_->check_window("Model::embed", 0, T);
  embedding_rows(tokens, x);
  const std::vector<float>& positions = impl_->weights.positions;
  if (positions.empty()) return;
  parallel()(T, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      isa_kernels().add(positions.data() + t * x.cols, x.row(t), x.cols);
  });
}

void Model::embedding_rows(std::span<const std::int32_t> tokens, MatrixView<float> x) const {
  const ModelConfig& c = impl_->config;
  const auto T = static_cast<std::int64_t>(tokens.size());
  if (x.rows != T || x.cols != c.hidden_size)
    fail_argument("Model::embedding_rows: x is [{}, {}]; expected [T, D] = [{}, {}]", x.rows,
                  x.cols, T, c.hidden_size);
  for (std::int64_t t = 0; t < T; ++t)
    if (tokens[t] < 0 || tokens[t] >= c.vocab_size)
      fail_argument(
          "Model: token {} has id {}; expected 0 to {}; was the text encoded with another "
          "tokenizer?",
          t, tokens[t], c.vocab_size - 1);
  parallel()(T, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      impl_->weights.embedding.unpack_row(tokens[t], x.row(t));
  });
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
  const bool in_place = c.norm_place == NormPlace::kAfter;
  room.x = x;
  if (in_place) room.normed = x;
  for (std::int64_t t = 0; c.rotary && t < T; ++t)
    impl_->rope.angles(t, room.cosine.row(t), room.sine.row(t));
  impl_->norm(x, w.input_norm, room.normed);
  const Impl::Sequence window{T, 0, kv_layout(c, cache.capacity_), cache.layer(layer)};
  impl_->attend(w, room, {&window, 1});
  impl_->norm(x, w.post_norm, in_place ? x : normed);
  for (std::int64_t t = 0; in_place && t < T; ++t) std::copy_n(x.row(t), D, normed.row(t));
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
  impl_->check_window("Model::forward", position, T);
  check_cache("Model::forward", cache, position, T);
  const KvLayout layout = kv_layout(c, cache.capacity_);

  const ForwardRoom room(c, T, impl_->forward_memory);
  embed(tokens, room.x);
  if (T == 0) return;
  for (std::int64_t t = 0; c.rotary && t < T; ++t)
    impl_->rope.angles(position + t, room.cosine.row(t), room.sine.row(t));
  impl_->run_layers(room, hooks, hidden, [&](std::int64_t l, const LayerWeights& w) {
    const Impl::Sequence sequence{T, position, layout, cache.layer(l)};
    impl_->attend(w, room, {&sequence, 1});
  });
  cache.size_ += T;
}

void Model::forward_step(std::span<const std::int32_t> tokens, std::span<KvCache* const> caches,
                         MatrixView<float> hidden) {
  const ModelConfig& c = impl_->config;
  const auto B = static_cast<std::int64_t>(tokens.size());
  if (!c.causal)
    fail_argument(
        "Model::forward_step: a token of this model (an encoder) sees its whole window, so it "
        "cannot go on token by token; use forward()");
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
  std::vector<Impl::Sequence>& sequences = impl_->sequences;
  sequences.clear();
  for (std::int64_t b = 0; b < B; ++b) {
    sequences.push_back({1, caches[b]->size_, kv_layout(c, caches[b]->capacity_), nullptr});
    impl_->rope.angles(caches[b]->size_, room.cosine.row(b), room.sine.row(b));
  }
  impl_->run_layers(room, {}, hidden, [&](std::int64_t l, const LayerWeights& w) {
    for (std::int64_t b = 0; b < B; ++b) sequences[b].cache = caches[b]->layer(l);
    impl_->attend(w, room, sequences);
  });
  for (KvCache* cache : caches) ++cache->size_;
}

void Model::logits(MatrixView<const float> hidden, MatrixView<float> out) {
  const ModelConfig& c = impl_->config;
  if (!c.has_head)
    fail_argument(
        "Model::logits: the model (an encoder) has no head; its result are the hidden states of "
        "forward()");
  if (hidden.cols != c.hidden_size || out.rows != hidden.rows || out.cols != c.vocab_size)
    fail_argument(
        "Model::logits: hidden is [{}, {}] and out [{}, {}]; expected [T, {}] and [T, {}]",
        hidden.rows, hidden.cols, out.rows, out.cols, c.hidden_size, c.vocab_size);
  linear(impl_->weights.head, hidden, {}, out, /*add=*/false, impl_->workspace, parallel());
}

}  // namespace cleave
