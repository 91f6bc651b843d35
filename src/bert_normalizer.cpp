#include "bert_normalizer.h"

#include "json_node.h"
#include "nfc.h"
#include "unicode.h"

namespace cleave {
namespace {

/// Calls append(out, code point) for each code point of valid UTF-8.
template <class Append>
std::string rewrite_code_points(std::string_view text, const Append& append) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint next = decode_utf8(text, at);
    append(out, next.value);
    at += next.length;
  }
  return out;
}

std::string clean(std::string_view text) {
  return rewrite_code_points(text, [](std::string& out, char32_t c) {
    if (!is_control(c)) append_utf8(out, is_whitespace(c) ? U' ' : c);
  });
}

std::string space_chinese_chars(std::string_view text) {
  return rewrite_code_points(text, [](std::string& out, char32_t c) {
    const bool chinese = is_chinese(c);
    if (chinese) out += ' ';
    append_utf8(out, c);
    if (chinese) out += ' ';
  });
}

std::string without_accents(std::string_view text) {
  return rewrite_code_points(normalize_nfd(text), [](std::string& out, char32_t c) {
    if (!is_accent(c)) append_utf8(out, c);
  });
}

}  // namespace

BertNormalizer BertNormalizer::from_json(const JsonNode& node) {
  BertNormalizer normalizer;
  normalizer.clean_text = node.bool_or("clean_text", true);
  normalizer.chinese_chars = node.bool_or("handle_chinese_chars", true);
  normalizer.lowercase = node.bool_or("lowercase", true);
  normalizer.strip_accents = node.bool_or("strip_accents", normalizer.lowercase);
  return normalizer;
}

std::string BertNormalizer::apply(std::string_view text) const {
  std::string result(text);
  if (clean_text) result = clean(result);
  if (is_ascii(result)) return lowercase ? to_lowercase(result) : result;
  if (chinese_chars) result = space_chinese_chars(result);
  if (strip_accents) result = without_accents(result);
  return lowercase ? to_lowercase(result) : result;
}

std::string to_lowercase(std::string_view text) {
  return rewrite_code_points(text, append_lowercase);
}

}  // namespace cleave
