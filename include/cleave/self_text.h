#pragma once

#include <cstdint>
#include <functional>

#include "cleave/model.h"
#include "cleave/text.h"

namespace cleave {

struct SelfTextSpec {
  std::int64_t windows = 16;
  std::int64_t context = 1024;  ///< tokens of a window
  double temperature = 1.0;     ///< 1: as often as the model believes
  std::uint64_t seed = 0;
};

/// Text that a model writes by itself, to calibrate it where no text of its domain is at hand, or
/// beside one that is narrow (self-calibration, 2410.17170). Every window begins with a random
/// token of the vocabulary, so that windows differ (LLM-QAT, 2305.17888); the following ones are
/// drawn from the model. A token that ends a text is replaced by a random one, which begins the
/// next.
///
/// The same seed gives the same tokens on the same machine and thread count.
/// @param model     tokens go through it in batches; about 1 GiB of caches at most, or one window's
/// @param progress  called with the tokens done and those of all windows
/// @throws InvalidArgument  windows < 1, context < 2, a temperature of 0 or below, or an encoder
TokenWindows self_generated_text(
    Model& model, const SelfTextSpec& spec,
    const std::function<void(std::int64_t done, std::int64_t all)>& progress = {});

}  // namespace cleave
