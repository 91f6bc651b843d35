#pragma once

#include <cstdint>
#include <vector>

#include "cleave/kernels.h"
#include "cleave/model_config.h"
#include "cleave/packed.h"
#include "cleave/views.h"

namespace cleave {

/// Rotary position embedding (arXiv:2104.09864), half-split: component i of a head turns with
/// component i + head_dim / 2. Angles are rounded to float32 where Transformers rounds them: at
/// position 1000 the rounding of an angle is worth 6e-5, and it is what the models were trained
/// with.
class Rope {
 public:
  Rope(const RopeConfig& config, std::int64_t head_dim);

  /// cosine, sine [head_dim / 2], written.
  void angles(std::int64_t position, float* cosine, float* sine) const;
  /// Turns one head [head_dim] and multiplies it by `factor`.
  static void rotate(const float* cosine, const float* sine, float factor, std::int64_t head_dim,
                     float* head);

 private:
  std::vector<float> inverse_frequencies_;  // [head_dim / 2]
};

struct AttentionShape {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;  ///< divides num_heads
  std::int64_t head_dim = 0;
  std::int64_t sliding_window = 0;  ///< a token sees itself and the window - 1 before; 0: all
  bool causal = true;               ///< false: a token sees all tokens, without a sliding window
};

/// How one layer's cache lies in memory: per key/value head blocks of kKeyBlock tokens; in a block
/// the keys as panels [kKeyBlock / 32][head_dim][32 tokens], then the values as panels
/// [ceil(head_dim / 32)][kKeyBlock tokens][32], the operands of the tile kernels. Whoever reads a
/// head reads one stream.
struct KvLayout {
  static constexpr std::int64_t kKeyBlock = 128;

  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t capacity = 0;  ///< tokens

  std::int64_t value_panels() const { return (head_dim + 31) / 32; }
  std::int64_t block_size() const { return kKeyBlock * (head_dim + value_panels() * 32); }
  std::int64_t head_size() const { return (capacity + kKeyBlock - 1) / kKeyBlock * block_size(); }
  std::int64_t size() const { return num_kv_heads * head_size(); }  ///< floats
};

/// Moves the keys and values of some tokens into the cache: tokens [position, position + rows).
///   keys, values [rows, num_kv_heads * head_dim]    cache [layout.size()], 64-byte aligned
void store_keys_and_values(const KvLayout& layout, MatrixView<const float> keys,
                           MatrixView<const float> values, std::int64_t position, float* cache);

/// Grouped-query attention: out[t, h] = softmax(q[t, h] k[:, kv(h)]^T) v[:, kv(h)], over the tokens
/// that `shape` lets t see.
///   q [T, num_heads * head_dim]   rotated, and scaled by 1 / sqrt(head_dim)
///   cache                         holds `tokens` tokens; the last T are those of q
///   out [T, num_heads * head_dim] overwritten; must not overlap the others
/// Deterministic for a fixed number of threads.
void attention(const AttentionShape& shape, MatrixView<const float> q, const KvLayout& layout,
               const float* cache, std::int64_t tokens, MatrixView<float> out, Workspace& workspace,
               const ParallelFor& parallel);

}  // namespace cleave
