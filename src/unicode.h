#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace cleave {

/// One code point of a UTF-8 text.
struct CodePoint {
  char32_t value = 0;      ///< U+FFFD if the bytes are invalid
  std::size_t length = 0;  ///< bytes; of the maximal invalid subpart if the bytes are invalid
  bool valid = true;
};

/// Reads the code point that starts at text[position]; position < text.size().
///
/// An invalid sequence is as long as its longest prefix that a valid one could have (Unicode 3.9,
/// "maximal subpart"), at least one byte.
CodePoint decode_utf8(std::string_view text, std::size_t position) noexcept;

void append_utf8(std::string& out, char32_t code_point);

bool is_ascii(std::string_view text) noexcept;
bool is_valid_utf8(std::string_view text) noexcept;

/// The text with U+FFFD for each maximal invalid subpart: what Python's
/// `bytes.decode("utf-8", errors="replace")` gives.
std::string replace_invalid_utf8(std::string_view text);

/// The property White_Space.
bool is_whitespace(char32_t code_point) noexcept;

/// General category Nd, Nl or No.
bool is_numeric(char32_t code_point) noexcept;

// The classes that BERT's tokenizers go by, as HuggingFace tokenizers has them
// (unicode_tables.h).

/// What cleaning a text removes: control, format and private-use characters, and U+FFFD; no tab,
/// line feed or carriage return.
bool is_control(char32_t code_point) noexcept;
/// What stripping accents removes: category Mn.
bool is_accent(char32_t code_point) noexcept;
/// Category P, and all printable ASCII but letters, digits and space.
bool is_punctuation(char32_t code_point) noexcept;
/// The ideographs that get a space on either side: blocks, of which kana and Hangul are none.
bool is_chinese(char32_t code_point) noexcept;
/// Appends the lower case of a code point, whatever stands around it.
void append_lowercase(std::string& out, char32_t code_point);

/// The printable code point by which byte-level BPE writes a byte: printable Latin-1 stands for
/// itself, the other 68 bytes are U+0100 onwards, in order (GPT-2's table).
char32_t unicode_of_byte(unsigned char byte) noexcept;

/// The byte that a code point stands for in that table, or -1.
int byte_of_unicode(char32_t code_point) noexcept;

}  // namespace cleave
