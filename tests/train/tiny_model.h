#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/export.h"
#include "cleave/text.h"

// A random model small enough to train in a test, written as the directories that cleave reads: the
// dense original, and its split into contiguous experts.
namespace cleave::testing {

struct TinySpec {
  std::int64_t V = 64, D = 16, H = 32, L = 2, E = 4, K = 2;
  GateMode gate = GateMode::kSoftmax;
  double folded_scale = 4.0;  ///< what `down` is multiplied by when it is written
  std::uint64_t seed = 1;
  bool provenance = true;
};

struct TinyTensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
  float& at(std::int64_t r, std::int64_t c) { return values[r * shape[1] + c]; }
};
using TinyTensors = std::map<std::string, TinyTensor>;

inline TinyTensor random_tensor(std::mt19937_64& rng, std::vector<std::int64_t> shape,
                                float scale) {
  std::int64_t n = 1;
  for (const auto s : shape) n *= s;
  std::normal_distribution<float> normal(0.0f, scale);
  TinyTensor t{std::move(shape), std::vector<float>(static_cast<std::size_t>(n))};
  for (float& v : t.values) v = normal(rng);
  return t;
}

/// Two heads of D / 2, one key-value head.
inline TinyTensors tiny_dense(const TinySpec& s) {
  std::mt19937_64 rng(s.seed);
  TinyTensors t;
  t["model.embed_tokens.weight"] = random_tensor(rng, {s.V, s.D}, 1.0f);
  t["lm_head.weight"] = random_tensor(rng, {s.V, s.D}, 0.5f);
  t["model.norm.weight"] = {{s.D}, std::vector<float>(static_cast<std::size_t>(s.D), 1.0f)};
  for (std::int64_t l = 0; l < s.L; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    t[p + "input_layernorm.weight"] = t["model.norm.weight"];
    t[p + "post_attention_layernorm.weight"] = t["model.norm.weight"];
    t[p + "self_attn.q_proj.weight"] = random_tensor(rng, {s.D, s.D}, 0.25f);
    t[p + "self_attn.k_proj.weight"] = random_tensor(rng, {s.D / 2, s.D}, 0.25f);
    t[p + "self_attn.v_proj.weight"] = random_tensor(rng, {s.D / 2, s.D}, 0.25f);
    t[p + "self_attn.o_proj.weight"] = random_tensor(rng, {s.D, s.D}, 0.1f);
    t[p + "mlp.gate_proj.weight"] = random_tensor(rng, {s.H, s.D}, 0.3f);
    t[p + "mlp.up_proj.weight"] = random_tensor(rng, {s.H, s.D}, 0.3f);
    t[p + "mlp.down_proj.weight"] = random_tensor(rng, {s.D, s.H}, 0.3f);
  }
  return t;
}

/// Contiguous experts, routers of std 0.3.
inline TinyTensors tiny_split(const TinyTensors& dense, const TinySpec& s) {
  std::mt19937_64 rng(s.seed + 1000);
  const std::int64_t width = s.H / s.E;
  TinyTensors t;
  for (const auto& [name, tensor] : dense)
    if (name.find(".mlp.") == std::string::npos) t[name] = tensor;
  for (std::int64_t l = 0; l < s.L; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".mlp.";
    t[MixtralNames::router(l)] = random_tensor(rng, {s.E, s.D}, 0.3f);
    if (s.gate == GateMode::kHard)
      for (float& v : t[MixtralNames::router(l)].values) v *= static_cast<float>(kHardGateEpsilon);
    for (std::int64_t e = 0; e < s.E; ++e) {
      const auto rows = [&](const TinyTensor& m) {
        const auto begin = m.values.begin() + e * width * s.D;
        return TinyTensor{{width, s.D}, std::vector<float>(begin, begin + width * s.D)};
      };
      t[MixtralNames::gate(l, e)] = rows(dense.at(p + "gate_proj.weight"));
      t[MixtralNames::up(l, e)] = rows(dense.at(p + "up_proj.weight"));
      TinyTensor down{{s.D, width}, std::vector<float>(static_cast<std::size_t>(s.D * width))};
      for (std::int64_t d = 0; d < s.D; ++d)
        for (std::int64_t j = 0; j < width; ++j)
          down.at(d, j) = dense.at(p + "down_proj.weight").values[d * s.H + e * width + j] *
                          static_cast<float>(s.folded_scale);
      t[MixtralNames::down(l, e)] = std::move(down);
    }
  }
  return t;
}

inline void write_model(const std::filesystem::path& dir, const TinyTensors& tensors,
                        const std::string& config) {
  std::filesystem::create_directories(dir);
  std::vector<NamedTensor> named;
  for (const auto& [name, tensor] : tensors)
    named.push_back({name, tensor.shape, [values = tensor.values] { return values; }});
  write_safetensors(dir / "model.safetensors", named, DType::kF32);
  std::ofstream(dir / "config.json") << config;
}

inline std::string tiny_config(const TinySpec& s, bool moe) {
  const auto n = [](auto v) { return std::to_string(v); };
  std::string text =
      std::string("{\"architectures\": [\"") + (moe ? "MixtralForCausalLM" : "LlamaForCausalLM") +
      "\"], \"model_type\": \"" + (moe ? "mixtral" : "llama") + "\", \"vocab_size\": " + n(s.V) +
      ", \"hidden_size\": " + n(s.D) + ", \"intermediate_size\": " + n(moe ? s.H / s.E : s.H) +
      ", \"num_hidden_layers\": " + n(s.L) +
      ", \"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"head_dim\": " + n(s.D / 2) +
      ", \"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, "
      "\"hidden_act\": \"silu\", \"tie_word_embeddings\": false";
  if (moe) text += ", \"num_local_experts\": " + n(s.E) + ", \"num_experts_per_tok\": " + n(s.K);
  return text + "}";
}

inline void write_tiny_provenance(const std::filesystem::path& dir, const TinySpec& s) {
  const bool hard = s.gate == GateMode::kHard;
  std::ofstream out(dir / "cleave.json");
  out.precision(17);  // 2^-10 needs ten digits
  out << "{\"format_version\": 1, \"tool_version\": \"test\", \"source\": \"tiny\", "
         "\"source_sha256\": \"0\", \"num_experts\": "
      << s.E << ", \"experts_per_token\": " << s.K
      << ", \"partition\": \"contiguous\", \"seed\": 0, \"gate\": \"" << (hard ? "hard" : "softmax")
      << "\", \"folded_scale\": " << s.folded_scale
      << ", \"router_epsilon\": " << (hard ? kHardGateEpsilon : 1.0)
      << ", \"router\": \"random\", \"spec\": {}, \"neuron_order\": []}";
}

/// dir/dense and dir/moe.
inline void write_tiny(const std::filesystem::path& dir, const TinySpec& s,
                       const TinyTensors& dense) {
  write_model(dir / "dense", dense, tiny_config(s, false));
  write_model(dir / "moe", tiny_split(dense, s), tiny_config(s, true));
  if (s.provenance) write_tiny_provenance(dir / "moe", s);
}

/// A text with something to learn: the next token is mostly 3 t + 7 modulo V.
inline TokenWindows tiny_text(std::int64_t V, std::int64_t context, std::int64_t windows,
                              std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  TokenWindows text;
  text.context = context;
  std::int64_t token = 1;
  for (std::int64_t i = 0; i < context * windows; ++i) {
    text.tokens.push_back(static_cast<std::int32_t>(token));
    token = rng() % 10 == 0 ? static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(V))
                            : (3 * token + 7) % V;
  }
  return text;
}

}  // namespace cleave::testing
