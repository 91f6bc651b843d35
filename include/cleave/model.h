#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/expert.h"
#include "cleave/model_config.h"
#include "cleave/moe_layer.h"
#include "cleave/packed.h"
#include "cleave/views.h"

namespace cleave {

/// A file that keeps packed weights from one start to the next. It is mapped, not read: its pages
/// are shared by all processes that use it, and can leave memory when others need it.
///
/// A file of another format version, weight type or source, or one that is cut short or damaged
/// (every byte is checked as it is mapped) is not used. Nor is it changed while a model uses it:
/// the new one takes its name.
struct CacheSpec {
  std::filesystem::path file = {};  ///< empty: no file
  bool write = true;                ///< whether it is written where it is missing or of no use
};

/// "DIR/cleave.bf16.packed" for a model directory, "FILE.gguf.bf16.packed" for a GGUF file.
std::filesystem::path default_cache_file(const Checkpoint& checkpoint, WeightType type);

struct ModelSpec {
  int threads = 0;                        ///< 0: as many as the machine has cores
  WeightType weights = WeightType::kF32;  ///< how they are kept in memory
  /// K of all layers with experts, as set_active_experts() sets it; 0: the checkpoint's.
  std::int64_t experts_per_token = 0;
  /// Experts are used only where they reach this share of the token's largest gate probability;
  /// RouteSpec::threshold of all layers. 0: always K.
  float router_threshold = 0.0f;
  CacheSpec cache = {};
  /// Called with a line of text while the model loads: the cache file was written, is of no use and
  /// why, or cannot be written. None of these stops the loading.
  std::function<void(const std::string&)> notice = {};
};

/// Keys and values of the tokens seen so far. One per sequence.
class KvCache {
 public:
  /// @throws InvalidArgument  capacity < 1
  KvCache(const ModelConfig& config, std::int64_t capacity);
  std::int64_t size() const { return size_; }          ///< tokens stored
  std::int64_t capacity() const { return capacity_; }  ///< tokens it can hold
  void clear() { size_ = 0; }                          ///< forget all tokens, keep the memory

 private:
  friend class Model;
  std::int64_t size_ = 0;
  std::int64_t capacity_ = 0;
  struct alignas(64) CacheLine {
    float values[16];
  };
  std::int64_t layer_size_ = 0;    // floats per layer, laid out as attention reads them
  std::vector<CacheLine> memory_;  // of all layers, one after the other
  float* layer(std::int64_t l) { return memory_.data()->values + l * layer_size_; }
};

/// What a caller may watch while a model runs.
struct ForwardHooks {
  /// Before each FFN: its input [T, D] (after the norm). Valid during the call only.
  std::function<void(std::int64_t layer, MatrixView<const float> input)> ffn_input;
  /// After each MoE layer: the routing of this call.
  std::function<void(std::int64_t layer, const Routing& routing)> routing;
  /// In place of a layer's FFN: adds its output to y [T, D], which holds zeros, and returns true;
  /// or returns false, and the layer's own FFN runs. For what no weights hold, such as oracles.
  std::function<bool(std::int64_t layer, MatrixView<const float> input, MatrixView<float> y)> ffn;
};

/// A transformer, without LibTorch: grouped-query attention with a KV cache, a dense or an MoE FFN
/// per layer; norms, positions and what a token sees are as ModelConfig says. It serves convert,
/// eval and generate; gradients live in cleave::train, and a test holds the two forward passes
/// of decoders equal.
///
/// An encoder (ModelConfig::causal is false) takes a window as a whole: forward() on a cache that
/// was cleared, or the steps below. Its token types are all 0.
///
/// Activations are float32; weights are as ModelSpec says. Owns its weights and its threads. One
/// call at a time.
class Model {
 public:
  /// @throws FileError  a tensor is missing, has the wrong shape or holds NaN
  /// @throws InvalidArgument  a router threshold outside [0, 1], a K outside [1, E], or one of them
  ///                          for a model without experts; or see isa_name()
  static Model load(const Checkpoint& checkpoint, const ModelSpec& spec = {});
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  const ModelConfig& config() const;
  int threads() const;
  /// Whether the weights are the pages of ModelSpec::cache.
  bool cached() const;
  /// Runs on the model's threads; what its own layers use.
  ParallelFor parallel() const;

  /// Runs tokens through all layers and appends them to the cache.
  ///   tokens [T], ids in [0, V)    hidden [T, D], written: the final norm's output
  /// @throws InvalidArgument  an id out of range, or the cache is too small; of an encoder, also
  ///                          where it holds tokens; more tokens than there are learned positions
  void forward(std::span<const std::int32_t> tokens, KvCache& cache, MatrixView<float> hidden,
               const ForwardHooks& hooks = {});
  /// One token of each of B sequences, each with a cache of its own: what B calls of forward() with
  /// one token would do, while every weight is read once.
  ///   tokens [B]    caches [B], distinct    hidden [B, D], written
  /// @throws InvalidArgument  as forward(); two tokens share a cache; or an encoder
  void forward_step(std::span<const std::int32_t> tokens, std::span<KvCache* const> caches,
                    MatrixView<float> hidden);
  /// The head: hidden [T, D] -> logits [T, V]. Apart from forward(), so that only the rows that are
  /// needed are computed, and in pieces (V is large).
  /// @throws InvalidArgument  a model without one (ModelConfig::has_head), or shapes disagree
  void logits(MatrixView<const float> hidden, MatrixView<float> out);

