#pragma once

#include <string>
#include <string_view>

namespace cleave {

/// Unicode normalisation form C (UAX #15) of valid UTF-8.
std::string normalize_nfc(std::string_view text);

}  // namespace cleave
