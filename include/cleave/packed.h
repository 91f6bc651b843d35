#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/routing.h"
#include "cleave/views.h"

// Weights in the order in which the CPU kernels read them: one stream of whole cache lines, the
// same for all instruction sets. Packed once, read many times.
namespace cleave {

/// How packed weights are stored. Sums and results are float32 with all of them, and so are inputs,
/// but for kBF16 where the instruction set is "avx512bf16": those of FFNs, and of a matrix from 5
/// rows on, are then rounded to bfloat16 before each product.
enum class WeightType {
  kF32,   ///< 4 bytes a weight
  kBF16,  ///< 2 bytes, rounded to nearest even
  kF16,   ///< 2 bytes, rounded to nearest even; |w| <= 65504
  kInt8,  ///< 1 byte, and a scale per row (of down: per hidden neuron)
  kInt4,  ///< 4.5 bits: nibbles, and a byte each for scale and minimum per 32 weights of a row (of
          ///< down: per output and panel of neurons, 5 bits where 16 are a panel)
};
/// "f32", "bf16", "f16", "int8", "int4".
const char* weight_type_name(WeightType type);
std::optional<WeightType> parse_weight_type(std::string_view name);

/// Memory that an op needs beside its operands: its own, which grows to the largest need and then
/// stays, or the caller's. One per thread of calls (an op uses it from all threads it runs on, in
/// disjoint parts).
class Workspace {
 public:
  static constexpr std::size_t kAlignment = 64;
  Workspace() = default;
  /// The caller's memory, which must outlive this. An op that needs more than it has throws
  /// InvalidArgument; moe_ffn_workspace_size() tells what is enough. Two of the same memory may
  /// serve one call that several threads enter together.
  /// @throws InvalidArgument  not aligned to kAlignment
  explicit Workspace(std::span<std::byte> memory);
  /// At least `bytes`, aligned to 64; contents undefined. Valid until the next call.
  std::byte* get(std::size_t bytes);

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte[], Free> memory_;
  std::byte* view_ = nullptr;
  std::size_t size_ = 0;
};

/// Writes rows [first, first + out.rows) of a weight [N, K] into out [<= 32, K].
using ReadRows = std::function<void(std::int64_t first, MatrixView<float> out)>;

/// A linear layer's weight [N, K], packed.
class PackedLinear {
 public:
  PackedLinear() = default;
  /// @throws InvalidArgument  a weight is not finite, or beyond the range of `type`
  PackedLinear(MatrixView<const float> weight, WeightType type, const ParallelFor& parallel = {});
  /// The same for a weight that is never whole in memory: `read` is called from all threads.
  /// @throws InvalidArgument  as above; and whatever `read` throws
  PackedLinear(std::int64_t rows, std::int64_t cols, WeightType type, const ReadRows& read,
               const ParallelFor& parallel = {});
  /// A weight that is packed already, in a file or elsewhere. data [bytes()], on a cache line;
  /// shared.
  PackedLinear(std::int64_t rows, std::int64_t cols, WeightType type,
               std::shared_ptr<const std::byte[]> data);

  std::int64_t rows() const { return rows_; }  ///< N, outputs
  std::int64_t cols() const { return cols_; }  ///< K, inputs
  WeightType type() const { return type_; }
  std::int64_t bytes() const { return bytes_; }
  const std::byte* data() const { return data_.get(); }
  std::int64_t panel_bytes() const { return panel_bytes_; }  ///< of 32 outputs
  /// The weights of output n, as the kernels see them. out [K], written.
  void unpack_row(std::int64_t n, float* out) const;

 private:
  std::int64_t rows_ = 0, cols_ = 0, panel_bytes_ = 0, bytes_ = 0;
  WeightType type_ = WeightType::kF32;
  std::shared_ptr<const std::byte[]> data_;
};

/// Experts as checkpoints and engines keep them: stacked, of F32, BF16 or F16. Views only.
struct StackedExperts {
  std::int64_t num_experts = 0;  ///< E
  std::int64_t d_model = 0;      ///< D
  std::int64_t width = 0;        ///< I, the neurons of each
  bool gated = true;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kF32;        ///< of w13 and w2
  const void* w13 = nullptr;        ///< [E, 2I, D], gate rows then up rows; [E, I, D] without gate
  const void* w2 = nullptr;         ///< [E, D, I]
  const float* w13_bias = nullptr;  ///< [E, 2I] or [E, I], or none
};

/// A dense FFN whose gate and up are never whole in memory: as FfnView, but that their rows are
/// read while they are packed, from all threads, and that it has a gate.
struct FfnRows {
  ReadRows gate, up;                                     ///< [H, D] each
  MatrixView<const float> down;                          ///< [D, H]
  std::span<const float> gate_bias, up_bias, down_bias;  ///< [H], [H], [D], or empty
  Activation activation = Activation::kSilu;
};

/// What PackedExperts is made of, for those who keep it in a file or elsewhere.
struct PackedExpertsParts {
  std::int64_t d_model = 0;
  bool gated = true;
  Activation activation = Activation::kSilu;
  WeightType type = WeightType::kF32;
  std::vector<std::int64_t> widths;           ///< [E]
  std::vector<float> lane_bias, down_bias;    ///< or empty
  std::shared_ptr<const std::byte[]> panels;  ///< [bytes()], on a cache line; shared
};

/// The experts of one layer, or a dense FFN (as one expert), packed: an expert is a row of panels
/// of 16 neurons (32 without a gate), in one stretch of memory. Copies share the weights.
class PackedExperts {
 public:
  PackedExperts() = default;
  /// @throws InvalidArgument  a weight is not finite, or beyond the range of `type`
  PackedExperts(const ExpertBank& bank, WeightType type, const ParallelFor& parallel = {});
  /// A dense FFN: one expert, which dense_ffn() runs for all tokens.
  PackedExperts(const FfnView& ffn, WeightType type, const ParallelFor& parallel = {});
  /// The same.
  /// @throws InvalidArgument  as above, or `ffn.gate` or `ffn.up` is empty; and whatever they throw
  PackedExperts(const FfnRows& ffn, WeightType type, const ParallelFor& parallel = {});
  /// Reads each weight where it is; needs no memory beside the packed weights.
  PackedExperts(const StackedExperts& stack, WeightType type, const ParallelFor& parallel = {});
  /// Experts that are packed already.
  explicit PackedExperts(PackedExpertsParts parts);

