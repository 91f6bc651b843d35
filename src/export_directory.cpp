#include "export_directory.h"

#include <algorithm>
#include <map>
#include <system_error>

#include <nlohmann/json.hpp>

#include "atomic_file.h"
#include "decoder_tensors.h"
#include "fail.h"
#include "model_card.h"
#include "provenance.h"
#include "target_config.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

std::int64_t num_elements(const NamedTensor& tensor) {
  std::int64_t count = 1;
  for (const std::int64_t extent : tensor.shape) count *= extent;
  return count;
}

/// Engines skip names they do not know and start missing ones at random, so the list must be exact.
void check_complete(const TargetModel& target, std::span<const NamedTensor> tensors) {
  std::map<std::string, const NamedTensor*> given;
  for (const NamedTensor& tensor : tensors)
    if (!given.emplace(tensor.name, &tensor).second)
      fail_argument("{}: tensor '{}' is given twice", target.function, tensor.name);
  for (const ExpectedTensor& expected : decoder_tensors(target.config)) {
    const auto found = given.find(expected.name);
    if (found == given.end())
      fail_argument("{}: tensor '{}' is missing; expected shape {}", target.function, expected.name,
                    shape_text(expected.shape));
    if (found->second->shape != expected.shape)
      fail_argument("{}: tensor '{}' has shape {}; expected {}", target.function, expected.name,
                    shape_text(found->second->shape), shape_text(expected.shape));
    given.erase(found);
  }
  for (const std::string& name : target.carried) given.erase(name);
  if (!given.empty())
    fail_argument("{}: tensor '{}' has no place in a model of this family ({})", target.function,
                  given.begin()->first, family_name(target.config.family));
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
                 const ModelConfig& target, const Provenance& provenance) {
  const auto write = [&](const std::string& file, const std::string& text) {
    const fs::path path = directory / file;
    std::error_code error;  // sentence-transformers keeps some in folders
    fs::create_directories(path.parent_path(), error);
    if (error) fail_file("{}: {}", path.parent_path().string(), error.message());
    write_file_atomically(path, text);
  };
  write("config.json", target_config_json(target));
  if (source.has_tokenizer()) write("tokenizer.json", source.tokenizer_json());
  bool has_generation_config = false;
  for (const auto& [file, text] : source.companion_files()) {
    write(file, text);
    has_generation_config |= file == "generation_config.json";
  }
  const std::string generation = generation_config_json(target);
  if (!has_generation_config && !generation.empty()) write("generation_config.json", generation);
  write("cleave.json", provenance_json(provenance));
  write("README.md", model_card(name, target, provenance));
}

bool is_ffn(const std::string& name) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  for (const char* part : {".mlp.", ".block_sparse_moe.", ".shared_mlp.", ".intermediate."})
    if (has(part)) return true;
  return has(".output.dense.") && !has(".attention.");  // BERT's
}

}  // namespace

std::vector<NamedTensor> backbone_tensors(const Checkpoint& source, const ModelConfig& target) {
  std::vector<NamedTensor> tensors;
  for (const ExpectedTensor& expected : decoder_tensors(target)) {
    if (is_ffn(expected.name)) continue;
    const bool tied = expected.name == "lm_head.weight" && source.config().tie_word_embeddings;
    const std::string stored = tied ? "model.embed_tokens.weight" : expected.name;
    tensors.push_back(
        {expected.name, expected.shape, [&source, stored] { return source.read(stored); }});
  }
  return tensors;
}

void check_no_sliding_window(const char* function, const char* target, const ModelConfig& source) {
  if (source.sliding_window > 0 && source.sliding_window < source.max_position_embeddings)
    fail_argument("{}: the model attends to {} of {} tokens (sliding_window), which {} cannot",
                  function, source.sliding_window, source.max_position_embeddings, target);
}

void check_is_decoder(const char* function, const char* target, const ModelConfig& source) {
  if (source.causal && source.has_head) return;
  fail_argument(
      "{}: the model is an encoder, which {} cannot hold; write_bert_moe and "
      "write_bert_dense can",
      function, target);
}

void write_model_directory(const fs::path& out, const Checkpoint& source, const TargetModel& target,
                           std::span<const NamedTensor> tensors, const Provenance& provenance,
                           const WriteSpec& spec) {
  if (spec.max_shard_bytes < 1)
    fail_argument("{}: max_shard_bytes is {}; expected at least 1", target.function,
                  spec.max_shard_bytes);
  check_complete(target, tensors);
  AtomicDirectory directory(out, spec.overwrite);
  write_weights(directory.path(), tensors, target.config.dtype, spec.max_shard_bytes);
  const fs::path clean = fs::absolute(out).lexically_normal();
  const std::string name = (clean.has_filename() ? clean : clean.parent_path()).filename().string();
  write_texts(directory.path(), name, source, target.config, provenance);
  directory.commit();
}

}  // namespace cleave
