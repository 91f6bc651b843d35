#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace cleave {

/// A whole file mapped read-only. Pages come in when they are touched, so opening a model of any
/// size costs nothing. Move-only; the bytes live as long as the object.
class MappedFile {
 public:
  /// @throws FileError  missing, not a regular file, or not readable
  static MappedFile open(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Gives back the memory of mapped bytes (whole pages around them; those of a neighbour come in
/// again when touched). Only for bytes of a MappedFile.
void release_pages(std::span<const std::byte> bytes);

/// The whole of a small text file.
/// @throws FileError  missing or not readable
std::string read_text_file(const std::filesystem::path& path);

}  // namespace cleave
