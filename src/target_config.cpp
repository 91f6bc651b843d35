#include "target_config.h"

#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

#include "fail.h"

namespace cleave {
namespace {

using nlohmann::ordered_json;

const char* torch_dtype(DType dtype) {
  if (dtype == DType::kF16) return "float16";
  if (dtype == DType::kBF16) return "bfloat16";
  return "float32";
}

/// What both spellings of the rope settings share; an empty object for plain rope.
ordered_json rope_scaling(const RopeConfig& rope) {
  ordered_json scaling = ordered_json::object();
  if (rope.type == RopeConfig::Type::kDefault) return scaling;
  const bool llama3 = rope.type == RopeConfig::Type::kLlama3;
  scaling["rope_type"] = llama3 ? "llama3" : "linear";
  scaling["factor"] = rope.factor;
  if (llama3) {
    scaling["low_freq_factor"] = rope.low_freq_factor;
    scaling["high_freq_factor"] = rope.high_freq_factor;
    scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings;
  }
  return scaling;
}

/// Transformers 5 reads only `rope_parameters`; older ones, and engines written for them, fall back
/// to theta 10000 without a word unless `rope_theta` is there. So both are written.
void add_rope(const RopeConfig& rope, ordered_json& json) {
  const ordered_json scaling = rope_scaling(rope);
  json["rope_theta"] = rope.theta;
  json["rope_scaling"] = scaling.empty() ? ordered_json(nullptr) : scaling;
  if (!scaling.empty()) json["rope_scaling"]["rope_theta"] = rope.theta;
  ordered_json parameters = scaling;
  parameters["rope_theta"] = rope.theta;
  if (scaling.empty()) parameters["rope_type"] = "default";
  json["rope_parameters"] = parameters;
}

void add_token_ids(const ModelConfig& config, ordered_json& json) {
  if (config.bos_token_id) json["bos_token_id"] = *config.bos_token_id;
  if (config.eos_token_ids.size() == 1) json["eos_token_id"] = config.eos_token_ids.front();
  if (config.eos_token_ids.size() > 1) json["eos_token_id"] = config.eos_token_ids;
  if (config.pad_token_id) json["pad_token_id"] = *config.pad_token_id;
}

/// What only the classes with experts have.
void add_experts(const ModelConfig& c, ordered_json& json) {
  json["num_local_experts"] = c.num_experts;
  json["num_experts_per_tok"] = c.experts_per_token;
  json["output_router_logits"] = false;
  json["router_aux_loss_coef"] = 0.001;
}

/// Granite is Llama with multipliers; these values make them do nothing. Transformers' own default
/// of the attention's is 1, not Llama's head_dim^-0.5.
void add_granite(const ModelConfig& c, ordered_json& json) {
  json["shared_intermediate_size"] = c.shared_intermediate_size;
  json["attention_bias"] = c.attention_bias;
  json["attention_multiplier"] = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  json["embedding_multiplier"] = 1.0;
  json["residual_multiplier"] = 1.0;
  json["logits_scaling"] = 1.0;
}

void add_family(const ModelConfig& c, ordered_json& json) {
  if (c.is_moe()) add_experts(c, json);
  switch (c.family) {
    case Family::kMixtral:
      json["router_jitter_noise"] = 0.0;
      json["sliding_window"] =
          c.sliding_window > 0 ? ordered_json(c.sliding_window) : ordered_json(nullptr);
      break;
    case Family::kGraniteMoeShared:
      add_granite(c, json);
      break;
    case Family::kLlama:
      json["attention_bias"] = c.attention_bias;
      json["mlp_bias"] = c.mlp_bias;
      break;
    default:
      fail_argument("target_config_json: {} is no family that is written", family_name(c.family));
  }
}

const char* architecture(Family family) {
  if (family == Family::kMixtral) return "MixtralForCausalLM";
  return family == Family::kLlama ? "LlamaForCausalLM" : "GraniteMoeSharedForCausalLM";
}

/// A BERT's config.json. What Transformers' class has no key for is there only with experts.
std::string bert_config_json(const ModelConfig& c) {
  ordered_json json = {
      {"architectures", ordered_json::array({c.is_moe() ? "CleaveBertMoeModel" : "BertModel"})},
      {"model_type", family_name(c.family)},
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_layers},
      {"num_attention_heads", c.num_heads},
      {"hidden_act", activation_name(c.activation)},
      {"max_position_embeddings", c.max_position_embeddings},
      {"position_embedding_type", "absolute"},
      {"type_vocab_size", c.type_vocab_size},
      {"layer_norm_eps", c.rms_norm_eps},
      {"is_decoder", false},
  };
  if (c.is_moe()) {
    json["num_local_experts"] = c.num_experts;
    json["num_experts_per_tok"] = c.experts_per_token;
    json["shared_intermediate_size"] = c.shared_intermediate_size;
    if (!c.shared_widths.empty()) json["shared_intermediate_size"] = c.shared_widths;
  }
  json["dtype"] = torch_dtype(c.dtype);
  json["torch_dtype"] = torch_dtype(c.dtype);
  add_token_ids(c, json);
  return json.dump(2) + "\n";
}

/// Without experts, FFNs of `hidden` neurons.
ModelConfig dense_config(const ModelConfig& source, Family family, std::int64_t hidden,
                         DType dtype) {
  ModelConfig config = source;
  config.family = family;
  config.num_experts = 0;
  config.experts_per_token = 0;
  config.shared_intermediate_size = 0;
  config.shared_widths.clear();
  config.intermediate_size = hidden;
  config.dtype = dtype;
  return config;
}

}  // namespace

