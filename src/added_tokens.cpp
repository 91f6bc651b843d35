#include "added_tokens.h"

#include <algorithm>

#include "json_node.h"
#include "normalizer.h"
#include "pattern.h"
#include "token_table.h"
#include "unicode.h"

namespace cleave {
namespace {

bool is_word(std::string_view code_point) {
  static const Pattern kWord = Pattern::regex(R"(\w)", "single_word");
  std::vector<Segment> segments;
  kWord.find(code_point, segments);
  return !segments.empty() && segments.front().is_match;
}

bool starts_with_word(std::string_view text) {
  return !text.empty() && is_word(text.substr(0, decode_utf8(text, 0).length));
}

/// The start of the last code point of valid UTF-8.
std::size_t last_code_point(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

bool ends_with_word(std::string_view text) {
  return !text.empty() && is_word(text.substr(last_code_point(text)));
}

std::size_t without_trailing_space(std::string_view text) {
  while (!text.empty()) {
    const std::size_t last = last_code_point(text);
    if (!is_whitespace(decode_utf8(text, last).value)) break;
    text = text.substr(0, last);
  }
  return text.size();
}

std::size_t leading_space(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const CodePoint next = decode_utf8(text, at);
    if (!is_whitespace(next.value)) break;
    at += next.length;
  }
  return at;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token) {
  by_spelling_.insert_or_assign(token.spelling, &token);
  auto& lengths = lengths_by_first_byte_[static_cast<unsigned char>(token.spelling[0])];
  const auto place =
      std::lower_bound(lengths.begin(), lengths.end(), token.spelling.size(), std::greater<>());
  if (place == lengths.end() || *place != token.spelling.size())
    lengths.insert(place, token.spelling.size());
}

const AddedToken* AddedTokenMatcher::match_at(std::string_view text, std::size_t at) const {
  for (const std::size_t length : lengths_by_first_byte_[static_cast<unsigned char>(text[at])]) {
    if (length > text.size() - at) continue;
    const auto found = by_spelling_.find(text.substr(at, length));
    if (found != by_spelling_.end()) return found->second;
  }
  return nullptr;
}

std::vector<TextSection> AddedTokenMatcher::split(std::string_view text) const {
  std::vector<TextSection> sections;
  std::size_t covered = 0;
  for (std::size_t at = 0; at < text.size() && !by_spelling_.empty();) {
    const AddedToken* token = match_at(text, at);
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + token->spelling.size();
    at = end;  // also where the match is discarded below, and regardless of stripped space
    if (token->single_word &&
        (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end))))
      continue;
    if (token->lstrip) begin = std::max(without_trailing_space(text.substr(0, begin)), covered);
    if (token->rstrip) end += leading_space(text.substr(end));
    if (covered < begin) sections.push_back({covered, begin, nullptr});
    sections.push_back({begin, end, token});
    covered = end;
  }
  if (covered != text.size()) sections.push_back({covered, text.size(), nullptr});
  return sections;
}

AddedTokens AddedTokens::from_json(const JsonNode& list, const TokenTable& vocabulary,
                                   const Normalizer& normalizer) {
  AddedTokens tokens;
  std::int32_t next_id = vocabulary.size();
  for (const JsonNode& node : list.elements()) {
    AddedToken token;
    token.content = node.at("content").as_string();
    if (token.content.empty()) continue;
    token.single_word = node.bool_or("single_word", false);
    token.lstrip = node.bool_or("lstrip", false);
    token.rstrip = node.bool_or("rstrip", false);
    token.special = node.bool_or("special", false);
    token.normalized = node.bool_or("normalized", !token.special);
    token.spelling = token.normalized ? normalizer.apply(token.content) : token.content;
    if (token.spelling.empty()) node.fail("the token is empty after normalisation");

    const AddedToken* known = tokens.by_content(token.content);
    token.id = known != nullptr ? known->id : vocabulary.find(token.content);
    if (token.id < 0) token.id = next_id++;
    tokens.max_id_ = std::max(tokens.max_id_, token.id);
    tokens.id_by_content_[token.content] = token.id;
    tokens.by_id_[token.id] = std::move(token);
  }
  for (const auto& [id, token] : tokens.by_id_)
    (token.normalized ? tokens.normalized_ : tokens.raw_).add(token);
  return tokens;
}

const AddedToken* AddedTokens::by_id(std::int32_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &found->second;
}

const AddedToken* AddedTokens::by_content(std::string_view content) const {
  const auto found = id_by_content_.find(content);
  return found == id_by_content_.end() ? nullptr : by_id(found->second);
}

}  // namespace cleave
