#include "atomic_file.h"

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include <fcntl.h>
#include <unistd.h>

#include "cleave/export.h"
#include "fail.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

/// "out/model" -> "out/.model.tmp-4711": on the same file system, so that a rename suffices.
fs::path sibling(const fs::path& target, const char* purpose) {
  return target.parent_path() /
         fmt::format(".{}.{}-{}", target.filename().string(), purpose, ::getpid());
}

/// Absolute, without a trailing slash, so that it has a parent and a name.
fs::path normalised(const fs::path& path) {
  const fs::path clean = fs::absolute(path).lexically_normal();
  return clean.has_filename() ? clean : clean.parent_path();
}

/// A rename is durable only once the folder that holds the name is.
void sync_folder(const fs::path& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;  // not every file system lets a folder be opened; the data itself is safe
  ::fsync(fd);
  ::close(fd);
}

void rename_or_fail(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    fail_file("{}: cannot be put in place: {}", to.string(), std::strerror(errno));
}

/// Guards `--overwrite` against a slip of the hand: only models and empty folders are replaced.
bool is_replaceable(const fs::path& directory) {
  return fs::is_empty(directory) || fs::exists(directory / "config.json") ||
         fs::exists(directory / "cleave.json");
}

}  // namespace

AtomicFile::AtomicFile(const fs::path& target)
    : target_(normalised(target)), temporary_(sibling(target_, "tmp")) {
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail_file("{}: cannot be written: {}", target_.string(), std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0)
      fail_file("{}: cannot be written: {}; nothing was left behind", target_.string(),
                std::strerror(errno));
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0)
    fail_file("{}: cannot be written: {}; nothing was left behind", target_.string(),
              std::strerror(errno));
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0)  // network file systems report a full disk here
    fail_file("{}: cannot be written: {}; nothing was left behind", target_.string(),
              std::strerror(errno));
  rename_or_fail(temporary_, target_);
  temporary_.clear();
  sync_folder(target_.parent_path());
}

void write_file_atomically(const fs::path& target, std::string_view text) {
  AtomicFile file(target);
  file.write(text);
  file.commit();
}

void check_output(const fs::path& out, bool overwrite) try {
  const fs::path target = normalised(out);
  if (target.filename().empty())
    fail_argument("output {}: names no new directory; give it a name", out.string());
  const fs::path parent = target.parent_path();
  if (!fs::is_directory(parent))
    fail_file("{}: there is no such folder; create it first", parent.string());
  if (::access(parent.c_str(), W_OK | X_OK) != 0)
    fail_file("{}: cannot write into this folder: {}", parent.string(), std::strerror(errno));
  if (!fs::exists(fs::symlink_status(target))) return;
  if (!overwrite)
    fail_argument("output {}: exists already; choose another name or ask to overwrite it",
                  out.string());
  if (!fs::is_directory(target))
    fail_argument("output {}: is not a directory; choose another name", out.string());
  if (!is_replaceable(target))
    fail_argument(
        "output {}: holds files but no config.json, so it is no model and is not overwritten; "
        "choose another name",
        out.string());
} catch (const fs::filesystem_error& error) {
  fail_file("{}: {}", out.string(), error.code().message());
}

AtomicDirectory::AtomicDirectory(const fs::path& target, bool overwrite)
    : target_(normalised(target)), overwrite_(overwrite) {
  check_output(target, overwrite);
  const fs::path temporary = sibling(target_, "tmp");
  std::error_code error;
  fs::remove_all(temporary, error);  // of a process with our number that was killed
  if (!fs::create_directory(temporary, error))
    fail_file("{}: cannot be created: {}", target_.string(), error.message());
  temporary_ = temporary;
}

AtomicDirectory::~AtomicDirectory() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void AtomicDirectory::commit() {
  sync_folder(temporary_);
  check_output(target_, overwrite_);  // hours may have passed since the first time
  if (!fs::exists(target_)) {
    rename_or_fail(temporary_, target_);
  } else {
    const fs::path old = sibling(target_, "old");
    rename_or_fail(target_, old);
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
      const int reason = errno;
      rename_or_fail(old, target_);
      fail_file("{}: cannot be put in place: {}; the old one is untouched", target_.string(),
                std::strerror(reason));
    }
    std::error_code ignored;
    fs::remove_all(old, ignored);
  }
  temporary_.clear();
  sync_folder(target_.parent_path());
}

}  // namespace cleave
