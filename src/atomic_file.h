#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace cleave {

/// A file that appears under its name only when it is whole: written as `.<name>.tmp-<pid>` beside
/// it, fsynced, renamed. Destroyed before commit(), it leaves nothing.
class AtomicFile {
 public:
  /// @throws FileError  the folder is missing or not writable
  explicit AtomicFile(const std::filesystem::path& target);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// @throws FileError  the disk is full, or a limit on file size is reached
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  void commit();

 private:
  std::filesystem::path target_;
  std::filesystem::path temporary_;
  int fd_ = -1;
};

/// AtomicFile, write, commit.
void write_file_atomically(const std::filesystem::path& target, std::string_view text);

/// The same for a directory: fill path(), then commit(). With `overwrite` a directory of that name
/// is moved aside, replaced and only then removed; if anything fails it is where it was.
class AtomicDirectory {
 public:
  /// Calls check_output() first.
  AtomicDirectory(const std::filesystem::path& target, bool overwrite);
  ~AtomicDirectory();
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;

  const std::filesystem::path& path() const { return temporary_; }
  void commit();

 private:
  std::filesystem::path target_;
  std::filesystem::path temporary_;
  bool overwrite_ = false;
};

}  // namespace cleave
