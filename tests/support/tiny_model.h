#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"

// A dense Llama of a few thousand weights, written where a test wants it.
namespace cleave::testing {

inline void write_text(const std::filesystem::path& file, const std::string& text) {
  std::ofstream(file, std::ios::binary) << text;
}

/// Changes one byte in place. (Writing a file anew for each of thousands of damages costs
/// milliseconds apiece: file systems flush what replaces an old content.)
inline void overwrite_byte(const std::filesystem::path& file, std::size_t at, char value) {
  std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
  stream.seekp(static_cast<std::streamoff>(at));
  stream.put(value);
}

/// 2 layers, D 8, H 12, 4 heads of 2 with 2 kv heads, V 11.
inline std::string tiny_config_json(const std::string& dtype = "float32",
                                    const std::string& more = "") {
  return R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 11,
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-05,
    "hidden_act": "silu", "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": [2, 3],
    "pad_token_id": 0, )" +
         more + R"("torch_dtype": ")" + dtype + "\"}";
}

/// Tensors of tiny_config_json(), normally distributed.
inline std::vector<NamedTensor> tiny_tensors(unsigned seed = 0) {
  std::vector<NamedTensor> tensors;
  std::mt19937 rng(seed);
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    std::normal_distribution<float> normal(0.0f, 0.5f);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = normal(rng);
    tensors.push_back({name, std::move(shape), [values] { return values; }});
  };
  add("model.embed_tokens.weight", {11, 8});
  add("model.norm.weight", {8});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix + "input_layernorm.weight", {8});
    add(prefix + "post_attention_layernorm.weight", {8});
    add(prefix + "self_attn.q_proj.weight", {8, 8});
    add(prefix + "self_attn.k_proj.weight", {4, 8});
    add(prefix + "self_attn.v_proj.weight", {4, 8});
    add(prefix + "self_attn.o_proj.weight", {8, 8});
    add(prefix + "mlp.gate_proj.weight", {12, 8});
    add(prefix + "mlp.up_proj.weight", {12, 8});
    add(prefix + "mlp.down_proj.weight", {8, 12});
  }
  return tensors;
}

/// A whole directory: config.json, model.safetensors and two companion files.
inline void write_tiny_model(const std::filesystem::path& directory, DType dtype = DType::kF32) {
  std::filesystem::create_directories(directory);
  const char* name = dtype == DType::kF16    ? "float16"
                     : dtype == DType::kBF16 ? "bfloat16"
                                             : "float32";
  write_text(directory / "config.json", tiny_config_json(name));
  write_text(directory / "tokenizer.json", "{\"not\": \"read here\"}\n");
  write_text(directory / "tokenizer_config.json", "{\"padding_side\":  \"left\"}");
  write_safetensors(directory / "model.safetensors", tiny_tensors(), dtype);
}

}  // namespace cleave::testing
