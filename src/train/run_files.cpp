#include "train/run_files.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/error.h"
#include "train/named_tensor.h"

namespace cleave::train {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kFormatVersion = 1;
constexpr std::string_view kStepPrefix = "step-";

[[noreturn]] void fail(const fs::path& path, const char* action) {
  throw FileError(fmt::format("{}: cannot {}: {}; check space and permissions", path.string(),
                              action, std::strerror(errno)));
}

/// A file descriptor that closes itself.
class Descriptor {
 public:
  Descriptor(const fs::path& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail(path, "open");
  }
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

void write_all(const Descriptor& file, std::string_view text, const fs::path& path) {
  while (!text.empty()) {
    const ssize_t written = ::write(file.get(), text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail(path, "write");
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

void write_durably(const fs::path& path, std::string_view text) {
  const Descriptor file(path, O_WRONLY | O_CREAT | O_TRUNC);
  write_all(file, text, path);
  if (::fsync(file.get()) != 0) fail(path, "write");
}

/// Makes the entries of a directory durable (new names, renames).
void sync_directory(const fs::path& path) {
  const Descriptor directory(path, O_RDONLY | O_DIRECTORY);
  if (::fsync(directory.get()) != 0) fail(path, "sync");
}

void make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error)
    throw FileError(fmt::format("{}: cannot create the folder: {}; check the path and permissions",
                                path.string(), error.message()));
}

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in) throw FileError(path.string() + ": cannot be read");
  return std::move(text).str();
}

/// The first leaf in which two identities differ, as a sentence; empty when they agree.
std::string first_difference(const json& saved, const json& now) {
  const json before = saved.flatten();
  const json after = now.flatten();
  for (const auto& [key, value] : after.items()) {
    const std::string name = key.substr(key.rfind('/') + 1);
    if (!before.contains(key))
      return fmt::format("{} was not set and is {} now", name, value.dump());
    if (before[key] != value)
      return fmt::format("{} was {} and is {} now", name, before[key].dump(), value.dump());
  }
  for (const auto& [key, value] : before.items())
    if (!after.contains(key))
      return fmt::format("{} was {} and is not set now", key.substr(key.rfind('/') + 1),
                         value.dump());
  return {};
}

json state_json(const RunPosition& position, const AdamW& optimizer, const json& identity) {
  json slots = json::object();
  for (const auto& slot : optimizer.slots())
    if (slot.steps > 0) slots[slot.name] = slot.steps;
  return {{"version", kFormatVersion},
          {"step", position.step},
          {"tokens", position.tokens},
          {"epoch", position.cursor.epoch},
          {"position", position.cursor.position},
          {"optimizer_steps", std::move(slots)},
          {"identity", identity}};
}

void restore_slots(AdamW& optimizer, const json& slots, const fs::path& directory) {
  const auto weights = SafetensorsFile::open(directory / "weights.safetensors");
  const auto moments = SafetensorsFile::open(directory / "optimizer.safetensors");
  struct Values {
    std::size_t slot;
    std::vector<float> master, first, second;
    std::int64_t steps;
  };
  // Everything is read before anything is changed: a damaged file must leave the run untouched.
  std::vector<Values> all;
  for (std::size_t i = 0; i < optimizer.slots().size(); ++i) {
    const auto& slot = optimizer.slots()[i];
    if (!slots.contains(slot.name)) continue;
    all.push_back({i, weights.read(slot.name), moments.read(slot.name + ".first"),
                   moments.read(slot.name + ".second"), slots.at(slot.name).get<std::int64_t>()});
  }
  if (all.size() != slots.size())
    throw FileError((directory / "state.json").string() +
                    ": names tensors that this model does not train");
  for (const auto& v : all) optimizer.restore(v.slot, v.master, v.first, v.second, v.steps);
}

}  // namespace

CheckpointStore::CheckpointStore(fs::path directory, std::int64_t keep)
    : directory_(std::move(directory)), keep_(keep) {}

fs::path CheckpointStore::step_directory(std::int64_t step) const {
  return directory_ / fmt::format("{}{}", kStepPrefix, step);
}

std::vector<std::int64_t> CheckpointStore::steps() const {
  std::vector<std::int64_t> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory_, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kStepPrefix)) continue;
    std::int64_t step = 0;
    const char* end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + kStepPrefix.size(), end, step);
    if (parsed.ec == std::errc() && parsed.ptr == end) found.push_back(step);
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

bool CheckpointStore::empty() const { return steps().empty(); }

