#include "unicode.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>

#include "unicode_tables.h"

namespace cleave {
namespace {

// What may follow a lead byte: how many bytes, and the range of the first of them. Only that first
// range is narrower than 80..BF; it excludes overlong forms, surrogates and values past U+10FFFF
// (Unicode, table 3-7).
struct LeadByte {
  std::size_t continuation = 0;
  unsigned char first_low = 0x80, first_high = 0xBF;
};

LeadByte lead_byte(unsigned char byte) noexcept {
  if (byte >= 0xC2 && byte <= 0xDF) return {1};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};
  if (byte == 0xED) return {2, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {2};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {3};
  if (byte == 0xF4) return {3, 0x80, 0x8F};
  return {};
}

/// The position of the first byte that is not ASCII, from `position` on.
std::size_t skip_ascii(std::string_view text, std::size_t position) noexcept {
  constexpr std::uint64_t kHighBits = 0x8080808080808080u;
  for (; position + 8 <= text.size(); position += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, text.data() + position, 8);
    if ((word & kHighBits) != 0) break;
  }
  while (position < text.size() && static_cast<unsigned char>(text[position]) < 0x80) ++position;
  return position;
}

/// The range that holds a code point, or null.
template <class Range>
const Range* range_of(std::span<const Range> ranges, char32_t code_point) noexcept {
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), code_point,
                       [](char32_t value, const Range& range) { return value < range.first; });
  if (after == ranges.begin() || code_point > std::prev(after)->last) return nullptr;
  return &*std::prev(after);
}

bool is_in(std::span<const unicode_tables::Range> ranges, char32_t code_point) noexcept {
  return range_of(ranges, code_point) != nullptr;
}

constexpr bool stands_for_itself(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr char32_t kFirstStandIn = 0x100;
constexpr int kStandIns = 68;  // bytes that are no printable Latin-1

struct ByteTable {
  std::array<char32_t, 256> unicode{};
  std::array<short, kFirstStandIn + kStandIns> byte{};
};

constexpr ByteTable make_byte_table() {
  ByteTable table;
  for (auto& entry : table.byte) entry = -1;
  char32_t stand_in = kFirstStandIn;
  for (int byte = 0; byte < 256; ++byte) {
    const char32_t shown = stands_for_itself(byte) ? static_cast<char32_t>(byte) : stand_in++;
    table.unicode[byte] = shown;
    table.byte[shown] = static_cast<short>(byte);
  }
  return table;
}

constexpr ByteTable kByteTable = make_byte_table();

}  // namespace

CodePoint decode_utf8(std::string_view text, std::size_t position) noexcept {
  const auto byte_at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte_at(position);
  if (first < 0x80) return {first, 1, true};
  const LeadByte lead = lead_byte(first);
  if (lead.continuation == 0) return {0xFFFD, 1, false};

  char32_t value = first & (0x3Fu >> lead.continuation);
  for (std::size_t i = 1; i <= lead.continuation; ++i) {
    if (position + i >= text.size()) return {0xFFFD, i, false};
    const unsigned char next = byte_at(position + i);
    const unsigned char low = i == 1 ? lead.first_low : 0x80;
    const unsigned char high = i == 1 ? lead.first_high : 0xBF;
    if (next < low || next > high) return {0xFFFD, i, false};
    value = (value << 6) | (next & 0x3Fu);
  }
  return {value, lead.continuation + 1, true};
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  const auto put_low_bits = [&](int shift) { put(0x80 | ((code_point >> shift) & 0x3F)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put_low_bits(0);
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put_low_bits(6);
    put_low_bits(0);
  } else {
    put(0xF0 | (code_point >> 18));
    put_low_bits(12);
    put_low_bits(6);
    put_low_bits(0);
  }
}

bool is_ascii(std::string_view text) noexcept { return skip_ascii(text, 0) == text.size(); }

bool is_valid_utf8(std::string_view text) noexcept {
  std::size_t position = skip_ascii(text, 0);
  while (position < text.size()) {
    const CodePoint code_point = decode_utf8(text, position);
    if (!code_point.valid) return false;
    position = skip_ascii(text, position + code_point.length);
  }
  return true;
}

std::string replace_invalid_utf8(std::string_view text) {
  if (is_valid_utf8(text)) return std::string(text);
  std::string out;
  out.reserve(text.size() + text.size() / 2);
  for (std::size_t position = 0; position < text.size();) {
    const CodePoint code_point = decode_utf8(text, position);
    append_utf8(out, code_point.value);
    position += code_point.length;
  }
  return out;
}

bool is_whitespace(char32_t c) noexcept {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_numeric(char32_t code_point) noexcept {
  if (code_point < 0x80) return code_point >= '0' && code_point <= '9';
  return is_in(unicode_tables::numeric_ranges(), code_point);
}

bool is_control(char32_t c) noexcept {
  if (c < 0x7F) return c < 0x20 && c != '\t' && c != '\n' && c != '\r';
  return is_in(unicode_tables::control_ranges(), c);
}

bool is_accent(char32_t c) noexcept {
  return c >= 0x300 && is_in(unicode_tables::accent_ranges(), c);
}

bool is_punctuation(char32_t c) noexcept {
  if (c < 0x80)
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
  return is_in(unicode_tables::punctuation_ranges(), c);
}

bool is_chinese(char32_t c) noexcept {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) ||
         (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B81F) ||
         (c >= 0x2B920 && c <= 0x2CEAF) || (c >= 0xF900 && c <= 0xFAFF) ||
         (c >= 0x2F800 && c <= 0x2FA1F);
}

void append_lowercase(std::string& out, char32_t c) {
  if (c < 0x80) return out.push_back(static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c));
  if (c == 0x130) return void(out += "i\xCC\x87");  // the only one that becomes two
  if (const auto* range = range_of(unicode_tables::lowercase_ranges(), c))
    if ((c - range->first) % range->step == 0) c += static_cast<char32_t>(range->delta);
  append_utf8(out, c);
}

char32_t unicode_of_byte(unsigned char byte) noexcept { return kByteTable.unicode[byte]; }

int byte_of_unicode(char32_t code_point) noexcept {
  return code_point < kByteTable.byte.size() ? kByteTable.byte[code_point] : -1;
}

}  // namespace cleave
