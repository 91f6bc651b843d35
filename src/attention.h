#pragma once

#include <cstdint>
#include <vector>

#include "cleave/kernels.h"
#include "cleave/model_config.h"
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
};

/// Causal grouped-query attention: out[t, h] = softmax(q[t, h] k[:, kv(h)]^T) v[:, kv(h)].
///   q [T, num_heads * head_dim]          rotated, and scaled by 1 / sqrt(head_dim)
///   keys, values [N, num_kv_heads * head_dim]   N >= T; the last T rows are those of the T tokens
///   out [T, num_heads * head_dim]        overwritten; must not overlap the others
void attention(const AttentionShape& shape, MatrixView<const float> q, MatrixView<const float> keys,
               MatrixView<const float> values, MatrixView<float> out, const ParallelFor& parallel);

}  // namespace cleave
