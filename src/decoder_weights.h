#pragma once

#include <variant>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/expert.h"
#include "cleave/moe_layer.h"

namespace cleave {

/// Weights of one decoder layer, float32. Row order and shapes as in HuggingFace checkpoints.
struct LayerWeights {
  std::vector<float> input_norm;   ///< [D]
  std::vector<float> qkv;          ///< [(num_heads + 2 num_kv_heads) * head_dim, D]: q, k, v
  std::vector<float> qkv_bias;     ///< as many, or empty
  std::vector<float> output;       ///< [D, num_heads * head_dim]
  std::vector<float> output_bias;  ///< [D], or empty
  std::vector<float> post_norm;    ///< [D]
  std::variant<DenseFfn, MoeLayer> ffn;
};

struct DecoderWeights {
  std::vector<float> embedding;  ///< [V, D]
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  ///< [D]
  std::vector<float> head;        ///< [V, D]; empty where it is the embedding
};

/// @throws FileError  a tensor is missing, has the wrong shape or holds NaN
DecoderWeights load_decoder(const Checkpoint& checkpoint);

}  // namespace cleave
