#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/model.h"
#include "paths.h"

namespace cleave::testing {

/// A tiny random model with Transformers' logits for some ids
/// (scripts/golden/make_logits_golden.py).
struct TinyGolden {
  std::filesystem::path directory;
  std::vector<std::int32_t> ids;  ///< [T]
  std::vector<float> logits;      ///< [T, V]
};

inline TinyGolden tiny_golden(const std::string& name) {
  TinyGolden golden;
  golden.directory = source_dir() / "tests" / "golden" / "logits" / name;
  const auto file = SafetensorsFile::open(golden.directory / "expected.safetensors");
  for (const float id : file.read("ids")) golden.ids.push_back(static_cast<std::int32_t>(id));
  golden.logits = file.read("logits");
  return golden;
}

/// Logits [T, V] of all positions; the tokens go through in pieces (0: at once).
inline std::vector<float> all_logits(Model& model, std::span<const std::int32_t> ids,
                                     std::size_t piece = 0) {
  const std::int64_t D = model.config().hidden_size, V = model.config().vocab_size;
  const auto T = static_cast<std::int64_t>(ids.size());
  KvCache cache(model.config(), T);
  std::vector<float> hidden(T * D), logits(T * V);
  if (piece == 0) piece = ids.size();
  for (std::size_t begin = 0; begin < ids.size(); begin += piece) {
    const std::size_t count = std::min(piece, ids.size() - begin);
    model.forward(ids.subspan(begin, count), cache,
                  {hidden.data() + begin * D, static_cast<std::int64_t>(count), D});
  }
  model.logits({hidden.data(), T, D}, {logits.data(), T, V});
  return logits;
}

}  // namespace cleave::testing
