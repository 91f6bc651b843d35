#pragma once

#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/expert.h"
#include "cleave/model.h"
#include "cleave/moe_layer.h"
#include "cleave/packed.h"
#include "decoder_tensors.h"

namespace cleave {

/// Experts with their router, as the kernels read them; meaning as in MoeLayer.
struct PackedMoe {
  PackedExperts experts;
  PackedLinear router;  ///< [E, D], of router_weight_type()
  std::int64_t experts_per_token = 0;
  GateMode gate = GateMode::kSoftmax;
  float scale = 1.0f;
  PackedExperts shared;  ///< one expert, or none
};

/// RMSNorm, or LayerNorm where there is a bias.
struct NormWeights {
  std::vector<float> weight;  ///< [D]
  std::vector<float> bias;    ///< [D], or empty
};

/// Weights of one layer. Row order and shapes as in HuggingFace checkpoints; norms as LayerNames
/// has them.
struct LayerWeights {
  NormWeights input_norm;
  PackedLinear qkv;                ///< [(num_heads + 2 num_kv_heads) * head_dim, D]: q, k, v
  std::vector<float> qkv_bias;     ///< as many, or empty
  PackedLinear output;             ///< [D, num_heads * head_dim]
  std::vector<float> output_bias;  ///< [D], or empty
  NormWeights post_norm;
  std::variant<PackedExperts, PackedMoe> ffn;
};

/// A token has one row of the vocabulary's matrices to itself, and no other weight repairs it: 4
/// bits cost more there than they save.
inline WeightType vocabulary_weight_type(WeightType type) {
  return type == WeightType::kInt4 ? WeightType::kInt8 : type;
}

/// bfloat16 where the experts have that or less: of fine experts the router is a good part of a
/// prompt time, and rounding it costs no KL that can be measured. Not 16 bits of float16, whose
/// range the routers of hard gates (times kHardGateEpsilon) leave.
inline WeightType router_weight_type(WeightType type) {
  return type == WeightType::kF32 || type == WeightType::kF16 ? WeightType::kF32
                                                              : WeightType::kBF16;
}

struct DecoderWeights {
  PackedLinear embedding;  ///< [V, D]
  /// [max_position_embeddings, D], what each position adds to it, token type 0 included; or empty.
  std::vector<float> positions;
  std::vector<LayerWeights> layers;
  NormWeights final_norm;
  PackedLinear head;  ///< [V, D]; where it is tied, the embedding's own weights; or empty
};

PackedMoe pack(const MoeLayer& layer, WeightType type, const ParallelFor& parallel);

/// Reads a checkpoint's tensors and packs them, a part of the decoder at a time. What was read is
/// given back to the system: besides the packed weights, one layer's `down` is in memory as
/// float32 (without a gate `up` as well), or one layer's experts.
class DecoderPacker {
 public:
  /// @throws FileError  a tensor is missing or has the wrong shape; reading one: it holds NaN
  DecoderPacker(const Checkpoint& checkpoint, WeightType type, const ParallelFor& parallel);

  PackedLinear embedding() const { return linear(names_.embedding + ".weight", vocabulary_type()); }
  /// DecoderWeights::positions.
  std::vector<float> positions() const;
  LayerWeights layer(std::int64_t l) const;
  NormWeights final_norm() const { return norm(names_.final_norm); }
  /// Only where there is one that is not tied to the embedding.
  PackedLinear head() const { return linear(names_.head + ".weight", vocabulary_type()); }
  DecoderWeights all() const;

 private:
  WeightType vocabulary_type() const { return vocabulary_weight_type(type_); }
  std::vector<float> floats(const std::string& name) const;
  NormWeights norm(const std::string& name) const;
  PackedLinear linear(const std::string& name, WeightType type) const;
  PackedLinear stacked(const std::vector<std::string>& names) const;
  PackedExperts dense_ffn(const LayerNames& names) const;
  PackedExperts dense_ffn_without_gate(const LayerNames& names) const;
  MoeLayer bert_moe_layer(std::int64_t l) const;
  MoeLayer moe_layer(std::int64_t l) const;
  MoeLayer fused_moe_layer(std::int64_t l) const;
  ExpertBank fused_bank(const std::string& input, const std::string& output,
                        std::int64_t num_experts, std::int64_t width) const;
  void append(const std::string& name, std::vector<float>& to) const;
  void release_all() const;

  const Checkpoint& source_;
  const ModelConfig& c_;
  ModelNames names_;
  WeightType type_;
  const ParallelFor& parallel_;
};

/// The weights of a model, packed now or mapped from the file that CacheSpec names.
struct LoadedDecoder {
  DecoderWeights weights;
  bool mapped = false;  ///< they are the file's pages
};
/// @throws FileError  the checkpoint cannot be loaded. What is wrong with the cache file is told to
///                    `notice` instead, and the weights are packed.
LoadedDecoder load_decoder(const Checkpoint& checkpoint, WeightType type, const CacheSpec& cache,
                           const std::function<void(const std::string&)>& notice,
                           const ParallelFor& parallel);

}  // namespace cleave
