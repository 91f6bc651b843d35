#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "token_table.h"

namespace cleave {

class JsonNode;

/// The longest known piece first, then the longest that continues it, and so on; a word that leaves
/// a rest is one unknown token: `model` of a BERT's `tokenizer.json`. Immutable.
class WordPiece {
 public:
  /// @throws FileError  an option is missing or of the wrong type, or the unknown token is no token
  static WordPiece from_json(const JsonNode& node);

  struct Workspace {};  ///< nothing is kept between words

  /// Appends the ids of a word. No copies: its pieces are looked up where they lie.
  /// @param word  valid UTF-8, not empty
  void encode(std::string_view word, Workspace& workspace, std::vector<std::int32_t>& ids) const;

  const TokenTable& tokens() const { return tokens_; }

 private:
  struct Piece {
    std::int32_t id = -1;  // -1: none
    std::size_t length = 0;
  };
  Piece longest_piece(std::string_view rest, bool continues) const;

  TokenTable tokens_;
  TokenTable continuations_;  // those with the prefix, without it
  // Bytes, those that occur, longest first: one long token must not make every length be tried.
  std::vector<std::size_t> token_lengths_, continuation_lengths_;
  std::int64_t max_characters_ = 0;  // of a word that is not unknown
  std::int32_t unk_id_ = -1;
};

}  // namespace cleave
