#include "gguf_writer.h"

#include <gguf.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

using namespace cleave;

namespace {

std::vector<float> read_matrix(const Checkpoint& model, const std::string& name) {
  std::vector<float> values = model.read(name);
  for (float& v : values) v = ggml_bf16_to_fp32(ggml_fp32_to_bf16(v));
  return values;
}

std::string layer_name(std::int64_t layer, const char* rest) {
  return "model.layers." + std::to_string(layer) + "." + rest;
}

struct FfnNames {
  std::string gate, up, down;
};
FfnNames ffn_names(const ModelConfig& c, std::int64_t layer, std::int64_t e) {
  if (has_fused_experts(c.family))
    throw std::runtime_error(std::string(family_name(c.family)) +
                             ": only Llama and Mixtral directories are handled here");
  if (c.is_moe())
    return {MixtralNames::gate(layer, e), MixtralNames::up(layer, e), MixtralNames::down(layer, e)};
  return {layer_name(layer, "mlp.gate_proj.weight"), layer_name(layer, "mlp.up_proj.weight"),
          layer_name(layer, "mlp.down_proj.weight")};
}

void append(const std::vector<float>& values, std::vector<float>& to) {
  to.insert(to.end(), values.begin(), values.end());
}

/// A GGUF tensor that is still to be read. Shape as ggml has it: innermost first.
struct Entry {
  std::string name;
  std::vector<std::int64_t> shape;
  ggml_type type;
  std::function<std::vector<float>()> load;
};

class Writer {
 public:
  Writer(const Checkpoint& model, ggml_type type) : model_(model), c_(model.config()), type_(type) {
    if (c_.attention_bias || c_.mlp_bias || c_.rope.type != RopeConfig::Type::kDefault ||
        c_.activation != Activation::kSilu)
      throw std::runtime_error(model.path().string() +
                               ": biases, scaled rotary positions and other activations than SiLU "
                               "are not written as GGUF here");
  }

  void write(const std::filesystem::path& file) {
    list();
    const std::unique_ptr<gguf_context, void (*)(gguf_context*)> gguf(gguf_init_empty(), gguf_free);
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> context(
        ggml_init({(entries_.size() + 1) * ggml_tensor_overhead(), nullptr, /*no_alloc=*/true}),
        ggml_free);
    set_keys(gguf.get());
    for (const Entry& e : entries_) {
      ggml_tensor* t =
          ggml_new_tensor(context.get(), e.type, static_cast<int>(e.shape.size()), e.shape.data());
      ggml_set_name(t, e.name.c_str());
      gguf_add_tensor(gguf.get(), t);
    }
    const std::unique_ptr<FILE, int (*)(FILE*)> out(std::fopen(file.c_str(), "wb"), std::fclose);
    const auto fail = [&] { throw std::runtime_error("cannot write " + file.string()); };
    if (out == nullptr || !gguf_write_to_file_ptr(gguf.get(), out.get(), /*only_meta=*/true))
      fail();
    for (const Entry& e : entries_)
      if (!write_tensor(e, out.get())) fail();
    if (std::fflush(out.get()) != 0) fail();
  }

 private:
  void add(const std::string& name, std::vector<std::int64_t> shape, const std::string& source) {
    entries_.push_back(
        {name, std::move(shape), type_, [this, source] { return read_matrix(model_, source); }});
  }
  void add_plain(const std::string& name, std::vector<std::int64_t> shape,
                 const std::string& source) {
    entries_.push_back(
        {name, std::move(shape), GGML_TYPE_F32, [this, source] { return model_.read(source); }});
  }

  // HuggingFace turns component i of a head with i + d / 2, a GGUF of this family 2 i with 2 i + 1.
  void add_rotated(const std::string& name, std::int64_t heads, const std::string& source) {
    const std::int64_t d = c_.head_dim, D = c_.hidden_size;
    const auto interleaved = [this, source, heads, d, D] {
      const std::vector<float> from = read_matrix(model_, source);
      std::vector<float> to(from.size());
      for (std::int64_t row = 0; row < heads * d; ++row) {
        const std::int64_t i = row % d;
        const std::int64_t old = row - i + i / 2 + (i % 2) * (d / 2);
        std::copy_n(from.data() + old * D, D, to.data() + row * D);
      }
      return to;
    };
    entries_.push_back({name, {D, heads * d}, type_, interleaved});
  }

  void add_experts(const std::string& name, std::vector<std::int64_t> shape, std::int64_t layer,
                   std::string FfnNames::*part) {
    const auto stacked = [this, layer, part] {
      std::vector<float> all;
      for (std::int64_t e = 0; e < c_.num_experts; ++e)
        append(read_matrix(model_, ffn_names(c_, layer, e).*part), all);
      return all;
    };
    entries_.push_back({name, std::move(shape), type_, stacked});
  }

