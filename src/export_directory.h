#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "cleave/export.h"

// What all targets share: the parts of a model that are copied, and the directory around weights.
namespace cleave {

/// What is to be written.
struct TargetModel {
  const char* function;                   ///< in whose name errors are thrown
  ModelConfig config;                     ///< of the target; its dtype is that of the weights
  std::vector<std::string> carried = {};  ///< tensors it may hold beside those of `config`
};

/// Attention, norms, embeddings and head of `source`, as `target` names them; no FFN. Where the
/// target does not tie its head and the source does, the embedding is written twice.
std::vector<NamedTensor> backbone_tensors(const Checkpoint& source, const ModelConfig& target);

/// A sliding window that is shorter than the longest text has no place in Llama and Granite.
void check_no_sliding_window(const char* function, const char* target, const ModelConfig& source);

/// An encoder has no place in the classes of decoders.
void check_is_decoder(const char* function, const char* target, const ModelConfig& source);

/// Writes weights, config.json, the source's tokenizer files, cleave.json and the model card into a
/// temporary sibling of `out`, and renames it. What `tensors` holds must be exactly what the
/// configuration asks for.
void write_model_directory(const std::filesystem::path& out, const Checkpoint& source,
                           const TargetModel& target, std::span<const NamedTensor> tensors,
                           const Provenance& provenance, const WriteSpec& spec);

}  // namespace cleave
