#include "word_piece.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <string>

#include "json_node.h"
#include "json_vocabulary.h"

namespace cleave {
namespace {

bool is_continuation_byte(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

std::int64_t count_code_points(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return !is_continuation_byte(c); });
}

void sort_lengths(std::vector<std::size_t>& lengths) {
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
}

}  // namespace

WordPiece WordPiece::from_json(const JsonNode& node) {
  WordPiece model;
  model.tokens_ = read_vocabulary(node.at("vocab"));
  const std::string prefix = node.at("continuing_subword_prefix").as_string();
  std::vector<TokenTable::Entry> continuations;
  for (const auto& token : node.at("vocab").value().items()) {
    const std::string_view spelling = token.key();
    model.token_lengths_.push_back(spelling.size());
    if (spelling.size() <= prefix.size() || !spelling.starts_with(prefix)) continue;
    continuations.emplace_back(token.value().get<std::int32_t>(), spelling.substr(prefix.size()));
    model.continuation_lengths_.push_back(spelling.size() - prefix.size());
  }
  sort_lengths(model.token_lengths_);
  sort_lengths(model.continuation_lengths_);
  model.continuations_ = TokenTable(std::move(continuations));

  model.max_characters_ = node.at("max_input_chars_per_word").as_integer();
  if (model.max_characters_ < 0)
    node.fail(fmt::format("max_input_chars_per_word is {}; expected 0 or more",
                          node.at("max_input_chars_per_word").value().dump()));
  const std::string unk = node.at("unk_token").as_string();
  model.unk_id_ = model.tokens_.find(unk);
  if (model.unk_id_ < 0) node.fail(fmt::format("unk_token \"{}\" is not in the vocabulary", unk));
  return model;
}

void WordPiece::encode(std::string_view word, Workspace&, std::vector<std::int32_t>& ids) const {
  if (count_code_points(word) > max_characters_) return ids.push_back(unk_id_);
  const std::size_t first = ids.size();
  for (std::size_t at = 0; at < word.size();) {
    const Piece piece = longest_piece(word.substr(at), at > 0);
    if (piece.id < 0) {
      ids.resize(first);
      return ids.push_back(unk_id_);
    }
    ids.push_back(piece.id);
    at += piece.length;
  }
}

WordPiece::Piece WordPiece::longest_piece(std::string_view rest, bool continues) const {
  const TokenTable& table = continues ? continuations_ : tokens_;
  for (const std::size_t length : continues ? continuation_lengths_ : token_lengths_) {
    if (length == 0 || length > rest.size()) continue;
    if (length < rest.size() && is_continuation_byte(rest[length])) continue;  // inside a character
    if (const std::int32_t id = table.find(rest.substr(0, length)); id >= 0) return {id, length};
  }
  return {};
}

}  // namespace cleave
