#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "cleave/train/data.h"
#include "cleave/train/optimizer.h"

namespace cleave::train {

// What a run leaves on disk: DIR/checkpoints/step-N/{weights,optimizer}.safetensors + state.json,
// and DIR/metrics.jsonl.

/// Where a run stands, apart from the weights and moments that AdamW holds.
struct RunPosition {
  std::int64_t step = 0;    ///< finished
  std::int64_t tokens = 0;  ///< trained on
  DataCursor cursor;
};

/// The checkpoints of one run. A checkpoint is a folder that appears by rename, so it is whole or
/// absent.
class CheckpointStore {
 public:
  CheckpointStore(std::filesystem::path directory, std::int64_t keep);

  /// Writes step-N and removes all but the newest `keep`.
  /// @param identity  settings and fingerprints that a resumed run must share; an object
  /// @throws FileError  disk full or not writable; no half of it stays
  void save(const RunPosition& position, const AdamW& optimizer, const nlohmann::json& identity);

  /// Restores the newest checkpoint that can be read; one that cannot is reported and skipped.
  /// @throws InvalidArgument  there is none, or its identity differs (names the first difference)
  /// @throws FileError        all are damaged
  RunPosition restore(AdamW& optimizer, const nlohmann::json& identity,
                      const std::function<void(const std::string&)>& notice) const;

  bool empty() const;
  void remove_all();

 private:
  std::filesystem::path step_directory(std::int64_t step) const;
  /// Steps with a folder, newest first.
  std::vector<std::int64_t> steps() const;
  void prune(std::int64_t newest) const;
  std::filesystem::path directory_;
  std::int64_t keep_;
};

/// metrics.jsonl: one JSON object a line, flushed at once.
class MetricsFile {
 public:
  /// Keeps the lines of steps up to `keep_until` and drops later ones, so that a resumed run never
  /// writes a step twice. A half-written last line goes too.
  MetricsFile(std::filesystem::path file, std::int64_t keep_until);
  /// @throws FileError  the line could not be written
  void append(const nlohmann::ordered_json& line);

 private:
  std::filesystem::path file_;
};

}  // namespace cleave::train
