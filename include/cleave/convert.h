#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/export.h"
#include "cleave/fit_router.h"
#include "cleave/moe_layer.h"
#include "cleave/partition.h"
#include "cleave/text.h"

namespace cleave {

struct ConvertSpec {
  PartitionSpec partition;
  std::int64_t experts_per_token = 4;  ///< K
  GateMode gate = GateMode::kSoftmax;
  RouterFitSpec router;
  int threads = 0;  ///< 0: all cores
};

/// A converted model, not yet written.
struct Conversion {
  std::vector<MoeLayer> layers;  ///< [L]
  std::string router;            ///< "zero" (K = E), "ridge" (with calibration) or "random"
  std::int64_t calibration_tokens = 0;
};

/// Splits every FFN of a dense model into experts and attaches routers.
///
/// K = E gets a zero router: the model then equals the dense one. Otherwise the routers are fitted
/// on `calibration` (its windows run through the dense model; the first token of each is left out
/// of the statistics), or drawn at random (FactorLLM) without one.
///
/// @param calibration  nullptr: none
/// @param progress     called with (what, done, all)
/// @throws InvalidArgument  E does not divide H, K > E, or the model is already a mixture of
/// experts
/// @throws FileError        from reading the checkpoint
Conversion convert(
    const Checkpoint& source, const ConvertSpec& spec, const TokenWindows* calibration = nullptr,
    const std::function<void(const std::string&, std::int64_t, std::int64_t)>& progress = {});

/// Writes the conversion as a stock Mixtral directory (see write_mixtral).
/// @param spec_json  the settings to record in cleave.json, an object
void write_conversion(const std::filesystem::path& out, const Checkpoint& source,
                      const Conversion& conversion, const ConvertSpec& spec,
                      const std::string& spec_json, const WriteSpec& write);

}  // namespace cleave
