#pragma once

#include <functional>
#include <string>
#include <vector>

namespace cleave {

class JsonNode;

/// Turns the spellings of tokens back into text.
class TokenDecoder {
 public:
  /// Reads Sequence, ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace and WordPiece; null
  /// joins the tokens with a space.
  /// @throws FileError  any other type
  static TokenDecoder from_json(const JsonNode& node);

  std::string apply(std::vector<std::string> tokens) const;

 private:
  using Tokens = std::vector<std::string>;
  using Step = std::function<Tokens(Tokens)>;
  void add(const JsonNode& node);
  std::vector<Step> steps_;
  bool joins_with_space_ = false;
};

}  // namespace cleave
