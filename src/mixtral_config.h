#pragma once

#include <string>

#include "cleave/export.h"

namespace cleave {

/// `source` as the Mixtral that is written: uniform experts, untied head.
ModelConfig mixtral_config(const ModelConfig& source, const MixtralShape& shape, DType dtype);

/// The text of config.json for Transformers 4 and 5 and the engines that read either.
std::string mixtral_config_json(const ModelConfig& mixtral);

/// The text of a generation_config.json that names the special tokens; empty if none is known.
std::string generation_config_json(const ModelConfig& config);

}  // namespace cleave
