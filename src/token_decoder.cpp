#include "token_decoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>

#include "json_node.h"
#include "pattern.h"
#include "unicode.h"

namespace cleave {
namespace {

using Tokens = std::vector<std::string>;

std::string join(const Tokens& tokens, std::string_view separator) {
  std::string text;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) text += separator;
    text += tokens[i];
  }
  return text;
}

/// The bytes a byte-level token stands for; a token with any other character stands for itself.
std::string bytes_of_token(const std::string& token) {
  std::string bytes;
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint next = decode_utf8(token, at);
    const int byte = byte_of_unicode(next.value);
    if (byte < 0) return token;
    bytes.push_back(static_cast<char>(byte));
    at += next.length;
  }
  return bytes;
}

Tokens decode_byte_level(const Tokens& tokens) {
  std::string bytes;
  for (const std::string& token : tokens) bytes += bytes_of_token(token);
  return {replace_invalid_utf8(bytes)};
}

/// The byte of "<0x41>", if the token is such.
std::optional<char> fallback_byte(const std::string& token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>') return std::nullopt;
  unsigned value = 0;
  const char* end = token.data() + 5;
  const auto [stopped, error] = std::from_chars(token.data() + 3, end, value, 16);
  if (error != std::errc() || stopped != end) return std::nullopt;
  return static_cast<char>(value);
}

/// Runs of byte tokens become text; a run that is not UTF-8 becomes one U+FFFD per byte.
Tokens decode_byte_fallback(const Tokens& tokens) {
  Tokens result;
  std::string bytes;
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (is_valid_utf8(bytes))
      result.push_back(bytes);
    else
      result.insert(result.end(), bytes.size(), "\xEF\xBF\xBD");
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    if (const auto byte = fallback_byte(token)) {
      bytes.push_back(*byte);
    } else {
      flush();
      result.push_back(token);
    }
  }
  flush();
  return result;
}

/// Cuts up to `start` and `stop` copies of `content` off the ends of a token.
std::string strip(std::string_view token, std::string_view content, std::int64_t start,
                  std::int64_t stop) {
  for (; start > 0 && token.starts_with(content); --start) token.remove_prefix(content.size());
  for (; stop > 0 && token.ends_with(content); --stop) token.remove_suffix(content.size());
  return std::string(token);
}

Tokens decode_metaspace(Tokens tokens, const Pattern& replacement, bool prepends) {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = replacement.replace(tokens[i], i == 0 && prepends ? "" : " ");
  return tokens;
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  std::size_t at = text.find(from), copied = 0;
  if (at == std::string::npos) return;
  std::string result;
  for (; at != std::string::npos; at = text.find(from, copied)) {
    result.append(text, copied, at - copied).append(to);
    copied = at + from.size();
  }
  text = result.append(text, copied);
}

/// English as it is written before a tokenizer spaces it out. HuggingFace does this to each token
/// by itself, so that what spans two of them ("do not") stays.
void clean_up(std::string& token) {
  constexpr std::pair<std::string_view, std::string_view> kReplacements[] = {
      {" .", "."},   {" ?", "?"},     {" !", "!"},    {" ,", ","},
      {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},  {" do not", " don't"},
      {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
  for (const auto& [from, to] : kReplacements) replace_all(token, from, to);
}

Tokens decode_word_piece(Tokens tokens, const std::string& prefix, bool cleans_up) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0 && tokens[i].starts_with(prefix))
      tokens[i].erase(0, prefix.size());
    else if (i > 0)
      tokens[i].insert(0, 1, ' ');
    if (cleans_up) clean_up(tokens[i]);
  }
  return tokens;
}

}  // namespace

TokenDecoder TokenDecoder::from_json(const JsonNode& node) {
  TokenDecoder decoder;
  if (node.is_null())
    decoder.joins_with_space_ = true;
  else
    decoder.add(node);
  return decoder;
}

void TokenDecoder::add(const JsonNode& node) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const JsonNode& part : node.at("decoders").elements()) add(part);
  } else if (type == "ByteLevel") {
    steps_.push_back(decode_byte_level);
  } else if (type == "ByteFallback") {
    steps_.push_back(decode_byte_fallback);
  } else if (type == "Fuse") {
    steps_.push_back([](const Tokens& tokens) { return Tokens{join(tokens, "")}; });
  } else if (type == "Replace") {
    steps_.push_back([pattern = Pattern::from_json(node.at("pattern")),
                      content = node.at("content").as_string()](Tokens tokens) {
      for (std::string& token : tokens) token = pattern.replace(token, content);
      return tokens;
    });
  } else if (type == "Strip") {
    const std::string content = node.at("content").as_string();
    if (content.empty()) node.fail("\"content\" is empty; expected one character");
    steps_.push_back([content, start = node.integer_or("start", 0),
                      stop = node.integer_or("stop", 0)](Tokens tokens) {
      for (std::string& token : tokens) token = strip(token, content, start, stop);
      return tokens;
    });
  } else if (type == "Metaspace") {
    const bool prepends = node.string_or("prepend_scheme", "always") != "never" &&
                          node.bool_or("add_prefix_space", true);
    steps_.push_back(
        [prepends, pattern = Pattern::literal(node.at("replacement").as_string())](Tokens tokens) {
          return decode_metaspace(std::move(tokens), pattern, prepends);
        });
  } else if (type == "WordPiece") {
    steps_.push_back([prefix = node.string_or("prefix", "##"),
                      cleans_up = node.bool_or("cleanup", true)](Tokens tokens) {
      return decode_word_piece(std::move(tokens), prefix, cleans_up);
    });
  } else {
    node.fail(fmt::format(
        "decoder \"{}\" is not supported; expected Sequence, ByteLevel, ByteFallback, Fuse, "
        "Replace, Strip, Metaspace or WordPiece",
        type));
  }
}

std::string TokenDecoder::apply(Tokens tokens) const {
  for (const Step& step : steps_) tokens = step(std::move(tokens));
  return join(tokens, joins_with_space_ ? " " : "");
}

}  // namespace cleave