ModelConfig mixtral_config(const ModelConfig& source, const MixtralShape& shape, DType dtype) {
  ModelConfig config = source;
  config.family = Family::kMixtral;
  config.num_experts = shape.num_experts;
  config.experts_per_token = shape.experts_per_token;
  config.intermediate_size = shape.expert_width;
  config.shared_intermediate_size = 0;
  config.tie_word_embeddings = false;
  config.dtype = dtype;
  return config;
}

ModelConfig granite_moe_shared_config(const ModelConfig& source, const GraniteMoeSharedShape& shape,
                                      DType dtype) {
  ModelConfig config = mixtral_config(
      source, {shape.num_experts, shape.experts_per_token, shape.expert_width}, dtype);
  config.family = Family::kGraniteMoeShared;
  config.shared_intermediate_size = shape.shared_width;
  config.sliding_window = 0;
  return config;
}

ModelConfig llama_dense_config(const ModelConfig& source, std::int64_t hidden, DType dtype) {
  ModelConfig config = dense_config(source, Family::kLlama, hidden, dtype);
  config.sliding_window = 0;
  return config;
}

ModelConfig bert_moe_config(const ModelConfig& source, const BertMoeShape& shape, DType dtype) {
  ModelConfig config = bert_dense_config(source, shape.expert_width, dtype);
  config.family = Family::kBertMoe;
  config.num_experts = shape.num_experts;
  config.experts_per_token = shape.experts_per_token;
  if (shape.shared_widths.empty()) return config;
  const auto [least, most] =
      std::minmax_element(shape.shared_widths.begin(), shape.shared_widths.end());
  config.shared_intermediate_size = *most;
  if (*least != *most) config.shared_widths = shape.shared_widths;
  return config;
}

ModelConfig bert_dense_config(const ModelConfig& source, std::int64_t hidden, DType dtype) {
  return dense_config(source, Family::kBert, hidden, dtype);
}

std::string target_config_json(const ModelConfig& c) {
  if (is_bert(c.family)) return bert_config_json(c);
  ordered_json json = {
      {"architectures", ordered_json::array({architecture(c.family)})},
      {"model_type", family_name(c.family)},
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_layers},
      {"num_attention_heads", c.num_heads},
      {"num_key_value_heads", c.num_kv_heads},
      {"head_dim", c.head_dim},
      {"hidden_act", activation_name(c.activation)},
      {"max_position_embeddings", c.max_position_embeddings},
      {"rms_norm_eps", c.rms_norm_eps},
      {"attention_dropout", 0.0},
  };
  add_family(c, json);
  json["tie_word_embeddings"] = c.tie_word_embeddings;
  json["use_cache"] = true;
  json["dtype"] = torch_dtype(c.dtype);
  json["torch_dtype"] = torch_dtype(c.dtype);
  add_rope(c.rope, json);
  // Transformers' own defaults are 1 and 2; a model without the tokens must say so.
  json["bos_token_id"] = nullptr;
  json["eos_token_id"] = nullptr;
  json["pad_token_id"] = nullptr;
  add_token_ids(c, json);
  return json.dump(2) + "\n";
}

std::string generation_config_json(const ModelConfig& config) {
  ordered_json json = ordered_json::object();
  if (!config.has_head) return {};
  add_token_ids(config, json);
  if (json.empty()) return {};
  return json.dump(2) + "\n";
}

}  // namespace cleave
