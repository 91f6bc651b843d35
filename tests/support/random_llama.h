#pragma once

#include <cmath>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/model.h"
#include "support/random_ffn.h"

// A dense Llama of a few thousand random weights, written as a checkpoint directory.
namespace cleave::testing {

struct RandomLlamaSpec {
  std::int64_t vocab = 40, d_model = 16, hidden = 24, layers = 2, heads = 4, kv_heads = 2;
  std::uint64_t seed = 1;
};

inline std::string llama_config_json(const RandomLlamaSpec& s) {
  const auto n = [](std::int64_t value) { return std::to_string(value); };
  return R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_act":"silu",)"
         R"("tie_word_embeddings":false,"torch_dtype":"float32","rms_norm_eps":1e-5,)"
         R"("rope_theta":10000.0,"max_position_embeddings":128,"bos_token_id":0,"eos_token_id":1,)"
         R"("vocab_size":)" +
         n(s.vocab) + R"(,"hidden_size":)" + n(s.d_model) + R"(,"intermediate_size":)" +
         n(s.hidden) + R"(,"num_hidden_layers":)" + n(s.layers) + R"(,"num_attention_heads":)" +
         n(s.heads) + R"(,"num_key_value_heads":)" + n(s.kv_heads) + "}";
}

/// Writes config.json, tokenizer.json (bytes only) and model.safetensors into `dir`.
inline void write_random_llama(const std::filesystem::path& dir, const RandomLlamaSpec& s) {
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << llama_config_json(s);
  std::ofstream(dir / "tokenizer.json") << R"({"version":"1.0","model":{"type":"BPE","vocab":{},)"
                                           R"("merges":[]}})";
  std::vector<NamedTensor> tensors;
  std::uint64_t seed = s.seed * 1000;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, double std_dev) {
    const std::uint64_t own = ++seed;
    const std::int64_t count = shape.size() == 2 ? shape[0] * shape[1] : shape[0];
    tensors.push_back({name, shape, [=] {
                         // Norm weights lie around 1.
                         if (shape.size() == 1) {
                           auto values = random_values(count, own, 0.1);
                           for (float& v : values) v += 1.0f;
                           return values;
                         }
                         return random_values(count, own, std_dev);
                       }});
  };
  const std::int64_t D = s.d_model, H = s.hidden, kv = D / s.heads * s.kv_heads;
  const double in = 1.0 / std::sqrt(static_cast<double>(D));
  add("model.embed_tokens.weight", {s.vocab, D}, 1.0);
  add("lm_head.weight", {s.vocab, D}, in);
  add("model.norm.weight", {D}, 0);
  for (std::int64_t l = 0; l < s.layers; ++l) {
    const std::string prefix = "model.layers." + std::to_string(l) + ".";
    add(prefix + "input_layernorm.weight", {D}, 0);
    add(prefix + "post_attention_layernorm.weight", {D}, 0);
    add(prefix + "self_attn.q_proj.weight", {D, D}, in);
    add(prefix + "self_attn.k_proj.weight", {kv, D}, in);
    add(prefix + "self_attn.v_proj.weight", {kv, D}, in);
    add(prefix + "self_attn.o_proj.weight", {D, D}, in);
    add(prefix + "mlp.gate_proj.weight", {H, D}, in);
    add(prefix + "mlp.up_proj.weight", {H, D}, in);
    add(prefix + "mlp.down_proj.weight", {D, H}, 1.0 / std::sqrt(static_cast<double>(H)));
  }
  write_safetensors(dir / "model.safetensors", tensors, DType::kF32);
}

/// All logits of one window. [T, V]
inline std::vector<float> logits_of(Model& model, std::span<const std::int32_t> tokens) {
  const auto T = static_cast<std::int64_t>(tokens.size());
  const std::int64_t D = model.config().hidden_size, V = model.config().vocab_size;
  KvCache cache(model.config(), T);
  std::vector<float> hidden(static_cast<std::size_t>(T * D)),
      logits(static_cast<std::size_t>(T * V));
  model.forward(tokens, cache, {hidden.data(), T, D});
  model.logits({hidden.data(), T, D}, {logits.data(), T, V});
  return logits;
}

}  // namespace cleave::testing
