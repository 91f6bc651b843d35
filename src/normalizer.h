#pragma once

#include <functional>
#include <string>
#include <vector>

namespace cleave {

class JsonNode;

/// Rewrites a stretch of text between added tokens before it is split.
class Normalizer {
 public:
  /// Reads Sequence, Prepend, Replace, NFC, NFD, Lowercase and BertNormalizer; null is the
  /// identity.
  /// @throws FileError  any other type
  static Normalizer from_json(const JsonNode& node);

  /// @param text  valid UTF-8
  std::string apply(std::string text) const;

 private:
  using Step = std::function<std::string(std::string)>;
  void add(const JsonNode& node);
  std::vector<Step> steps_;
};

}  // namespace cleave
