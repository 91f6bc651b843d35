#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace cleave {

class JsonNode;

/// A text cut into the pieces that the model tokenises one by one.
struct PieceList {
  struct Piece {
    std::size_t begin = 0, end = 0;  ///< bytes of `text`; never empty
    bool starts_input = false;       ///< nothing of the encoded text lies before it
  };
  std::string text;
  std::vector<Piece> pieces;

  std::string_view view(const Piece& piece) const {
    return std::string_view(text).substr(piece.begin, piece.end - piece.begin);
  }
};

/// Cuts normalised text into pieces, and spells them as the model wants them.
class PreTokenizer {
 public:
  /// Reads Sequence, ByteLevel, Split, Digits, Metaspace, BertPreTokenizer, WhitespaceSplit and
  /// Punctuation; null leaves the text whole.
  /// @throws FileError  any other type
  static PreTokenizer from_json(const JsonNode& node);

  /// @param text          valid UTF-8
  /// @param starts_input  the text begins where the encoded text begins
  PieceList apply(std::string text, bool starts_input) const;

 private:
  using Step = std::function<void(PieceList&)>;
  void add(const JsonNode& node);
  void add_byte_level(const JsonNode& node);
  void add_split(const JsonNode& node);
  void add_metaspace(const JsonNode& node);
  std::vector<Step> steps_;
};

}  // namespace cleave
