#include "unicode.h"

#include <gtest/gtest.h>

#include "nfc.h"

namespace cleave {
namespace {

// Expected values: Unicode 15, table 3-8 and section 3.9; UAX #15; GPT-2's encoder.py.

TEST(Utf8, RoundTripsEveryKindOfLength) {
  for (const char32_t c :
       {0x0u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xD7FFu, 0xE000u, 0xFFFFu, 0x10000u, 0x10FFFFu}) {
    std::string text;
    append_utf8(text, c);
    const CodePoint read = decode_utf8(text, 0);
    EXPECT_TRUE(read.valid);
    EXPECT_EQ(read.value, c);
    EXPECT_EQ(read.length, text.size());
  }
}

TEST(Utf8, ReplacesEachMaximalSubpartOnce) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(replace_invalid_utf8("plain \xC3\xA9"), "plain \xC3\xA9");
  EXPECT_EQ(replace_invalid_utf8("a\xF1\x80\x80\xE1\x80\xC2"
                                 "b\x80"
                                 "c\x80\xBF"
                                 "d"),
            "a" + r + r + r + "b" + r + "c" + r + r + "d");
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), r + r + r);  // a surrogate
  EXPECT_EQ(replace_invalid_utf8("\xF0\x9F\x98"), r);          // cut off at the end
  EXPECT_EQ(replace_invalid_utf8("\xC0\xAF"), r + r);          // overlong
}

TEST(ByteTable, IsABijection) {
  EXPECT_EQ(unicode_of_byte('A'), U'A');
  EXPECT_EQ(unicode_of_byte(' '), U'\u0120');
  EXPECT_EQ(unicode_of_byte('\n'), U'\u010A');
  for (int byte = 0; byte < 256; ++byte)
    EXPECT_EQ(byte_of_unicode(unicode_of_byte(static_cast<unsigned char>(byte))), byte);
  EXPECT_EQ(byte_of_unicode(U' '), -1);
  EXPECT_EQ(byte_of_unicode(0x1F600), -1);
}

TEST(UnicodeClasses, KnowNumbersAndSpace) {
  for (const char32_t c : {U'0', U'9', U'\u00B2', U'\u0665', U'\u2167', U'\u3007',
                           char32_t{0x1D7D8}, char32_t{0x11DE0}})
    EXPECT_TRUE(is_numeric(c)) << static_cast<unsigned>(c);
  for (const char32_t c : {U'a', U'\u4E00', U'/', U':', char32_t{0x10FFFF}})
    EXPECT_FALSE(is_numeric(c)) << static_cast<unsigned>(c);
  EXPECT_TRUE(is_whitespace(0x85) && is_whitespace(0x3000) && is_whitespace('\t'));
  EXPECT_FALSE(is_whitespace(0x180E) || is_whitespace(0x200B) || is_whitespace(0xFEFF));
}

// Expected values: HuggingFace tokenizers 0.23, whose categories are those of Unicode 8.
TEST(UnicodeClasses, AreBerts) {
  EXPECT_TRUE(is_control(0) && is_control(0x7F) && is_control(0xAD) && is_control(0xFFFD));
  EXPECT_TRUE(is_control(0xE000) && is_control(0x10FFFD));  // private use
  EXPECT_FALSE(is_control('\t') || is_control('\n') || is_control('\r') || is_control(' '));
  EXPECT_FALSE(is_control(0x378) || is_control(0x8E2));  // unassigned; assigned later
  EXPECT_TRUE(is_accent(0x301) && is_accent(0x5B0) && is_accent(0x1734));
  EXPECT_FALSE(is_accent(0x302F) || is_accent(0x903) || is_accent(0x1885) || is_accent('a'));
  for (const char32_t c : {U'!', U'/', U':', U'`', U'$', U'+', U'^', U'~', U'\u00AB', U'\u3001'})
    EXPECT_TRUE(is_punctuation(c)) << static_cast<unsigned>(c);
  for (const char32_t c : {U'0', U'a', U'Z', U' ', U'\u20AC', U'\u00B1', char32_t{0x2E52}})
    EXPECT_FALSE(is_punctuation(c)) << static_cast<unsigned>(c);
  EXPECT_TRUE(is_chinese(0x4E00) && is_chinese(0x9FFF) && is_chinese(0x2CEAF));
  EXPECT_FALSE(is_chinese(0x3042) || is_chinese(0xAC00) || is_chinese(0x2B820));
}

std::string lowercase(char32_t code_point) {
  std::string out;
  append_lowercase(out, code_point);
  return out;
}

TEST(UnicodeClasses, LowerCaseIsThatOfACodePointAlone) {
  EXPECT_EQ(lowercase('A') + lowercase('z') + lowercase('['), "az[");
  EXPECT_EQ(lowercase(0x100) + lowercase(0x101), "\u0101\u0101");  // every second one changes
  EXPECT_EQ(lowercase(0x3A3), "\u03C3");                           // at the end of a word as well
  EXPECT_EQ(lowercase(0x130), "i\u0307");
  EXPECT_EQ(lowercase(0x1E9E), "\u00DF");
  EXPECT_EQ(lowercase(0x1E900), "\U0001E922");
  EXPECT_EQ(lowercase(0x10FFFF), "\U0010FFFF");
}

TEST(Nfd, DecomposesAndReorders) {
  EXPECT_EQ(normalize_nfd(""), "");
  EXPECT_EQ(normalize_nfd("caf\u00E9"), "cafe\u0301");
  EXPECT_EQ(normalize_nfd("\u212B"), "A\u030A");
  EXPECT_EQ(normalize_nfd("\u1E69"), "s\u0323\u0307");
  EXPECT_EQ(normalize_nfd("q\u0307\u0323e\u0301"), "q\u0323\u0307e\u0301");
  EXPECT_EQ(normalize_nfd("\u0307\u0323"), "\u0323\u0307");  // no letter before them
  EXPECT_EQ(normalize_nfd("\uD55C"), "\u1112\u1161\u11AB");
}

// Marks that the library does not know stay where they are, and nothing composes with them.
TEST(Nfc, KnowsWhatHuggingFaceKnows) {
  EXPECT_EQ(normalize_nfd("a\u0301\u07FD"), "a\u0301\u07FD");
  EXPECT_EQ(normalize_nfc("\U00011935\U00011930"), "\U00011935\U00011930");
}

TEST(Nfc, ComposesReordersAndHonoursExclusions) {
  EXPECT_EQ(normalize_nfc("plain caf\u00E9"), "plain caf\u00E9");
  EXPECT_EQ(normalize_nfc("e\u0301"), "\u00E9");
  EXPECT_EQ(normalize_nfc("\u212B"), "\u00C5");                // singleton
  EXPECT_EQ(normalize_nfc("q\u0307\u0323"), "q\u0323\u0307");  // canonical order
  EXPECT_EQ(normalize_nfc("s\u0307\u0323"), "\u1E69");
  EXPECT_EQ(normalize_nfc("a\u0305\u0301"), "a\u0305\u0301");  // same class: blocked
  EXPECT_EQ(normalize_nfc("\u0958"), "\u0915\u093C");          // composition exclusion
  EXPECT_EQ(normalize_nfc("\u1112\u1161\u11AB"), "\uD55C");    // Hangul
  EXPECT_EQ(normalize_nfc("\uD558\u11AB"), "\uD55C");
  EXPECT_EQ(normalize_nfc("\u0301a"), "\u0301a");
}

}  // namespace
}  // namespace cleave