  std::int64_t num_experts() const { return static_cast<std::int64_t>(widths_.size()); }
  std::int64_t d_model() const { return d_model_; }
  std::int64_t width(std::int64_t e) const { return widths_[e]; }  ///< neurons of expert e
  bool gated() const { return gated_; }
  Activation activation() const { return activation_; }
  WeightType type() const { return type_; }
  std::int64_t bytes() const {
    return panel_begin_.empty() ? 0 : panel_begin_.back() * panel_bytes_;
  }
  std::span<const float> down_bias() const { return down_bias_; }  ///< [D], or empty

  /// The weights as the kernels see them, neurons in packed order. Exact for kF32.
  ExpertBank unpack() const;

  // What the kernels read.
  std::int64_t panel_neurons() const { return gated_ ? 16 : 32; }
  std::int64_t panel_bytes() const { return panel_bytes_; }
  std::int64_t panel_begin(std::int64_t e) const { return panel_begin_[e]; }
  /// Where expert e begins.
  const std::byte* expert(std::int64_t e) const {
    return data_.get() + panel_begin_[e] * panel_bytes_;
  }
  /// [32] per panel, in its lanes' order, or empty.
  std::span<const float> lane_bias() const { return lane_bias_; }

 private:
  /// Packs what widths_ and the members before it describe. @param sources  [E]
  template <typename Source>
  void pack(const std::vector<Source>& sources, const ParallelFor& parallel);

  std::int64_t d_model_ = 0, panel_bytes_ = 0;
  bool gated_ = true;
  Activation activation_ = Activation::kSilu;
  WeightType type_ = WeightType::kF32;
  std::vector<std::int64_t> widths_;       // [E]
  std::vector<std::int64_t> panel_begin_;  // [E + 1]
  std::vector<float> lane_bias_, down_bias_;
  std::shared_ptr<const std::byte[]> data_;
};

/// y = x W^T + bias, or y += it.  x [T, K]   y [T, N]   bias [N] or empty.
/// @throws InvalidArgument  shapes disagree
void linear(const PackedLinear& weight, MatrixView<const float> x, std::span<const float> bias,
            MatrixView<float> y, bool add, Workspace& workspace, const ParallelFor& parallel);

/// As moe_ffn() on what `experts.unpack()` returns. Deterministic for a fixed number of threads.
/// @throws InvalidArgument  shapes disagree, T * K is not below 2^31, an id is outside [0, E)
///                          (Routing::kUnused is skipped) or twice in one token
void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel);

/// The same for a routing that somebody else owns. With a workspace of moe_ffn_workspace_size() it
/// allocates nothing. What it does outside of `parallel` writes nothing but its own variables, so
/// `parallel` may also be the share of one of several threads that all enter this call together.
void moe_ffn(const PackedExperts& experts, const RoutingView& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel);

/// moe_ffn() and dense_ffn() of the shared experts, `shared`, at once: threads wait for each other
/// less often.
/// @throws InvalidArgument  as those two
void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             const PackedExperts& shared, MatrixView<const float> x, MatrixView<float> y,
             Workspace& workspace, const ParallelFor& parallel);

/// A layer's router, and where its results go.
struct RouterCall {
  const PackedLinear& weight;  ///< [E, D]
  RouteSpec spec;
  MatrixView<float> logits;  ///< [T, E]
  Routing& routing;
};

/// linear() by a router, route() and moe_ffn() with shared experts as one: where tokens are few,
/// one thread routes while the others begin with the shared experts. Give it a workspace that
/// grows; it is no call that several threads enter together. After an exception y may hold
/// anything.
/// @throws InvalidArgument  as those three
void moe_ffn(const RouterCall& router, const PackedExperts& experts, float scale,
             const PackedExperts& shared, MatrixView<const float> x, MatrixView<float> y,
             Workspace& workspace, const ParallelFor& parallel);

/// Bytes of workspace that are enough for moe_ffn() on up to `num_tokens` tokens (T) with K experts
/// each, on `threads` threads. Depends on nothing else.
std::size_t moe_ffn_workspace_size(const PackedExperts& experts, std::int64_t num_tokens,
                                   std::int64_t experts_per_token, int threads);

/// The same for moe_ffn() with shared experts, `shared` of one expert.
std::size_t moe_ffn_workspace_size(const PackedExperts& experts, const PackedExperts& shared,
                                   std::int64_t num_tokens, std::int64_t experts_per_token,
                                   int threads);

/// y[t] += dense FFN(x[t]), output bias included; `ffn` holds one expert. As to memory and threads
/// like moe_ffn().
void dense_ffn(const PackedExperts& ffn, MatrixView<const float> x, MatrixView<float> y,
               Workspace& workspace, const ParallelFor& parallel);

/// The same as moe_ffn_workspace_size() for dense_ffn().
std::size_t dense_ffn_workspace_size(const PackedExperts& ffn, std::int64_t num_tokens,
                                     int threads);

}  // namespace cleave
