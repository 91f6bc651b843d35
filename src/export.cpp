#include "cleave/export.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <nlohmann/json.hpp>

#include "atomic_file.h"
#include "decoder_tensors.h"
#include "fail.h"
#include "mixtral_config.h"
#include "model_card.h"
#include "provenance.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

std::int64_t num_elements(const NamedTensor& tensor) {
  std::int64_t count = 1;
  for (const std::int64_t extent : tensor.shape) count *= extent;
  return count;
}

/// Engines skip names they do not know and start missing ones at random, so the list must be exact.
void check_complete(const ModelConfig& mixtral, std::span<const NamedTensor> tensors) {
  std::map<std::string, const NamedTensor*> given;
  for (const NamedTensor& tensor : tensors)
    if (!given.emplace(tensor.name, &tensor).second)
      fail_argument("write_mixtral: tensor '{}' is given twice", tensor.name);
  for (const ExpectedTensor& expected : decoder_tensors(mixtral)) {
    const auto found = given.find(expected.name);
    if (found == given.end())
      fail_argument("write_mixtral: tensor '{}' is missing; expected shape {}", expected.name,
                    shape_text(expected.shape));
    if (found->second->shape != expected.shape)
      fail_argument("write_mixtral: tensor '{}' has shape {}; expected {}", expected.name,
                    shape_text(found->second->shape), shape_text(expected.shape));
    given.erase(found);
  }
  if (!given.empty())
    fail_argument("write_mixtral: tensor '{}' has no place in a Mixtral model",
                  given.begin()->first);
}

void check_representable(const ModelConfig& source, const char* function) {
  if (source.attention_bias || source.mlp_bias)
    fail_argument("{}: the model has {} biases, which Mixtral cannot hold", function,
                  source.attention_bias ? "attention" : "FFN");
}

/// Consecutive tensors (by name) whose bytes fit the limit; one that exceeds it stands alone.
std::vector<std::vector<NamedTensor>> make_shards(std::span<const NamedTensor> tensors, DType dtype,
                                                  std::int64_t max_bytes) {
  std::vector<NamedTensor> sorted(tensors.begin(), tensors.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const NamedTensor& a, const NamedTensor& b) { return a.name < b.name; });
  std::vector<std::vector<NamedTensor>> shards(1);
  std::int64_t filled = 0;
  for (NamedTensor& tensor : sorted) {
    const std::int64_t bytes = dtype_bytes(dtype, num_elements(tensor));
    if (filled > 0 && filled + bytes > max_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    filled += bytes;
    shards.back().push_back(std::move(tensor));
  }
  return shards;
}

/// One file, or several and then the index that names them.
void write_weights(const fs::path& directory, std::span<const NamedTensor> tensors, DType dtype,
                   std::int64_t max_shard_bytes) {
  const auto shards = make_shards(tensors, dtype, max_shard_bytes);
  if (shards.size() == 1)
    return write_safetensors(directory / "model.safetensors", shards.front(), dtype);
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  std::int64_t total = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string file = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    write_safetensors(directory / file, shards[i], dtype);
    for (const NamedTensor& tensor : shards[i]) {
      weight_map[tensor.name] = file;
      total += dtype_bytes(dtype, num_elements(tensor));
    }
  }
  const nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}},
                                        {"weight_map", weight_map}};
  write_file_atomically(directory / "model.safetensors.index.json", index.dump(2) + "\n");
}

void write_texts(const fs::path& directory, const std::string& name, const Checkpoint& source,
                 const ModelConfig& mixtral, const Provenance& provenance) {
  const auto write = [&](const std::string& file, const std::string& text) {
    write_file_atomically(directory / file, text);
  };
  write("config.json", mixtral_config_json(mixtral));
  if (source.has_tokenizer()) write("tokenizer.json", source.tokenizer_json());
  bool has_generation_config = false;
  for (const auto& [file, text] : source.companion_files()) {
    write(file, text);
    has_generation_config |= file == "generation_config.json";
  }
  const std::string generation = generation_config_json(mixtral);
  if (!has_generation_config && !generation.empty()) write("generation_config.json", generation);
  write("cleave.json", provenance_json(provenance));
  write("README.md", model_card(name, mixtral, provenance));
}

void check_layer(const MoeLayer& layer, const MoeLayer& first, const ModelConfig& source,
                 std::size_t index) {
  const ExpertBank& bank = layer.experts;
  const std::int64_t E = first.experts.num_experts();
  if (E < 1 || bank.num_experts() != E || layer.experts_per_token != first.experts_per_token ||
      layer.gate != first.gate || bank.width(0) != first.experts.width(0))
    fail_argument(
        "mixtral_tensors: layer {} differs from layer 0 in its experts, K, width or gate; Mixtral "
        "has one choice for all layers",
        index);
  for (std::int64_t e = 0; e < E; ++e)
    if (bank.width(e) != bank.width(0))
      fail_argument("mixtral_tensors: layer {}: expert {} has {} neurons, expert 0 has {}", index,
                    e, bank.width(e), bank.width(0));
  if (bank.gate.empty())
    fail_argument("mixtral_tensors: layer {}: the experts have no gate matrix, which Mixtral needs",
                  index);
  if (!bank.gate_bias.empty() || !bank.up_bias.empty() || !bank.down_bias.empty())
    fail_argument("mixtral_tensors: layer {}: the experts have biases, which Mixtral cannot hold",
                  index);
  if (bank.activation != source.activation)
    fail_argument("mixtral_tensors: layer {}: activation {}, but the model says {}", index,
                  activation_name(bank.activation), activation_name(source.activation));
  if (bank.d_model != source.hidden_size || layer.router.num_experts != E ||
      layer.router.d_model != source.hidden_size)
    fail_argument("mixtral_tensors: layer {}: experts or router are not of width {}", index,
                  source.hidden_size);
}

