#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace cleave {

class JsonNode;

/// A stretch of a text: a match of a pattern, or what lies between two.
struct Segment {
  std::size_t begin = 0, end = 0;  ///< bytes
  bool is_match = false;
};

/// What `tokenizer.json` searches texts with: a literal or a regular expression.
///
/// Regular expressions are Oniguruma's (Ruby syntax, Unicode 16) in the files and run on PCRE2
/// here. They are translated, so that \s, \w, \p{L} and \p{N} mean the same code points; what
/// cannot be translated is refused. Concurrent use is safe.
class Pattern {
 public:
  /// Reads {"String": ...} or {"Regex": ...}.
  /// @throws FileError  neither of the two, or an expression that does not compile
  static Pattern from_json(const JsonNode& node);
  static Pattern literal(std::string text);
  /// @param where  begins the message of the FileError
  static Pattern regex(std::string_view oniguruma, const std::string& where);

  /// Segments that cover the text in order, none empty except where an expression matches the
  /// empty string. An empty literal matches nowhere.
  /// @param text  valid UTF-8
  /// @throws InvalidArgument  the expression backtracks beyond PCRE2's match limit on this text
  void find(std::string_view text, std::vector<Segment>& out) const;

  /// The text with every match replaced.
  std::string replace(std::string_view text, std::string_view replacement) const;

 private:
  struct Code;  // a compiled PCRE2 expression
  bool next_match(std::string_view text, std::size_t from, Segment& match) const;

  std::string literal_;
  std::shared_ptr<const Code> code_;  // null: the pattern is literal_
};

/// The PCRE2 spelling of an Oniguruma expression.
/// @throws FileError  a construct with another or no meaning in PCRE2
std::string pcre2_from_oniguruma(std::string_view oniguruma, const std::string& where);

}  // namespace cleave
