#include <fmt/format.h>

#include <string>
#include <string_view>

#include "cleave/error.h"
#include "pattern.h"

// Oniguruma (Ruby syntax) and PCRE2 agree on nearly everything that split patterns use. The
// differences that matter here:
//   \s     White_Space; PCRE2's includes U+180E
//   \w     Alphabetic, M, Nd, Pc; PCRE2's is L, N and "_"
//   \h \v  a hexadecimal digit, a vertical tab; classes of white space in PCRE2
//   \p{L} \p{N}   Unicode 16; PCRE2 10.42 knows Unicode 14
//   {,n}   {0,n}; literal text in PCRE2 10.42
//   [a[b]] [a&&b] set operations; literal text in PCRE2
//   x{n}+  a repeated repetition; possessive in PCRE2
//   (?m)   "." matches line feeds; about ^ and $ in PCRE2

namespace cleave {
namespace {

// Assigned by Unicode 15 and 16. Adding them to a PCRE2 that already knows them changes nothing.
constexpr std::string_view kNewLetters =
    R"(\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}\x{10d4a}-\x{10d65})"
    R"(\x{10d6f}-\x{10d85}\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240}\x{11380}-\x{11389}\x{1138b})"
    R"(\x{1138e}\x{11390}-\x{113b5}\x{113b7}\x{113d1}\x{113d3}\x{11bc0}-\x{11be0}\x{11f02})"
    R"(\x{11f04}-\x{11f10}\x{11f12}-\x{11f33}\x{1342f}\x{13441}-\x{13446}\x{13460}-\x{143fa})"
    R"(\x{16100}-\x{1611d}\x{16d40}-\x{16d6c}\x{18cff}\x{1b132}\x{1b155}\x{1df25}-\x{1df2a})"
    R"(\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb}\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739})"
    R"(\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr std::string_view kNewNumbers =
    R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59})"
    R"(\x{16130}-\x{16139}\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3})"
    R"(\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";

class Translator {
 public:
  Translator(std::string_view source, const std::string& where) : source_(source), where_(where) {}

  std::string run() {
    while (at_ < source_.size()) {
      if (source_[at_] == '\\')
        escape();
      else if (in_class_)
        class_character();
      else
        plain_character();
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const {
    throw FileError(fmt::format("{}: {} in \"{}\" is not supported; spell it without it", where_,
                                what, source_));
  }

  bool next_is(std::string_view text) const { return source_.substr(at_).starts_with(text); }
  void copy(std::size_t count) {
    out_ += source_.substr(at_, count);
    at_ += count;
  }
  void put(std::string_view text, std::size_t consumed) {
    out_ += text;
    at_ += consumed;
  }
  /// A set of code points, which needs its own brackets outside a class.
  void put_set(std::string_view members, bool negated, std::size_t consumed) {
    if (in_class_ && negated) refuse("a negated shorthand inside a character class");
    put(in_class_ ? std::string(members) : fmt::format("[{}{}]", negated ? "^" : "", members),
        consumed);
  }

  void escape() {
    if (at_ + 1 >= source_.size()) refuse("a trailing backslash");
    switch (source_[at_ + 1]) {
      case 's':
        return put(R"(\p{White_Space})", 2);
      case 'S':
        return put(R"(\P{White_Space})", 2);
      case 'w':
        return put_set(R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})", false, 2);
      case 'W':
        return put_set(R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})", true, 2);
      case 'h':
        return put_set("0-9A-Fa-f", false, 2);
      case 'H':
        return put_set("0-9A-Fa-f", true, 2);
      case 'v':
        return put(R"(\x0b)", 2);
      case 'b':
      case 'B':
        return in_class_ ? copy(2) : refuse("a word boundary");
      case 'u':
        return unicode_escape();
      case 'x':
        return hexadecimal_escape();
      case 'p':
      case 'P':
        return property();
      default:
        return copy(2);
    }
  }

  void unicode_escape() {
    if (at_ + 6 > source_.size()) refuse("a cut-off \\u");
    put(fmt::format(R"(\x{{{}}})", source_.substr(at_ + 2, 4)), 6);
  }

  void hexadecimal_escape() {
    const std::size_t close = source_.find('}', at_);
    const bool has_braces = source_.substr(at_ + 2).starts_with('{');
    copy(has_braces && close != std::string_view::npos ? close + 1 - at_ : 2);
  }

  void property() {
    const std::size_t close = source_.find('}', at_);
    if (close == std::string_view::npos || !source_.substr(at_ + 2).starts_with('{'))
      refuse("a property without {}");
    std::string_view name = source_.substr(at_ + 3, close - at_ - 3);
    const bool caret = name.starts_with('^');
    if (caret) name.remove_prefix(1);
    const bool negated = caret != (source_[at_ + 1] == 'P');
    const std::size_t length = close + 1 - at_;
    const bool letters = name == "L" || name == "Letter";
    if (!letters && name != "N" && name != "Number") return copy(length);
    if (in_class_ && negated) return copy(length);  // sets cannot be subtracted inside a class
    put_set(letters ? fmt::format(R"(\p{{L}}{})", kNewLetters)
                    : fmt::format(R"(\p{{N}}{})", kNewNumbers),
            negated, length);
  }

  void class_character() {
    if (next_is("[:")) {
      const std::size_t close = source_.find(":]", at_);
      if (close != std::string_view::npos) return copy(close + 2 - at_);
    }
    if (source_[at_] == '[') refuse("a nested character class");
    if (next_is("&&")) refuse("an intersection of character classes");
    in_class_ = source_[at_] != ']';
    copy(1);
  }

  void plain_character() {
    if (next_is("(?m")) refuse("the option (?m)");
    if (source_[at_] == '{') return interval();
    if (source_[at_] == '[') {
      in_class_ = true;
      copy(1);
      if (next_is("^")) copy(1);
      if (next_is("]")) copy(1);  // first in a class, it is literal
      return;
    }
    copy(1);
  }

  void interval() {
    const std::size_t close = source_.find('}', at_);
    if (close == std::string_view::npos) return copy(1);
    if (source_.substr(close).starts_with("}+")) refuse("a repetition of a repetition ({n}+)");
    if (next_is("{,")) put("{0", 1);
    copy(close + 1 - at_);
  }

  std::string_view source_;
  const std::string& where_;
  std::string out_;
  std::size_t at_ = 0;
  bool in_class_ = false;
};

}  // namespace

std::string pcre2_from_oniguruma(std::string_view oniguruma, const std::string& where) {
  return Translator(oniguruma, where).run();
}

}  // namespace cleave
