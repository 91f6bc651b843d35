#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "cleave/checkpoint.h"
#include "gguf.h"

namespace cleave {

/// Where a tensor's bytes are.
struct StoredTensor {
  std::span<const std::byte> bytes;
  /// Above 0: the rows of each of so many heads are interleaved (GGUF's q and k): stored row 2j is
  /// row j of HuggingFace's head, stored row 2j + 1 is row j + head_dim / 2.
  std::int64_t interleaved_heads = 0;
};

/// An opened model of either format; what Checkpoint answers from.
struct ModelFiles {
  Checkpoint::Format format = Checkpoint::Format::kSafetensors;
  std::filesystem::path directory;
  ModelConfig config;
  std::vector<std::filesystem::path> weight_files;  ///< sorted by name
  std::vector<TensorInfo> infos;                    ///< sorted by name
  std::vector<StoredTensor> stored;                 ///< [infos]
  std::vector<SafetensorsFile> shards;              ///< keep the mappings alive
  std::optional<GgufFile> gguf;                     ///< the same
};

/// @param weights  a `.safetensors` file or a `*.safetensors.index.json`; config.json lies beside
/// it
ModelFiles open_safetensors_model(const std::filesystem::path& weights);
ModelFiles open_gguf_model(const std::filesystem::path& file);

}  // namespace cleave
