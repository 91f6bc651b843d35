#pragma once

#include <variant>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/expert.h"
#include "cleave/moe_layer.h"
#include "cleave/packed.h"

namespace cleave {

/// Experts with their router, as the kernels read them; meaning as in MoeLayer.
struct PackedMoe {
  PackedExperts experts;
  PackedLinear router;  ///< [E, D], always float32: it decides, and it is small
  std::int64_t experts_per_token = 0;
  GateMode gate = GateMode::kSoftmax;
  float scale = 1.0f;
};

/// Weights of one decoder layer. Row order and shapes as in HuggingFace checkpoints.
struct LayerWeights {
  std::vector<float> input_norm;   ///< [D]
  PackedLinear qkv;                ///< [(num_heads + 2 num_kv_heads) * head_dim, D]: q, k, v
  std::vector<float> qkv_bias;     ///< as many, or empty
  PackedLinear output;             ///< [D, num_heads * head_dim]
  std::vector<float> output_bias;  ///< [D], or empty
  std::vector<float> post_norm;    ///< [D]
  std::variant<PackedExperts, PackedMoe> ffn;
};

struct DecoderWeights {
  PackedLinear embedding;  ///< [V, D]
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  ///< [D]
  PackedLinear head;              ///< [V, D]; where it is tied, the embedding's own weights
};

PackedMoe pack(const MoeLayer& layer, WeightType type, const ParallelFor& parallel);

/// Reads and packs, one tensor after the other: no more than one layer is in memory twice.
/// @throws FileError  a tensor is missing, has the wrong shape or holds NaN
DecoderWeights load_decoder(const Checkpoint& checkpoint, WeightType type,
                            const ParallelFor& parallel);

}  // namespace cleave
