#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/model.h"
#include "paths.h"

namespace cleave::testing {

/// A window of a tiny random BERT with what Transformers makes of it
/// (scripts/golden/make_encoder_golden.py).
struct EncoderWindow {
  std::vector<std::int32_t> ids;  ///< [T]
  std::vector<float> hidden;      ///< [T, D]
  std::vector<float> ffn_input;   ///< [L, T, D]
};

/// 3 layers, D 24, H 40, 3 heads, 40 positions, V 64.
inline std::filesystem::path tiny_encoder_dir() {
  return source_dir() / "tests" / "golden" / "encoder" / "bert";
}

inline std::vector<EncoderWindow> tiny_encoder_windows() {
  std::vector<EncoderWindow> windows;
  const auto file = SafetensorsFile::open(tiny_encoder_dir() / "expected.safetensors");
  for (int n = 0; file.contains("ids_" + std::to_string(n)); ++n) {
    EncoderWindow window;
    for (const float id : file.read("ids_" + std::to_string(n)))
      window.ids.push_back(static_cast<std::int32_t>(id));
    window.hidden = file.read("hidden_" + std::to_string(n));
    window.ffn_input = file.read("ffn_input_" + std::to_string(n));
    windows.push_back(std::move(window));
  }
  return windows;
}

/// Each norm brings values back to about 1 (at most 5 here), so errors of the layers add: in each,
/// a value goes through sums of D, T, D and H terms, each of which rounds once. (Not larger: a test
/// shows that another GELU or epsilon is outside.)
inline double hidden_tolerance(const ModelConfig& c, std::size_t tokens) {
  const auto terms =
      static_cast<double>(2 * c.hidden_size + c.intermediate_size) + static_cast<double>(tokens);
  return static_cast<double>(c.num_layers) * terms * std::numeric_limits<float>::epsilon() / 2.0;
}

/// Final hidden states [T, D] of one window of an encoder.
inline std::vector<float> hidden_of(Model& model, std::span<const std::int32_t> ids,
                                    const ForwardHooks& hooks = {}) {
  const auto T = static_cast<std::int64_t>(ids.size());
  KvCache cache(model.config(), T);
  std::vector<float> hidden(static_cast<std::size_t>(T * model.config().hidden_size));
  model.forward(ids, cache, {hidden.data(), T, model.config().hidden_size}, hooks);
  return hidden;
}

}  // namespace cleave::testing
