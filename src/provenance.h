#pragma once

#include <string>

#include "cleave/export.h"

namespace cleave {

/// The text of cleave.json; docs/file_format.md describes it.
/// @throws InvalidArgument  spec_json is not an object
std::string provenance_json(const Provenance& provenance);

}  // namespace cleave
