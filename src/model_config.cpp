#include "cleave/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "fail.h"
#include "json.h"
#include "model_config_check.h"

namespace cleave {
namespace {

constexpr const char* kSupportedFamilies =
    "llama, mistral, mixtral, granitemoe, granitemoeshared, bert and cleave_bert_moe";

/// What Transformers assumes for a key that config.json leaves out; the classes differ.
struct FamilyDefaults {
  Family family;
  const char* model_type;
  const char* architecture;                  // nullptr: any
  std::optional<std::int64_t> num_kv_heads;  // unset: num_heads
  std::int64_t max_position_embeddings;
  double rms_norm_eps;
  double rope_theta;
  std::int64_t sliding_window;
};
constexpr std::array<FamilyDefaults, 7> kFamilies = {{
    {Family::kLlama, "llama", "LlamaForCausalLM", std::nullopt, 2048, 1e-6, 1e4, 0},
    {Family::kMistral, "mistral", "MistralForCausalLM", 8, 131072, 1e-6, 1e4, 4096},
    {Family::kMixtral, "mixtral", "MixtralForCausalLM", 8, 131072, 1e-5, 1e6, 0},
    {Family::kGraniteMoe, "granitemoe", "GraniteMoeForCausalLM", std::nullopt, 2048, 1e-6, 1e4, 0},
    {Family::kGraniteMoeShared, "granitemoeshared", "GraniteMoeSharedForCausalLM", std::nullopt,
     2048, 1e-6, 1e4, 0},
    {Family::kBert, "bert", nullptr, std::nullopt, 512, 1e-12, 1e4, 0},
    {Family::kBertMoe, "cleave_bert_moe", "CleaveBertMoeModel", std::nullopt, 512, 1e-12, 1e4, 0},
}};

bool has_experts(Family family) {
  return family == Family::kMixtral || family == Family::kBertMoe || has_fused_experts(family);
}

const FamilyDefaults& read_family(const JsonReader& json) {
  const auto model_type = json.string("model_type");
  if (!model_type)
    fail_file("{}: key 'model_type' is missing; expected one of {}", json.origin(),
              kSupportedFamilies);
  for (const FamilyDefaults& family : kFamilies)
    if (*model_type == family.model_type) return family;
  fail_file("{}: model_type '{}' is not supported; {} are", json.origin(), *model_type,
            kSupportedFamilies);
}

/// A classifier or a bare decoder has the right model_type but no language-model head.
void check_architecture(const JsonReader& json, const FamilyDefaults& family) {
  const nlohmann::json* listed = json.find("architectures");
  if (listed == nullptr || family.architecture == nullptr) return;
  if (!listed->is_array()) json.fail_type("architectures", "an array of strings");
  for (const auto& name : *listed)
    if (name != family.architecture) json.fail_type("architectures", family.architecture);
}

std::int64_t required(const JsonReader& json, const char* key) {
  const auto value = json.integer(key);
  if (!value) fail_file("{}: key '{}' is missing", json.origin(), key);
  return *value;
}

Activation read_activation(const JsonReader& json, Family family) {
  const std::string name = json.string("hidden_act").value_or(is_bert(family) ? "gelu" : "silu");
  if (name == "swish") return Activation::kSilu;
  if (name == "gelu_new") return Activation::kGeluTanh;
  for (const auto candidate : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                               Activation::kRelu, Activation::kRelu2, Activation::kIdentity})
    if (name == activation_name(candidate)) return candidate;
  json.fail_type("hidden_act", "silu, gelu, gelu_pytorch_tanh, relu, relu2 or linear");
}

RopeConfig::Type read_rope_type(const JsonReader& rope) {
  // `type` is the spelling before Transformers 4.45.
  const std::string key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string name = rope.string(key).value_or("default");
  if (name == "default") return RopeConfig::Type::kDefault;
  if (name == "linear") return RopeConfig::Type::kLinear;
  if (name == "llama3") return RopeConfig::Type::kLlama3;
  rope.fail_type(key, "default, linear or llama3 (other kinds are not supported)");
}

/// `rope_parameters` (Transformers 5; theta inside) or `rope_theta` + `rope_scaling`.
RopeConfig read_rope(const JsonReader& json, double default_theta) {
  RopeConfig config;
  config.theta = json.number("rope_theta").value_or(default_theta);
  const char* key = json.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const nlohmann::json* section = json.find(key);
  if (section != nullptr) {
    if (!section->is_object()) json.fail_type(key, "an object");
    const JsonReader rope(*section, json.origin() + ": " + key);
    config.type = read_rope_type(rope);
    config.theta = rope.number("rope_theta").value_or(config.theta);
    if (config.type != RopeConfig::Type::kDefault) {
      const auto factor = rope.number("factor");
      if (!factor) fail_file("{}: key 'factor' is missing", rope.origin());
      config.factor = *factor;
    }
    if (config.type == RopeConfig::Type::kLlama3) {
      config.low_freq_factor = rope.number("low_freq_factor").value_or(config.low_freq_factor);
      config.high_freq_factor = rope.number("high_freq_factor").value_or(config.high_freq_factor);
      config.original_max_position_embeddings =
          rope.integer("original_max_position_embeddings")
              .value_or(config.original_max_position_embeddings);
    }
    if (rope.number("partial_rotary_factor").value_or(1.0) != 1.0)
      rope.fail_type("partial_rotary_factor", "1 (partial rotation is not supported)");
  }
  if (json.number("partial_rotary_factor").value_or(1.0) != 1.0)
    json.fail_type("partial_rotary_factor", "1 (partial rotation is not supported)");
  return config;
}

/// A token id; -1 (some configs' way to say "none") and null give nothing.
std::optional<std::int32_t> read_token_id(const JsonReader& json, const char* key) {
  const auto id = json.integer(key);
  if (!id || *id < 0) return std::nullopt;
  if (*id > std::numeric_limits<std::int32_t>::max()) json.fail_type(key, "a token id");
  return static_cast<std::int32_t>(*id);
}

std::vector<std::int32_t> read_eos_ids(const JsonReader& json) {
  const nlohmann::json* value = json.find("eos_token_id");
  if (value == nullptr) return {};
  std::vector<std::int32_t> ids;
  if (!value->is_array()) {
    if (const auto id = read_token_id(json, "eos_token_id")) ids.push_back(*id);
    return ids;
  }
  for (const auto& id : *value) {
    if (!id.is_number_unsigned() || id > std::numeric_limits<std::int32_t>::max())
      json.fail_type("eos_token_id", "a token id or a list of token ids");
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

DType read_dtype(const JsonReader& json) {
  const char* key = json.has("dtype") ? "dtype" : "torch_dtype";  // Transformers 5 and before
  const std::string name = json.string(key).value_or("float32");
  if (name == "float32") return DType::kF32;
  if (name == "float16") return DType::kF16;
  if (name == "bfloat16") return DType::kBF16;
  json.fail_type(key, "float32, float16 or bfloat16");
}

/// `shared_intermediate_size` of an encoder: a number, or one a layer.
void read_shared_widths(const JsonReader& json, ModelConfig& config) {
  const char* key = "shared_intermediate_size";
  const nlohmann::json* value = json.find(key);
  if (value == nullptr || !value->is_array()) {
    config.shared_intermediate_size = json.integer(key).value_or(0);
    return;
  }
  for (const auto& width : *value) {
    if (!width.is_number_unsigned() || width >= std::uint64_t{1} << 31)
      json.fail_type(key, "a number of neurons, or one for each layer");
    config.shared_widths.push_back(width.get<std::int64_t>());
  }
  if (static_cast<std::int64_t>(config.shared_widths.size()) != config.num_layers)
    fail_file("{}: {} names {} layers; the model has {}", json.origin(), key,
              config.shared_widths.size(), config.num_layers);
  for (const std::int64_t width : config.shared_widths)
    config.shared_intermediate_size = std::max(config.shared_intermediate_size, width);
}

void read_shapes(const JsonReader& json, const FamilyDefaults& family, ModelConfig& config) {
  config.vocab_size = required(json, "vocab_size");
  config.hidden_size = required(json, "hidden_size");
  config.intermediate_size = required(json, "intermediate_size");
  config.num_layers = required(json, "num_hidden_layers");
  config.num_heads = required(json, "num_attention_heads");
  config.num_kv_heads =
      json.integer("num_key_value_heads").value_or(family.num_kv_heads.value_or(config.num_heads));
  config.max_position_embeddings =
      json.integer("max_position_embeddings").value_or(family.max_position_embeddings);
  if (const auto head_dim = json.integer("head_dim")) {
    config.head_dim = *head_dim;
  } else {
    if (config.num_heads < 1 || config.hidden_size % config.num_heads != 0)
      fail_file(
          "{}: hidden_size {} is not a multiple of num_attention_heads {}, and there is no "
          "head_dim",
          json.origin(), config.hidden_size, config.num_heads);
    config.head_dim = config.hidden_size / config.num_heads;
  }
  if (!has_experts(config.family)) return;
  const bool stock = config.family != Family::kBertMoe;  // ours says it
  config.num_experts =
      stock ? json.integer("num_local_experts").value_or(8) : required(json, "num_local_experts");
  config.experts_per_token = stock ? json.integer("num_experts_per_tok").value_or(2)
                                   : required(json, "num_experts_per_tok");
  if (config.num_experts < 1)
    fail_file("{}: num_local_experts is {}; expected at least 1", json.origin(),
              config.num_experts);
  if (config.family == Family::kBertMoe) read_shared_widths(json, config);
  // Required, because its default differs between versions of Transformers (1024, then 0).
  if (config.family == Family::kGraniteMoeShared)
    config.shared_intermediate_size = required(json, "shared_intermediate_size");
}

/// Granite's classes are Llama's with four multipliers. They are not computed here: only the values
/// with which they do nothing (or, of attention, what Llama does) are accepted.
void check_granite_multipliers(const JsonReader& json, const ModelConfig& config) {
  for (const char* key : {"embedding_multiplier", "residual_multiplier", "logits_scaling"})
    if (json.number(key).value_or(1.0) != 1.0)
      json.fail_type(key, "1 (other values are not supported)");
  const double expected = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  const double scaling = json.number("attention_multiplier").value_or(1.0);
  if (!(std::abs(scaling - expected) <= 1e-6 * expected))
    fail_file(
        "{}: attention_multiplier is {}{}; expected head_dim^-0.5 = {} (other values are not "
        "supported)",
        json.origin(), scaling, json.has("attention_multiplier") ? "" : " by default", expected);
  if (json.string("position_embedding_type").value_or("rope") != "rope")
    json.fail_type("position_embedding_type", "rope");
}

/// What sets a BERT apart from the decoders.
void read_bert(const JsonReader& json, ModelConfig& config) {
  if (json.string("position_embedding_type").value_or("absolute") != "absolute")
    json.fail_type("position_embedding_type", "absolute (relative positions are not supported)");
  for (const char* key : {"is_decoder", "add_cross_attention"})
    if (json.boolean(key).value_or(false))
      json.fail_type(key, "false (of BERTs only encoders are supported)");
  // BertModel does not read these, so other values would mean another model there.
  if (config.num_kv_heads != config.num_heads)
    fail_file("{}: num_key_value_heads is {}; a BERT has as many as num_attention_heads, {}",
              json.origin(), config.num_kv_heads, config.num_heads);
  if (json.has("head_dim") && config.head_dim * config.num_heads != config.hidden_size)
    fail_file("{}: head_dim is {}; a BERT has hidden_size / num_attention_heads = {} / {}",
              json.origin(), config.head_dim, config.hidden_size, config.num_heads);
  config.rms_norm_eps = json.number("layer_norm_eps").value_or(config.rms_norm_eps);
  config.type_vocab_size = json.integer("type_vocab_size").value_or(2);
  config.attention_bias = config.mlp_bias = true;
  config.causal = config.has_head = config.gated_ffn = config.rotary = false;
  config.tie_word_embeddings = false;  // says something about a head
  config.sliding_window = 0;
  config.layer_norm = true;
  config.norm_place = NormPlace::kAfter;
}

}  // namespace

bool is_bert(Family family) { return family == Family::kBert || family == Family::kBertMoe; }

bool has_fused_experts(Family family) {
  return family == Family::kGraniteMoe || family == Family::kGraniteMoeShared;
}

const char* family_name(Family family) {
  for (const FamilyDefaults& known : kFamilies)
    if (known.family == family) return known.model_type;
  fail_argument("family_name: {} is no family", static_cast<int>(family));
}

ModelConfig parse_model_config(const std::string& json_text, const std::string& origin) {
  const nlohmann::json object = parse_json_object(json_text, origin);
  const JsonReader json(object, origin);
  const FamilyDefaults& family = read_family(json);
  check_architecture(json, family);
  if (json.has("quantization_config"))
    fail_file("{}: the model is quantised (quantization_config); use its F32, F16 or BF16 weights",
              origin);

  ModelConfig config;
  config.family = family.family;
  read_shapes(json, family, config);
  config.rms_norm_eps = json.number("rms_norm_eps").value_or(family.rms_norm_eps);
  config.activation = read_activation(json, config.family);
  if (!is_bert(config.family)) config.rope = read_rope(json, family.rope_theta);
  config.tie_word_embeddings = json.boolean("tie_word_embeddings").value_or(false);
  config.attention_bias = json.boolean("attention_bias").value_or(false);
  config.mlp_bias = json.boolean("mlp_bias").value_or(false);
  // `null` is how Mistral says "unlimited"; only a key that is not there takes the default.
  config.sliding_window = object.contains("sliding_window")
                              ? json.integer("sliding_window").value_or(0)
                              : family.sliding_window;
  config.bos_token_id = read_token_id(json, "bos_token_id");
  config.eos_token_ids = read_eos_ids(json);
  config.pad_token_id = read_token_id(json, "pad_token_id");
  config.dtype = read_dtype(json);
  if (is_bert(config.family)) read_bert(json, config);
  check_model_config(config, origin);
  if (has_fused_experts(config.family)) check_granite_multipliers(json, config);
  return config;
}

ModelCost model_cost(const ModelConfig& c) {
  const std::int64_t q_width = c.num_heads * c.head_dim;
  const std::int64_t kv_width = c.num_kv_heads * c.head_dim;
  const std::int64_t attention_macs = 2 * c.hidden_size * (q_width + kv_width);
  const std::int64_t attention =
      attention_macs + (c.attention_bias ? q_width + 2 * kv_width + c.hidden_size : 0);
  const std::int64_t matrices = c.gated_ffn ? 3 : 2;
  const std::int64_t expert_macs = matrices * c.hidden_size * c.intermediate_size;
  const std::int64_t neuron_biases = c.mlp_bias ? matrices - 1 : 0;
  const std::int64_t expert = expert_macs + neuron_biases * c.intermediate_size;
  const std::int64_t output_bias = c.mlp_bias ? c.hidden_size : 0;  // of a layer
  std::int64_t shared_neurons = 0;                                  // of all layers
  for (std::int64_t l = 0; l < c.num_layers; ++l) shared_neurons += c.shared_width(l);
  const std::int64_t shared_macs = matrices * c.hidden_size * shared_neurons;
  const std::int64_t shared = shared_macs + neuron_biases * shared_neurons;
  const std::int64_t router = c.num_experts * c.hidden_size;
  const std::int64_t stored = c.is_moe() ? c.num_experts : 1;
  const std::int64_t active = c.is_moe() ? c.experts_per_token : 1;
  // Two a layer, and one more: of the last layer, or of the embedding.
  const std::int64_t norms = (2 * c.num_layers + 1) * c.hidden_size * (c.layer_norm ? 2 : 1);
  const std::int64_t embedding = c.vocab_size * c.hidden_size;
  const std::int64_t head = c.has_head ? embedding : 0;
  const std::int64_t positions =
      ((c.rotary ? 0 : c.max_position_embeddings) + c.type_vocab_size) * c.hidden_size;

  ModelCost cost;
  cost.ffn_parameters = c.num_layers * (stored * expert + output_bias + router) + shared;
  cost.parameters = c.num_layers * attention + norms + cost.ffn_parameters + embedding + positions +
                    (c.tie_word_embeddings ? 0 : head);
  cost.active_parameters =
      c.num_layers * (attention + active * expert + output_bias + router) + norms + shared + head;
  cost.ffn_macs_per_token = c.num_layers * active * expert_macs + shared_macs;
  cost.shared_macs_per_token = shared_macs;
  cost.whole_ffn_macs = c.num_layers * stored * expert_macs + shared_macs;
  cost.router_macs_per_token = c.num_layers * router;
  cost.macs_per_token =
      c.num_layers * attention_macs + cost.ffn_macs_per_token + cost.router_macs_per_token + head;
  return cost;
}

}  // namespace cleave
