#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numbers>
#include <set>
#include <string>
#include <utility>

#include "decoder_tensors.h"
#include "fail.h"
#include "model_config_check.h"
#include "model_files.h"
#include "quants.h"

// What a GGUF of the `llama` architecture (Llama, Mistral) means in HuggingFace terms:
// configuration from its keys, tensor names, and which rows are interleaved.

namespace cleave {
namespace {

std::string origin_of(const GgufFile& gguf) { return gguf.path().string(); }

std::int64_t required_integer(const GgufFile& gguf, const char* key) {
  const auto value = gguf.integer(key);
  if (!value) fail_file("{}: key '{}' is missing", origin_of(gguf), key);
  return *value;
}

/// GGUF stores constants as float32; the shortest decimal that names the same float is what the
/// author of the model wrote (1e-05, not 9.99999975e-06).
double as_written(double float_value) {
  const std::string shortest = fmt::format("{}", static_cast<float>(float_value));
  return std::strtod(shortest.c_str(), nullptr);
}

void check_architecture(const GgufFile& gguf) {
  const auto architecture = gguf.string("general.architecture");
  if (!architecture)
    fail_file("{}: key 'general.architecture' is missing; expected 'llama'", origin_of(gguf));
  if (*architecture != "llama")
    fail_file("{}: architecture '{}' is not supported; 'llama' (Llama, Mistral) is",
              origin_of(gguf), *architecture);
  if (gguf.integer("llama.expert_count").value_or(0) > 0)
    fail_file(
        "{}: is a mixture of experts; only dense GGUF models can be read. Use its HuggingFace "
        "directory",
        origin_of(gguf));
}

/// Llama 3.1's scaling, as a divisor per pair of dimensions: the same formula as Transformers'
/// `rope_type: llama3`.
double llama3_divisor(const RopeConfig& rope, std::int64_t pair, std::int64_t head_dim) {
  const double exponent = 2.0 * static_cast<double>(pair) / static_cast<double>(head_dim);
  const double wavelength = 2.0 * std::numbers::pi * std::pow(rope.theta, exponent);
  const double original = static_cast<double>(rope.original_max_position_embeddings);
  if (wavelength < original / rope.high_freq_factor) return 1.0;
  if (wavelength > original / rope.low_freq_factor) return rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return 1.0 / ((1.0 - smooth) / rope.factor + smooth);
}

/// A GGUF holds the result of Llama 3.1's scaling (rope_freqs.weight), not its parameters. All
/// released models use 1, 4 and 8192, and the largest divisor is the factor; if that explains every
/// number it is taken, otherwise the file is refused.
void read_rope_freqs(const GgufFile& gguf, const GgufTensor& tensor, ModelConfig& config) {
  std::vector<float> divisors(static_cast<std::size_t>(tensor.num_elements()));
  decode(tensor.dtype, gguf.raw(tensor), divisors);
  RopeConfig rope = config.rope;
  rope.type = RopeConfig::Type::kLlama3;
  rope.factor = as_written(*std::max_element(divisors.begin(), divisors.end()));
  rope.low_freq_factor = 1.0;
  rope.high_freq_factor = 4.0;
  rope.original_max_position_embeddings = 8192;
  bool explained = config.rope.type == RopeConfig::Type::kDefault &&
                   static_cast<std::int64_t>(divisors.size()) == config.head_dim / 2;
  for (std::size_t i = 0; explained && i < divisors.size(); ++i) {
    const double expected = llama3_divisor(rope, static_cast<std::int64_t>(i), config.head_dim);
    explained = std::abs(divisors[i] - expected) <= 1e-4 * expected;
  }
  if (!explained)
    fail_file(
        "{}: tensor 'rope_freqs.weight' is not the scaling of Llama 3.1 to 3.3, the only one that "
        "is supported. Use the model's HuggingFace directory",
        origin_of(gguf));
  config.rope = rope;
}

void read_rope(const GgufFile& gguf, ModelConfig& config) {
  config.rope.theta = as_written(gguf.number("llama.rope.freq_base").value_or(10000.0));
  const std::int64_t rotated = gguf.integer("llama.rope.dimension_count").value_or(config.head_dim);
  if (rotated != config.head_dim)
    fail_file("{}: key 'llama.rope.dimension_count' is {}; expected the head width {}",
              origin_of(gguf), rotated, config.head_dim);
  const std::string scaling = gguf.string("llama.rope.scaling.type").value_or("none");
  if (scaling == "linear") {
    config.rope.type = RopeConfig::Type::kLinear;
    config.rope.factor = as_written(gguf.number("llama.rope.scaling.factor").value_or(1.0));
  } else if (scaling != "none") {
    fail_file("{}: key 'llama.rope.scaling.type' is '{}'; none and linear are supported",
              origin_of(gguf), scaling);
  }
  const GgufTensor* freqs = gguf.find("rope_freqs.weight");
  if (freqs != nullptr) read_rope_freqs(gguf, *freqs, config);
}

/// All of a group of biases or none: a decoder here has one switch for the group.
bool read_bias_switch(const GgufFile& gguf, std::span<const char* const> projections) {
  std::size_t present = 0;
  for (const char* name : projections)
    present += gguf.find(fmt::format("blk.0.{}.bias", name)) != nullptr ? 1 : 0;
  if (present != 0 && present != projections.size())
    fail_file("{}: {} of {} have biases; expected all or none", origin_of(gguf), present,
              fmt::join(projections, ", "));
  return present != 0;
}

std::optional<std::int32_t> read_token_id(const GgufFile& gguf, const char* key) {
  const auto id = gguf.integer(key);
  if (!id) return std::nullopt;
  if (*id < 0 || *id > std::numeric_limits<std::int32_t>::max())
    fail_file("{}: key '{}' is {}; expected a token id", origin_of(gguf), key, *id);
  return static_cast<std::int32_t>(*id);
}

void read_vocabulary(const GgufFile& gguf, ModelConfig& config) {
  const GgufTensor* embedding = gguf.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2)
    fail_file("{}: tensor 'token_embd.weight' is missing or no matrix", origin_of(gguf));
  config.vocab_size = embedding->shape[0];
  const auto tokens = gguf.strings("tokenizer.ggml.tokens");
  if (tokens && static_cast<std::int64_t>(tokens->size()) > config.vocab_size)
    fail_file("{}: the tokenizer has {} tokens, the embedding {} rows", origin_of(gguf),
              tokens->size(), config.vocab_size);
  config.tie_word_embeddings = gguf.find("output.weight") == nullptr;
  config.bos_token_id = read_token_id(gguf, "tokenizer.ggml.bos_token_id");
  config.pad_token_id = read_token_id(gguf, "tokenizer.ggml.padding_token_id");
  const auto eos = read_token_id(gguf, "tokenizer.ggml.eos_token_id");
  if (eos) config.eos_token_ids = {*eos};
}

ModelConfig read_config(const GgufFile& gguf) {
  check_architecture(gguf);
  ModelConfig config;
  config.family = Family::kLlama;
  config.hidden_size = required_integer(gguf, "llama.embedding_length");
  config.intermediate_size = required_integer(gguf, "llama.feed_forward_length");
  config.num_layers = required_integer(gguf, "llama.block_count");
  config.num_heads = required_integer(gguf, "llama.attention.head_count");
  config.num_kv_heads = gguf.integer("llama.attention.head_count_kv").value_or(config.num_heads);
  config.max_position_embeddings = required_integer(gguf, "llama.context_length");
  const auto head_dim = gguf.integer("llama.attention.key_length");
  if (!head_dim && (config.num_heads < 1 || config.hidden_size % config.num_heads != 0))
    fail_file("{}: embedding_length {} is not a multiple of head_count {}", origin_of(gguf),
              config.hidden_size, config.num_heads);
  config.head_dim = head_dim ? *head_dim : config.hidden_size / config.num_heads;
  if (gguf.integer("llama.attention.value_length").value_or(config.head_dim) != config.head_dim)
    fail_file("{}: keys and values have different widths, which is not supported", origin_of(gguf));
  const auto eps = gguf.number("llama.attention.layer_norm_rms_epsilon");
  if (!eps)
    fail_file("{}: key 'llama.attention.layer_norm_rms_epsilon' is missing", origin_of(gguf));
  config.rms_norm_eps = as_written(*eps);
  config.sliding_window = gguf.integer("llama.attention.sliding_window").value_or(0);
  read_vocabulary(gguf, config);
  check_model_config(config, origin_of(gguf));
  read_rope(gguf, config);
  check_model_config(config, origin_of(gguf));
  static constexpr const char* kAttention[] = {"attn_q", "attn_k", "attn_v", "attn_output"};
  static constexpr const char* kFfn[] = {"ffn_gate", "ffn_up", "ffn_down"};
  config.attention_bias = read_bias_switch(gguf, kAttention);
  config.mlp_bias = read_bias_switch(gguf, kFfn);
  return config;
}

constexpr std::array<std::pair<std::string_view, std::string_view>, 9> kBlockNames = {{
    {"attn_norm", "input_layernorm"},
    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},
    {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"},
    {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},
    {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
}};

/// "blk.7.attn_q.weight" -> "model.layers.7.self_attn.q_proj.weight"; empty for a name we do not
/// know.
std::string huggingface_name(const std::string& name) {
  if (name == "token_embd.weight") return "model.embed_tokens.weight";
  if (name == "output_norm.weight") return "model.norm.weight";
  if (name == "output.weight") return "lm_head.weight";
  if (name.rfind("blk.", 0) != 0) return {};
  const std::size_t number_end = name.find('.', 4);
  const std::size_t suffix = name.rfind('.');
  if (number_end == std::string::npos || suffix <= number_end) return {};
  const std::string_view view(name);
  const std::string_view layer = view.substr(4, number_end - 4);
  const std::string_view kind = view.substr(suffix);
  const std::string_view part = view.substr(number_end + 1, suffix - number_end - 1);
  if (kind != ".weight" && kind != ".bias") return {};
  for (const auto& [theirs, ours] : kBlockNames)
    if (part == theirs) return fmt::format("model.layers.{}.{}{}", layer, ours, kind);
  return {};
}

std::int64_t interleaved_heads(const std::string& name, const ModelConfig& config) {
  if (name.find(".self_attn.q_proj.") != std::string::npos) return config.num_heads;
  if (name.find(".self_attn.k_proj.") != std::string::npos) return config.num_kv_heads;
  return 0;
}

/// A tensor beyond the expected (a bias in one layer only) would change what the model computes.
void check_nothing_else(const ModelFiles& model) {
  std::set<std::string> expected;
  for (const ExpectedTensor& tensor : decoder_tensors(model.config)) expected.insert(tensor.name);
  for (const TensorInfo& info : model.infos)
    if (expected.count(info.name) == 0)
      fail_file("{}: tensor '{}' has no place in this model", origin_of(*model.gguf), info.name);
}

}  // namespace

ModelFiles open_gguf_model(const std::filesystem::path& file) {
  ModelFiles model;
  model.format = Checkpoint::Format::kGguf;
  model.directory = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  model.weight_files = {file};
  model.gguf = GgufFile::open(file);
  const GgufFile& gguf = *model.gguf;
  model.config = read_config(gguf);

  std::vector<std::pair<TensorInfo, StoredTensor>> found;
  for (const GgufTensor& tensor : gguf.tensors()) {
    if (tensor.name == "rope_freqs.weight") continue;  // part of the configuration, see read_rope
    std::string name = huggingface_name(tensor.name);
    if (name.empty())
      fail_file("{}: tensor '{}' belongs to no Llama or Mistral model", origin_of(gguf),
                tensor.name);
    const std::int64_t heads = interleaved_heads(name, model.config);
    found.push_back({{std::move(name), tensor.dtype, tensor.shape}, {gguf.raw(tensor), heads}});
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first.name < b.first.name; });
  for (auto& [info, stored] : found) {
    model.infos.push_back(std::move(info));
    model.stored.push_back(stored);
  }
  check_decoder_tensors(model.config, model.infos, origin_of(gguf));
  check_nothing_else(model);
  return model;
}

}  // namespace cleave
