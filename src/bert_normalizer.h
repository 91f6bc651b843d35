#pragma once

#include <string>
#include <string_view>

namespace cleave {

class JsonNode;

/// What HuggingFace's BertNormalizer does to a text, step by step in this order.
struct BertNormalizer {
  bool clean_text = true;     ///< control characters go, each white space becomes U+0020
  bool chinese_chars = true;  ///< a space on either side of each ideograph
  bool strip_accents = true;  ///< decomposed, without the non-spacing marks
  bool lowercase = true;      ///< code point by code point

  /// Without "strip_accents", or where it is null, that follows "lowercase".
  static BertNormalizer from_json(const JsonNode& node);

  /// @param text  valid UTF-8
  std::string apply(std::string_view text) const;
};

/// Every code point's lower case.
std::string to_lowercase(std::string_view text);

}  // namespace cleave
