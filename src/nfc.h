#pragma once

#include <string>
#include <string_view>

namespace cleave {

/// Unicode normalisation form C (UAX #15) of valid UTF-8.
std::string normalize_nfc(std::string_view text);

/// Form D: all that has a canonical decomposition decomposed, marks sorted by class.
std::string normalize_nfd(std::string_view text);

}  // namespace cleave
