#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "cleave/views.h"
#include "mapped_file.h"

namespace cleave {

/// One tensor of a GGUF file, under the file's own name.
struct GgufTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;  ///< outermost first (the file stores it innermost first)
  std::int64_t offset = 0;          ///< from the start of the file, bytes
  std::int64_t bytes = 0;
  std::int64_t num_elements() const;
};

/// A GGUF v3 file, mapped and validated: every length, offset, type and name is checked when it is
/// opened; no weight is touched.
///
/// Metadata accessors return an empty optional (or nullptr) when the key is absent, and throw
/// FileError naming the key when it has another type than asked for.
class GgufFile {
 public:
  /// @throws FileError  missing, truncated, malformed, or with a tensor type we do not read
  static GgufFile open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_.path(); }
  std::span<const std::byte> bytes() const { return file_.bytes(); }

  /// In the order of the file.
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  /// nullptr where there is none.
  const GgufTensor* find(std::string_view name) const;
  /// The tensor's stored bytes; valid while the file lives.
  std::span<const std::byte> raw(const GgufTensor& tensor) const;

  bool has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }
  std::optional<std::string> string(std::string_view key) const;
  std::optional<std::int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;  ///< integers too
  std::optional<bool> boolean(std::string_view key) const;
  /// Read from the file each time: a vocabulary's strings are megabytes. Valid while this lives.
  std::optional<std::vector<std::string_view>> strings(std::string_view key) const;
  const std::vector<std::int64_t>* integers(std::string_view key) const;  ///< booleans too
  const std::vector<double>* floats(std::string_view key) const;
  /// Gives back the memory of the mapped keys; strings() brings in again what it reads.
  void release_keys() const { release_pages(bytes().first(keys_end_)); }

  /// An array of strings: where the first one's length is in the file.
  struct StringArray {
    std::size_t begin = 0;
    std::uint64_t count = 0;
  };
  /// What a key can hold. An unsigned number above the range of int64 stays unsigned.
  using Value = std::variant<std::int64_t, std::uint64_t, double, bool, std::string, StringArray,
                             std::vector<std::int64_t>, std::vector<double>>;

 private:
  explicit GgufFile(MappedFile file) : file_(std::move(file)) {}
  const Value* value(std::string_view key) const;
  template <typename T>
  const T* value_as(std::string_view key, const char* expected) const;

  MappedFile file_;
  std::size_t keys_end_ = 0;  // and of the list of tensors
  std::map<std::string, Value, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_of_name_;
};

}  // namespace cleave
