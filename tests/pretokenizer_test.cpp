#include "pretokenizer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "cleave/error.h"
#include "json_node.h"
#include "pattern.h"
#include "token_decoder.h"

namespace cleave {
namespace {

using nlohmann::json;
using Texts = std::vector<std::string>;

Texts split(const json& description, const std::string& text, bool starts_input = true) {
  const std::string origin = "test";
  const PieceList list =
      PreTokenizer::from_json(JsonNode(description, origin)).apply(text, starts_input);
  Texts pieces;
  for (const auto& piece : list.pieces) pieces.emplace_back(list.view(piece));
  return pieces;
}

json split_at(const json& pattern, const char* behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
}

// The table of behaviours in the documentation of HuggingFace tokenizers.
TEST(PreTokenizer, SplitsWithEachBehavior) {
  const json dash = {{"String", "-"}};
  const std::string text = "the-final--countdown";
  EXPECT_EQ(split(split_at(dash, "Removed"), text), (Texts{"the", "final", "countdown"}));
  EXPECT_EQ(split(split_at(dash, "Isolated"), text),
            (Texts{"the", "-", "final", "-", "-", "countdown"}));
  EXPECT_EQ(split(split_at(dash, "MergedWithPrevious"), text),
            (Texts{"the-", "final-", "-", "countdown"}));
  EXPECT_EQ(split(split_at(dash, "MergedWithNext"), text),
            (Texts{"the", "-final", "-", "-countdown"}));
  EXPECT_EQ(split(split_at(dash, "Contiguous"), text),
            (Texts{"the", "-", "final", "--", "countdown"}));
  EXPECT_EQ(split(split_at({{"Regex", "[a-z]+"}}, "Removed", true), text),
            (Texts{"the", "final", "countdown"}));
  EXPECT_EQ(split(split_at({{"Regex", "x*"}}, "Isolated"), "axxb"), (Texts{"a", "xx", "b"}));
}

TEST(PreTokenizer, DigitsStandAloneOrInRuns) {
  EXPECT_EQ(split({{"type", "Digits"}, {"individual_digits", true}}, "a12\u0663b"),
            (Texts{"a", "1", "2", "\u0663", "b"}));
  EXPECT_EQ(split({{"type", "Digits"}, {"individual_digits", false}}, "a12\u0663b"),
            (Texts{"a", "12\u0663", "b"}));
}

TEST(PreTokenizer, BertSplitsAtSpaceAndIsolatesPunctuation) {
  const std::string text = " it's\u2003a+b,\n\u3001\u00AB c ";
  EXPECT_EQ(split({{"type", "BertPreTokenizer"}}, text),
            (Texts{"it", "'", "s", "a", "+", "b", ",", "\u3001", "\u00AB", "c"}));
  EXPECT_EQ(split({{"type", "WhitespaceSplit"}}, text),
            (Texts{"it's", "a+b,", "\u3001\u00AB", "c"}));
  EXPECT_EQ(split({{"type", "Punctuation"}}, "a,,b"), (Texts{"a", ",", ",", "b"}));
  EXPECT_EQ(split({{"type", "Punctuation"}, {"behavior", "Contiguous"}}, "a,,b"),
            (Texts{"a", ",,", "b"}));
}

TEST(PreTokenizer, ByteLevelSpellsBytes) {
  const auto byte_level = [](bool prefix, bool regex) {
    return json{{"type", "ByteLevel"}, {"add_prefix_space", prefix}, {"use_regex", regex}};
  };
  EXPECT_EQ(split(byte_level(false, true), "Hey you\n"), (Texts{"Hey", "\u0120you", "\u010A"}));
  EXPECT_EQ(split(byte_level(true, true), "Hey you"), (Texts{"\u0120Hey", "\u0120you"}));
  EXPECT_EQ(split(byte_level(true, false), " Hey \u00E9"), (Texts{"\u0120Hey\u0120\u00C3\u00A9"}));
}

TEST(PreTokenizer, MetaspacePrependsByItsScheme) {
  const auto metaspace = [](const char* scheme, bool splits) {
    return json{
        {"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", scheme}, {"split", splits}};
  };
  EXPECT_EQ(split(metaspace("always", true), "a b", false), (Texts{"_a", "_b"}));
  EXPECT_EQ(split(metaspace("first", true), "a b", true), (Texts{"_a", "_b"}));
  EXPECT_EQ(split(metaspace("first", true), "a b", false), (Texts{"a", "_b"}));
  EXPECT_EQ(split(metaspace("never", false), "a  b"), (Texts{"a__b"}));
  EXPECT_EQ(split(metaspace("always", false), " a"), (Texts{"_a"}));
}

TEST(Pattern, MeansWhatOnigurumaMeans) {
  const auto matches = [](const char* expression, const std::string& text) {
    std::vector<Segment> segments;
    Pattern::regex(expression, "test").find(text, segments);
    return segments.size() == 1 && segments[0].is_match;
  };
  EXPECT_TRUE(matches(R"(\s+)", "\u0085\u2003\t"));
  EXPECT_FALSE(matches(R"(\s)", "\u180E"));  // white space to PCRE2
  EXPECT_FALSE(matches(R"([^\S])", "\u180E"));
  EXPECT_TRUE(matches(R"(\p{L})", "\U00031350"));  // a letter since Unicode 15
  EXPECT_TRUE(matches(R"([^\s\p{N}])", "\u180E"));
  EXPECT_FALSE(matches(R"([^\p{N}])", "\U00010D40"));
  EXPECT_TRUE(matches(R"(\w+)", "e\u0301_9"));
  EXPECT_TRUE(matches(R"(\h{,2})", "Af"));
  EXPECT_TRUE(matches(R"(\u0041\x{42}+)", "ABB"));
  for (const char* refused : {R"([a[bc]])", R"([a&&b])", R"(a{2}+)", R"(\bx)", R"((?m)a)", "(a"})
    EXPECT_THROW(Pattern::regex(refused, "test"), FileError) << refused;
}

std::string decode(const json& description, const Texts& tokens) {
  const std::string origin = "test";
  return TokenDecoder::from_json(JsonNode(description, origin)).apply(tokens);
}

TEST(TokenDecoder, JoinsStripsAndFallsBackToBytes) {
  EXPECT_EQ(decode(nullptr, {"a", "b"}), "a b");
  EXPECT_EQ(decode({{"type", "ByteFallback"}}, {"x", "<0xC3>", "<0xA9>", "<0xFF>"}),
            "x\uFFFD\uFFFD\uFFFD");  // one run, not UTF-8 as a whole
  EXPECT_EQ(decode({{"type", "ByteFallback"}}, {"<0xC3>", "<0xA9>", "y", "<0xG1>"}),
            "\u00E9y<0xG1>");
  EXPECT_EQ(decode({{"type", "ByteLevel"}}, {"\u0120a", "\u00C3", "\u00A9", "\u00E2", "<| |>"}),
            " a\u00E9\uFFFD<| |>");
  EXPECT_EQ(decode({{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "always"}},
                   {"_a_", "_b"}),
            "a b");
  EXPECT_EQ(
      decode({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 1}}, {"  a  ", " "}),
      " a ");
}

}  // namespace
}  // namespace cleave