  // The same pass in steps, for those who need all tokens of a text in one layer before the next
  // (a conversion that lets every layer see what the converted ones before it produce):
  //   embed(tokens, x); for each l: attend(l, cache, x, normed), x += FFN(normed); finish(x,
  //   hidden)

  /// x [T, D], written: the embedding rows, and learned positions from 0 on.
  /// @throws InvalidArgument  an id out of range, or more tokens than learned positions
  void embed(std::span<const std::int32_t> tokens, MatrixView<float> x) const;
  /// x [T, D], written: the embedding rows alone, of any number of tokens.
  /// @throws InvalidArgument  an id out of range
  void embedding_rows(std::span<const std::int32_t> tokens, MatrixView<float> x) const;
  /// One window through one layer's attention: x += attention(norm(x)), and `normed` receives the
  /// norm of that, which is what the layer's FFN reads. The window starts at position 0. With
  /// NormPlace::kAfter each norm takes the place of what it norms, so x and `normed` end equal: the
  /// first is that of the embedding or of the layer before, whose FFN has been added.
  ///   x [T, D]   normed [T, D], written   cache: room for T tokens; what it holds is overwritten
  void attend(std::int64_t layer, KvCache& cache, MatrixView<float> x, MatrixView<float> normed);
  /// hidden = final norm of x. Both [T, D]; may be the same.
  void finish(MatrixView<const float> x, MatrixView<float> hidden);

  /// The FFN of a layer that is dense, as the kernels see it: exact with float32 weights.
  /// @throws InvalidArgument  the layer holds experts
  DenseFfn dense_ffn(std::int64_t layer) const;
  /// The experts and the router of a layer that holds some: exact with float32 weights.
  /// @throws InvalidArgument  the layer is dense
  MoeLayer moe_layer(std::int64_t layer) const;
  /// E of a layer that holds experts, 0 where it is dense.
  std::int64_t num_experts(std::int64_t layer) const;
  /// Bytes of the packed weights: what generating one token reads, but for inactive experts.
  std::int64_t weight_bytes() const;
  /// The run-time knob of quality against speed: K experts per token in all layers from now on,
  /// whatever the model was made for; config() says so. Where cleave.json tells that the gates were
  /// hard when the model was written, chosen experts go on to weigh 1 each; else the weights of the
  /// K sum to 1, as stock classes have it.
  /// @throws InvalidArgument  K outside [1, E], or a model without experts
  void set_active_experts(std::int64_t experts_per_token);
  /// RouteSpec::threshold of one layer; see calibrate_thresholds(). Hard gates as above.
  /// @throws InvalidArgument  outside [0, 1], or the layer is dense
  void set_router_threshold(std::int64_t layer, float threshold);
  /// Replaces a layer's FFN.
  /// @throws InvalidArgument  D disagrees, or `moe.shared` is not one slice without a down_bias
  void set_moe(std::int64_t layer, const MoeLayer& moe);

 private:
  struct Impl;
  void check_cache(const char* function, const KvCache& cache, std::int64_t used,
                   std::int64_t tokens) const;
  explicit Model(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct SamplingSpec {
  double temperature = 0.0;  ///< 0: greedy, the largest logit
  double top_p = 1.0;        ///< keep the smallest set of tokens whose probability reaches this
  std::uint64_t seed = 0;
};

/// Draws tokens from logits. The same seed gives the same tokens.
class Sampler {
 public:
  /// @throws InvalidArgument  temperature < 0 or top_p outside (0, 1]
  explicit Sampler(const SamplingSpec& spec);
  /// logits [V] -> token id. @throws InvalidArgument  a logit is NaN or +infinity
  std::int32_t operator()(std::span<const float> logits);

 private:
  SamplingSpec spec_;
  std::mt19937_64 rng_;
};

struct GenerateSpec {
  std::int64_t max_tokens = 64;
  SamplingSpec sampling{};
  bool ignore_eos = false;
};

/// Continues `prompt` until `max_tokens` or an end-of-sequence id of the model's configuration;
/// that id itself is neither returned nor given to `on_token`.
/// @param on_token  called with each new id; returning false stops
/// @throws InvalidArgument  the prompt is empty, or max_tokens < 0
std::vector<std::int32_t> generate(Model& model, std::span<const std::int32_t> prompt,
                                   const GenerateSpec& spec,
                                   const std::function<bool(std::int32_t)>& on_token = {});

}  // namespace cleave
