#pragma once

#include <string>

#include "cleave/export.h"

namespace cleave {

/// README.md of a written model: what it is made of, how, and how to open it.
/// @param name  of the directory it will lie in
std::string model_card(const std::string& name, const ModelConfig& config,
                       const Provenance& provenance);

}  // namespace cleave
