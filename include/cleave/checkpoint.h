#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cleave/model_config.h"
#include "cleave/views.h"

namespace cleave {

/// Name, element type and shape of one stored tensor.
struct TensorInfo {
  std::string
      name;  ///< HuggingFace name, also for a GGUF source: "model.layers.0.mlp.up_proj.weight"
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;  ///< row-major, outermost first, also for a GGUF source
  std::int64_t num_elements() const;
};

/// A trained model on disk, memory-mapped: a HuggingFace directory (safetensors, single or sharded)
/// or a GGUF v3 file. Opening validates every header and touches no weight
/// but the last rows of shared slices, which tell how much of them is padding
/// (ModelConfig::shared_widths).
///
/// Both kinds look the same from outside: HuggingFace tensor names, shapes [out, in], and the q/k
/// row order of HuggingFace (a GGUF of the llama family stores them interleaved; `read` undoes it).
/// Move-only; concurrent `read`s are safe.
class Checkpoint {
 public:
  /// @param path  a model directory, a `.safetensors` file or `model.safetensors.index.json` inside
  ///              one, or a `.gguf` file
  /// @throws FileError  missing, truncated or malformed; names the tensor or the key
  static Checkpoint open(const std::filesystem::path& path);
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  enum class Format { kSafetensors, kGguf };
  Format format() const;
  /// As given to open().
  const std::filesystem::path& path() const;
  /// The directory that holds tokenizer and config; for a GGUF file the folder it lies in.
  const std::filesystem::path& directory() const;
  const ModelConfig& config() const;

  /// All tensors, sorted by name.
  const std::vector<TensorInfo>& tensors() const;
  bool contains(std::string_view name) const;
  /// @throws FileError  no such tensor
  const TensorInfo& info(std::string_view name) const;

  /// Reads a tensor as float32 (dequantised, rows in HuggingFace order).
  /// @param out  [info(name).num_elements()], written
  /// @throws FileError  no such tensor, or a value is NaN or infinite (names tensor and index)
  void read(std::string_view name, std::span<float> out) const;
  std::vector<float> read(std::string_view name) const;
  /// The same, and checks the shape first.
  std::vector<float> read(std::string_view name, std::initializer_list<std::int64_t> shape) const;

  /// Rows [first, first + out.rows) of a matrix, so that it need not be whole in memory.
  /// @throws InvalidArgument  the tensor is no matrix of out.cols columns with that many rows
  void read_rows(std::string_view name, std::int64_t first, MatrixView<float> out) const;
  /// The tensor's pages of the mapping may leave memory; another read brings them back.
  void release(std::string_view name) const;

  /// Stored bytes of a tensor inside the mapping; valid while the Checkpoint lives. For a GGUF
  /// these are the file's own blocks and row order.
  std::span<const std::byte> raw(std::string_view name) const;

  /// Whether tokenizer_json() has something to give.
  bool has_tokenizer() const;
  /// The text of `tokenizer.json`: the directory's file, or built from a GGUF's keys.
  /// @throws FileError  there is none
  std::string tokenizer_json() const;
  /// Text files beside the weights that a written model carries along (tokenizer_config.json,
  /// special_tokens_map.json, generation_config.json, chat_template.jinja, ...): name and content.
  /// For a GGUF source they are made from its keys. Excludes config.json and tokenizer.json.
  std::vector<std::pair<std::string, std::string>> companion_files() const;
  /// The text of config.json; empty for a GGUF source.
  std::string config_json() const;
  /// SHA-256 over the weight files, in the order of their names, as 64 hex digits. For a
  /// single-file model this is what `sha256sum` prints.
  std::string sha256() const;
  /// Tells apart what a model is loaded from, at next to no cost: a hash of config.json and, for
  /// each weight file, its name, size, time of change and 64 pieces of its content. Another time of
  /// change gives another fingerprint, even where the content is the same.
  std::string fingerprint() const;

 private:
  struct Impl;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// A tensor that is about to be written; `load` is called once, when its turn comes, so a writer
/// holds one tensor at a time.
struct NamedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::function<std::vector<float>()> load;
};

/// Writes one safetensors file (metadata {"format": "pt"}, data 8-aligned, tensors ordered by name:
/// the same input gives the same bytes). Float values are rounded to `dtype` (F32, F16 or BF16), to
/// nearest even. Writes to a temporary name, fsyncs, renames.
/// @throws FileError  the disk is full or the folder not writable; nothing is left behind
/// @throws InvalidArgument  duplicate name, wrong element count, a value NaN or beyond the dtype's
/// range
void write_safetensors(const std::filesystem::path& file, std::span<const NamedTensor> tensors,
                       DType dtype);

/// A safetensors file without a model around it (optimiser state, golden values).
class SafetensorsFile {
 public:
  /// @throws FileError  truncated or malformed; names the tensor
  static SafetensorsFile open(const std::filesystem::path& file);
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;
  ~SafetensorsFile();
  const std::vector<TensorInfo>& tensors() const;  ///< sorted by name
  bool contains(std::string_view name) const;
  const TensorInfo& info(std::string_view name) const;
  std::span<const std::byte> raw(std::string_view name) const;
  /// A value of `__metadata__`; empty where the key is absent.
  std::string metadata(const std::string& key) const;
  /// F32, F16, BF16, F64 and integer types, as float.
  std::vector<float> read(std::string_view name) const;

 private:
  struct Impl;
  explicit SafetensorsFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace cleave