void CheckpointStore::remove_all() {
  std::error_code error;
  fs::remove_all(directory_, error);
  if (error)
    throw FileError(fmt::format("{}: cannot remove the earlier run's checkpoints: {}",
                                directory_.string(), error.message()));
}

void CheckpointStore::save(const RunPosition& position, const AdamW& optimizer,
                           const json& identity) {
  make_directories(directory_);
  const fs::path final_path = step_directory(position.step);
  const fs::path partial = directory_ / fmt::format(".step-{}.partial", position.step);
  fs::remove_all(partial);
  try {
    make_directories(partial);
    std::vector<NamedTensor> weights;
    std::vector<NamedTensor> moments;
    for (const auto& slot : optimizer.slots()) {
      if (slot.steps == 0) continue;
      weights.push_back(named(slot.name, slot.master));
      moments.push_back(named(slot.name + ".first", slot.first));
      moments.push_back(named(slot.name + ".second", slot.second));
    }
    write_safetensors(partial / "weights.safetensors", weights, DType::kF32);
    write_safetensors(partial / "optimizer.safetensors", moments, DType::kF32);
    write_durably(partial / "state.json", state_json(position, optimizer, identity).dump(2) + "\n");
    sync_directory(partial);
    fs::remove_all(final_path);  // only ever a damaged one that a resumed run reached again
    fs::rename(partial, final_path);
    sync_directory(directory_);
  } catch (const fs::filesystem_error& error) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw FileError(fmt::format("{}: cannot save the checkpoint: {}", final_path.string(),
                                error.code().message()));
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
  prune(position.step);
}

void CheckpointStore::prune(std::int64_t newest) const {
  std::int64_t kept = 0;
  std::error_code ignored;
  // One that is newer than what was just saved is damaged: a resumed run has skipped it.
  for (const std::int64_t step : steps())
    if (step > newest || ++kept > keep_) fs::remove_all(step_directory(step), ignored);
}

RunPosition CheckpointStore::restore(AdamW& optimizer, const json& identity,
                                     const std::function<void(const std::string&)>& notice) const {
  const auto present = steps();
  if (present.empty())
    throw InvalidArgument(fmt::format("resume: no checkpoint in {}; start the run without resuming",
                                      directory_.string()));
  std::string damage;
  for (const std::int64_t step : present) {
    const fs::path directory = step_directory(step);
    try {
      const json state = json::parse(read_file(directory / "state.json"));
      if (state.at("version").get<int>() != kFormatVersion)
        throw FileError((directory / "state.json").string() + ": written by another version");
      const std::string difference = first_difference(state.at("identity"), identity);
      if (!difference.empty())
        throw InvalidArgument(fmt::format(
            "resume: {} (checkpoint of step {}); use the earlier value or start a new run",
            difference, step));
      const RunPosition position{
          state.at("step").get<std::int64_t>(),
          state.at("tokens").get<std::int64_t>(),
          {state.at("epoch").get<std::int64_t>(), state.at("position").get<std::int64_t>()}};
      restore_slots(optimizer, state.at("optimizer_steps"), directory);
      return position;
    } catch (const InvalidArgument&) {
      throw;
    } catch (const json::exception& error) {
      damage = fmt::format("{}: malformed ({})", (directory / "state.json").string(), error.what());
    } catch (const FileError& error) {
      damage = error.what();
    }
    if (notice) notice(fmt::format("checkpoint of step {} skipped: {}", step, damage));
  }
  throw FileError(fmt::format("resume: no checkpoint in {} is whole ({}); start a new run",
                              directory_.string(), damage));
}

MetricsFile::MetricsFile(fs::path file, std::int64_t keep_until) : file_(std::move(file)) {
  if (file_.has_parent_path()) make_directories(file_.parent_path());
  std::string kept;
  if (fs::exists(file_)) {
    std::istringstream lines(read_file(file_));
    for (std::string line; std::getline(lines, line);) {
      const json entry = json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!entry.is_object() || !entry.contains("step") || !entry["step"].is_number_integer())
        continue;
      if (entry["step"].get<std::int64_t>() <= keep_until) kept += line + "\n";
    }
  }
  const fs::path partial = file_.string() + ".partial";
  std::error_code error;
  try {
    write_durably(partial, kept);
  } catch (...) {
    fs::remove(partial, error);
    throw;
  }
  fs::rename(partial, file_, error);
  if (error)
    throw FileError(fmt::format("{}: cannot be replaced: {}", file_.string(), error.message()));
}

void MetricsFile::append(const nlohmann::ordered_json& line) {
  const Descriptor file(file_, O_WRONLY | O_CREAT | O_APPEND);
  write_all(file, line.dump() + "\n", file_);
}

}  // namespace cleave::train
