#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>

namespace cleave {

struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const noexcept {
    return std::hash<std::string_view>{}(text);
  }
};

/// A map from text that can be asked with a view.
template <class Value>
using TextMap = std::unordered_map<std::string, Value, TextHash, std::equal_to<>>;

}  // namespace cleave
