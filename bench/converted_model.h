#pragma once

#include <filesystem>

#include "cleave/cleave.h"

namespace cleave::bench {

/// A conversion of a dense model to 8 experts of which 2 run per token, as `cleave convert DENSE
/// DIR
/// --experts 8 --active 2 --dtype bf16 --calibration TEXT --calibration-tokens 8192` writes it, in
/// the folder for temporary files; gone at the end.
class ConvertedModel {
 public:
  /// @param text  empty: routers that are not fitted, which run as fast
  /// @throws InvalidArgument, FileError  from convert() and the text
  ConvertedModel(const Checkpoint& dense, const std::filesystem::path& text, int threads);
  ~ConvertedModel();
  ConvertedModel(const ConvertedModel&) = delete;
  ConvertedModel& operator=(const ConvertedModel&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path folder_, path_;
};

}  // namespace cleave::bench