std::vector<float> rows_of(const std::vector<float>& matrix, std::int64_t begin, std::int64_t rows,
                           std::int64_t cols) {
  const auto first = matrix.begin() + begin * cols;
  return std::vector<float>(first, first + rows * cols);
}

/// [I, D] rows to the checkpoint's [D, I], times the scale; rounded once, when it is written.
std::vector<float> scaled_down(const MoeLayer& layer, std::int64_t begin, std::int64_t width,
                               float scale) {
  const std::int64_t D = layer.experts.d_model;
  std::vector<float> down(static_cast<std::size_t>(width * D));
  for (std::int64_t j = 0; j < width; ++j)
    for (std::int64_t c = 0; c < D; ++c)
      down[c * width + j] = layer.experts.down_t[(begin + j) * D + c] * scale;
  return down;
}

std::vector<float> router_weight(const MoeLayer& layer) {
  std::vector<float> weight = layer.router.weight;
  if (layer.gate == GateMode::kHard)
    for (float& value : weight) value *= static_cast<float>(kHardGateEpsilon);
  return weight;
}

void add_layer(const MoeLayer& layer, std::int64_t index, std::vector<NamedTensor>& out) {
  const ExpertBank& bank = layer.experts;
  const std::int64_t D = bank.d_model;
  out.push_back({MixtralNames::router(index), {bank.num_experts(), D}, [&layer] {
                   return router_weight(layer);
                 }});
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    const std::int64_t begin = bank.begin[e];
    const std::int64_t width = bank.width(e);
    out.push_back({MixtralNames::gate(index, e), {width, D}, [&bank, begin, width, D] {
                     return rows_of(bank.gate, begin, width, D);
                   }});
    out.push_back({MixtralNames::up(index, e), {width, D}, [&bank, begin, width, D] {
                     return rows_of(bank.up, begin, width, D);
                   }});
    out.push_back({MixtralNames::down(index, e), {D, width}, [&layer, begin, width] {
                     return scaled_down(layer, begin, width,
                                        static_cast<float>(folded_scale(layer)));
                   }});
  }
}

}  // namespace

double folded_scale(const MoeLayer& layer) {
  const double weights_sum =
      layer.gate == GateMode::kHard ? static_cast<double>(layer.experts_per_token) : 1.0;
  return layer.scale * weights_sum;
}

DType default_write_dtype(const ModelConfig& source, double folded_scale) {
  int exponent = 0;
  const bool exact = folded_scale > 0.0 && std::frexp(folded_scale, &exponent) == 0.5;
  const bool plain = source.dtype == DType::kF16 || source.dtype == DType::kBF16;
  return plain && exact ? source.dtype : DType::kF32;
}

std::vector<NamedTensor> mixtral_tensors(const Checkpoint& source,
                                         std::span<const MoeLayer> layers) {
  const ModelConfig& config = source.config();
  check_representable(config, "mixtral_tensors");
  if (static_cast<std::int64_t>(layers.size()) != config.num_layers)
    fail_argument("mixtral_tensors: {} layers given; the model has {}", layers.size(),
                  config.num_layers);
  for (std::size_t l = 0; l < layers.size(); ++l) check_layer(layers[l], layers[0], config, l);

  const MixtralShape shape{layers[0].experts.num_experts(), layers[0].experts_per_token,
                           layers[0].experts.width(0)};
  std::vector<NamedTensor> tensors;
  for (const ExpectedTensor& expected :
       decoder_tensors(mixtral_config(config, shape, DType::kF32))) {
    if (expected.name.find(".block_sparse_moe.") != std::string::npos) continue;
    const bool tied = expected.name == "lm_head.weight" && config.tie_word_embeddings;
    const std::string stored = tied ? "model.embed_tokens.weight" : expected.name;
    tensors.push_back(
        {expected.name, expected.shape, [&source, stored] { return source.read(stored); }});
  }
  for (std::size_t l = 0; l < layers.size(); ++l)
    add_layer(layers[l], static_cast<std::int64_t>(l), tensors);
  return tensors;
}

void write_mixtral(const fs::path& out, const Checkpoint& source, const MixtralShape& shape,
                   std::span<const NamedTensor> tensors, const Provenance& provenance,
                   const WriteSpec& spec) {
  check_output(out, spec.overwrite);
  check_representable(source.config(), "write_mixtral");
  if (shape.experts_per_token < 1 || shape.experts_per_token > shape.num_experts)
    fail_argument("write_mixtral: K = {} with E = {}; expected 1 to E", shape.experts_per_token,
                  shape.num_experts);
  if (spec.max_shard_bytes < 1)
    fail_argument("write_mixtral: max_shard_bytes is {}; expected at least 1",
                  spec.max_shard_bytes);
  const DType dtype =
      spec.dtype.value_or(default_write_dtype(source.config(), provenance.folded_scale));
  const ModelConfig mixtral = mixtral_config(source.config(), shape, dtype);
  check_complete(mixtral, tensors);

  AtomicDirectory directory(out, spec.overwrite);
  write_weights(directory.path(), tensors, dtype, spec.max_shard_bytes);
  const fs::path clean = fs::absolute(out).lexically_normal();
  const std::string name = (clean.has_filename() ? clean : clean.parent_path()).filename().string();
  write_texts(directory.path(), name, source, mixtral, provenance);
  directory.commit();
}

}  // namespace cleave
