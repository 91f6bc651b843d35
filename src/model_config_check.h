#pragma once

#include <string>

#include "cleave/model_config.h"

namespace cleave {

/// Refuses shapes and constants no transformer can have: what config.json and GGUF keys have in
/// common. `origin` names the file.
/// @throws FileError
void check_model_config(const ModelConfig& config, const std::string& origin);

}  // namespace cleave