  void list() {
    const std::int64_t D = c_.hidden_size, I = c_.intermediate_size, E = c_.num_experts;
    const std::int64_t q = c_.num_heads * c_.head_dim, kv = c_.num_kv_heads * c_.head_dim;
    add("token_embd.weight", {D, c_.vocab_size}, "model.embed_tokens.weight");
    add_plain("output_norm.weight", {D}, "model.norm.weight");
    if (!c_.tie_word_embeddings) add("output.weight", {D, c_.vocab_size}, "lm_head.weight");
    for (std::int64_t l = 0; l < c_.num_layers; ++l) {
      const std::string b = "blk." + std::to_string(l) + ".";
      add_plain(b + "attn_norm.weight", {D}, layer_name(l, "input_layernorm.weight"));
      add_rotated(b + "attn_q.weight", c_.num_heads, layer_name(l, "self_attn.q_proj.weight"));
      add_rotated(b + "attn_k.weight", c_.num_kv_heads, layer_name(l, "self_attn.k_proj.weight"));
      add(b + "attn_v.weight", {D, kv}, layer_name(l, "self_attn.v_proj.weight"));
      add(b + "attn_output.weight", {q, D}, layer_name(l, "self_attn.o_proj.weight"));
      add_plain(b + "ffn_norm.weight", {D}, layer_name(l, "post_attention_layernorm.weight"));
      if (!c_.is_moe()) {
        const FfnNames names = ffn_names(c_, l, 0);
        add(b + "ffn_gate.weight", {D, I}, names.gate);
        add(b + "ffn_up.weight", {D, I}, names.up);
        add(b + "ffn_down.weight", {I, D}, names.down);
        continue;
      }
      add_plain(b + "ffn_gate_inp.weight", {D, E}, MixtralNames::router(l));
      add_experts(b + "ffn_gate_exps.weight", {D, I, E}, l, &FfnNames::gate);
      add_experts(b + "ffn_up_exps.weight", {D, I, E}, l, &FfnNames::up);
      add_experts(b + "ffn_down_exps.weight", {I, D, E}, l, &FfnNames::down);
    }
  }

  void set_keys(gguf_context* gguf) const {
    const auto set = [gguf](const char* key, std::int64_t value) {
      gguf_set_val_u32(gguf, key, static_cast<std::uint32_t>(value));
    };
    gguf_set_val_str(gguf, "general.architecture", "llama");
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "none");
    set("llama.vocab_size", c_.vocab_size);
    set("llama.context_length", c_.max_position_embeddings);
    set("llama.embedding_length", c_.hidden_size);
    set("llama.block_count", c_.num_layers);
    set("llama.feed_forward_length", c_.intermediate_size);
    set("llama.attention.head_count", c_.num_heads);
    set("llama.attention.head_count_kv", c_.num_kv_heads);
    set("llama.attention.key_length", c_.head_dim);
    set("llama.attention.value_length", c_.head_dim);
    set("llama.rope.dimension_count", c_.head_dim);
    gguf_set_val_f32(gguf, "llama.rope.freq_base", static_cast<float>(c_.rope.theta));
    gguf_set_val_f32(gguf, "llama.attention.layer_norm_rms_epsilon",
                     static_cast<float>(c_.rms_norm_eps));
    if (!c_.is_moe()) return;
    set("llama.expert_count", c_.num_experts);
    set("llama.expert_used_count", c_.experts_per_token);
  }

  static bool write_tensor(const Entry& e, FILE* out) {
    const std::vector<float> values = e.load();
    const auto count = static_cast<std::int64_t>(values.size());
    const std::size_t bytes = ggml_row_size(e.type, count);
    std::vector<char> data(GGML_PAD(bytes, GGUF_DEFAULT_ALIGNMENT));
    ggml_quantize_chunk(e.type, values.data(), data.data(), 0, count / e.shape[0], e.shape[0],
                        nullptr);
    return std::fwrite(data.data(), 1, data.size(), out) == data.size();
  }

  const Checkpoint& model_;
  const ModelConfig& c_;
  ggml_type type_;
  std::vector<Entry> entries_;
};

}  // namespace

void write_gguf(const Checkpoint& model, ggml_type type, const std::filesystem::path& file) {
  Writer(model, type).write(file);
}

TemporaryGguf::TemporaryGguf(const Checkpoint& model, ggml_type type) {
  std::string name = (std::filesystem::temp_directory_path() / "cleave-XXXXXX.gguf").string();
  const int file = mkstemps(name.data(), /*suffixlen=*/5);
  if (file < 0) throw std::runtime_error("cannot make a temporary file such as " + name);
  close(file);
  path_ = name;
  try {
    write_gguf(model, type, path_);
  } catch (...) {
    std::filesystem::remove(path_);
    throw;
  }
}

TemporaryGguf::~TemporaryGguf() {
  std::error_code ignored;
  std::filesystem::remove(path_, ignored);
}

ExpertBank read_experts(const Checkpoint& model, std::int64_t layer) {
  const ModelConfig& c = model.config();
  const std::int64_t E = c.is_moe() ? c.num_experts : 1, D = c.hidden_size;
  const std::int64_t I = c.intermediate_size;
  ExpertBank bank;
  bank.d_model = D;
  bank.dense_hidden = E * I;
  bank.activation = c.activation;
  bank.neuron_order.resize(E * I);
  std::iota(bank.neuron_order.begin(), bank.neuron_order.end(), 0);
  bank.down_t.resize(E * I * D);
  for (std::int64_t e = 0; e < E; ++e) {
    const FfnNames names = ffn_names(c, layer, e);
    bank.begin.push_back(e * I);
    append(read_matrix(model, names.gate), bank.gate);
    append(read_matrix(model, names.up), bank.up);
    const std::vector<float> down = read_matrix(model, names.down);  // [D, I]
    for (std::int64_t d = 0; d < D; ++d)
      for (std::int64_t j = 0; j < I; ++j) bank.down_t[(e * I + j) * D + d] = down[d * I + j];
  }
  bank.begin.push_back(E * I);
  return bank;
}
