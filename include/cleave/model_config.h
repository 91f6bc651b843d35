#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cleave/views.h"

namespace cleave {

/// Model families the readers and both forward passes know (encoders: Model alone). They share one
/// transformer; what differs is configuration (a family is not a class).
enum class Family { kLlama, kMistral, kMixtral, kGraniteMoe, kGraniteMoeShared, kBert, kBertMoe };

/// "llama", "mistral", "mixtral", "granitemoe", "granitemoeshared", "bert", "cleave_bert_moe":
/// `model_type` of config.json.
const char* family_name(Family family);

/// Whether tensors have the names that BERT gives them.
bool is_bert(Family family);

/// Whether the checkpoints of a family hold all experts of a layer in one tensor under Granite's
/// names, gate rows before up rows. (cleave_bert_moe fuses them as well, under names of its own and
/// without a gate: is_bert().)
bool has_fused_experts(Family family);

/// Rotary position embedding, half-split (NEOX) row order as in HuggingFace checkpoints.
struct RopeConfig {
  enum class Type { kDefault, kLinear, kLlama3 };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;            ///< kLinear, kLlama3: how far the context was stretched
  double low_freq_factor = 1.0;   ///< kLlama3
  double high_freq_factor = 4.0;  ///< kLlama3
  std::int64_t original_max_position_embeddings = 8192;  ///< kLlama3
};

/// Where a model normalises.
enum class NormPlace {
  kBefore,  ///< what attention and FFN read; and once what the last layer gives
  kAfter,   ///< the sum, each time a branch was added to it; and once the embedding (BERT)
};

/// Shape and constants of a transformer; what config.json (or GGUF keys) says.
struct ModelConfig {
  Family family = Family::kLlama;
  std::int64_t vocab_size = 0;         ///< V
  std::int64_t hidden_size = 0;        ///< D
  std::int64_t intermediate_size = 0;  ///< H of a dense FFN; I, the width of one expert, of an MoE
  std::int64_t num_layers = 0;         ///< L
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;  ///< divides num_heads (grouped-query attention)
  std::int64_t head_dim = 0;
  std::int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;  ///< of all norms, whatever their kind (layer_norm_eps of a BERT)
  Activation activation = Activation::kSilu;
  RopeConfig rope;
  bool tie_word_embeddings = false;           ///< lm_head shares the embedding matrix
  bool attention_bias = false;                ///< q, k, v and o projections carry biases
  bool mlp_bias = false;                      ///< gate, up and down projections carry biases
  std::int64_t sliding_window = 0;            ///< attention span in tokens; 0: unlimited
  std::int64_t num_experts = 0;               ///< E; 0: dense
  std::int64_t experts_per_token = 0;         ///< K
  std::int64_t shared_intermediate_size = 0;  ///< S * I, neurons of an MoE that always run; 0: none
  /// [L], where layers have fewer of them than that; empty: all have as many. GraniteMoeShared
  /// holds rows of zeros for the rest (found in the weights by Checkpoint::open); cleave_bert_moe
  /// says the widths in config.json and pads nothing.
  std::vector<std::int64_t> shared_widths;
  std::optional<std::int32_t> bos_token_id;
  std::vector<std::int32_t> eos_token_ids;
  std::optional<std::int32_t> pad_token_id;
  DType dtype = DType::kF32;  ///< what the checkpoint stores its matrices in
  bool causal = true;         ///< a token sees those before it; false: all of its window (encoders)
  bool has_head = true;       ///< hidden states become logits; false: they are the result
  bool gated_ffn = true;      ///< three matrices; false: two, down act(up x)
  bool layer_norm = false;    ///< mean taken off, weight and bias; false: RMSNorm
  NormPlace norm_place = NormPlace::kBefore;
  bool rotary = true;  ///< positions turn q and k; false: each has a row, added to the embedding
  std::int64_t type_vocab_size = 0;  ///< token types, of which type 0 is computed; 0: none

  bool is_moe() const { return num_experts > 0; }
  /// Shared neurons of a layer without padding.
  std::int64_t shared_width(std::int64_t layer) const {
    return shared_widths.empty() ? shared_intermediate_size
                                 : shared_widths[static_cast<std::size_t>(layer)];
  }
};

/// Reads config.json (text). Understands `rope_parameters` (Transformers 5) and the older
/// `rope_theta` + `rope_scaling`. Of a BERT the encoder is read, whatever head is on it. `origin`
/// names the file in messages.
/// @throws FileError  a key is missing or of the wrong type, a shape makes no sense, the
///                    architecture, activation, rope or position type is unsupported (the message
///                    lists what is), or one of Granite's multipliers is not what a Llama computes
///                    with
ModelConfig parse_model_config(const std::string& json_text, const std::string& origin);

/// Parameters and multiply-adds, counted from shapes alone. Rows that only pad shared slices
/// (ModelConfig::shared_widths) are not counted: cleave drops them when it loads a model. What a
/// stock loader of GraniteMoeShared computes is the cost of the configuration without
/// shared_widths; an encoder has no such rows.
struct ModelCost {
  std::int64_t parameters = 0;         ///< all weights; a tied head counted once
  std::int64_t ffn_parameters = 0;     ///< experts and routers included
  std::int64_t active_parameters = 0;  ///< that one token touches (embedding: one row, not counted)
  std::int64_t macs_per_token = 0;     ///< projections, FFN, router and head; no attention scores
  std::int64_t ffn_macs_per_token = 0;     ///< active experts and the shared slice
  std::int64_t shared_macs_per_token = 0;  ///< the shared slice's part of that
  std::int64_t whole_ffn_macs = 0;  ///< with all experts on: a dense model's ffn_macs_per_token
  std::int64_t router_macs_per_token = 0;
};
ModelCost model_cost(const ModelConfig& config);

}  // namespace cleave
