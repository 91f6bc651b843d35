#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text_hash.h"

namespace cleave {

class JsonNode;
class Normalizer;
class TokenTable;

/// A token that is recognised in the text itself, before the model sees it.
struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  std::string spelling;  ///< what the text must contain: `content`, normalised if `normalized`
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

/// A stretch of a text: an added token, or text for the model.
struct TextSection {
  std::size_t begin = 0, end = 0;     ///< bytes
  const AddedToken* token = nullptr;  ///< null: text
};

/// Finds a set of added tokens in a text: leftmost, and of those that start there the longest.
class AddedTokenMatcher {
 public:
  void add(const AddedToken& token);
  /// Sections that cover the text in order. With lstrip or rstrip a token's section takes the
  /// white space beside it.
  std::vector<TextSection> split(std::string_view text) const;

 private:
  const AddedToken* match_at(std::string_view text, std::size_t at) const;

  TextMap<const AddedToken*> by_spelling_;
  std::array<std::vector<std::size_t>, 256> lengths_by_first_byte_;  // longest first
};

/// The added tokens of a tokenizer.
class AddedTokens {
 public:
  /// Ids are the vocabulary's where it knows the content, else the next free ones, as HuggingFace
  /// assigns them.
  static AddedTokens from_json(const JsonNode& list, const TokenTable& vocabulary,
                               const Normalizer& normalizer);

  AddedTokens(AddedTokens&&) noexcept = default;  // the matchers point into by_id_
  AddedTokens& operator=(AddedTokens&&) noexcept = default;

  /// Tokens to be looked for before normalisation, and after it.
  const AddedTokenMatcher& raw() const { return raw_; }
  const AddedTokenMatcher& normalized() const { return normalized_; }
  const AddedToken* by_id(std::int32_t id) const;
  const AddedToken* by_content(std::string_view content) const;
  std::int32_t max_id() const { return max_id_; }  ///< -1 if there is none

 private:
  AddedTokens() = default;

  std::unordered_map<std::int32_t, AddedToken> by_id_;  // node-based: addresses stay
  TextMap<std::int32_t> id_by_content_;
  AddedTokenMatcher raw_, normalized_;
  std::int32_t max_id_ = -1;
};

}  // namespace cleave
