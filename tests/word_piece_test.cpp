#include "word_piece.h"

#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "cleave/tokenizer.h"

// Whole texts are compared with HuggingFace's ids in tokenizer_test.cpp; here single properties.

namespace cleave {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

json small_bert() {
  return json::parse(R"({
    "version": "1.0", "added_tokens": [],
    "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                   "strip_accents": null, "lowercase": true},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
      "max_input_chars_per_word": 6,
      "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "ab": 4, "##b": 5, "##bc": 6, "##c": 7,
                "##d": 8, "abcd": 9, ".": 10, "é": 11, "##é": 12, "##": 13, "#": 14}}})");
}

Tokenizer read_bert(const json& description) {
  return Tokenizer::from_json(description.dump(), "bert.json");
}

TEST(WordPiece, TakesTheLongestPieceFirst) {
  const Tokenizer tokenizer = read_bert(small_bert());
  EXPECT_EQ(tokenizer.encode("abcd"), (Ids{9}));
  EXPECT_EQ(tokenizer.encode("abc"), (Ids{4, 7}));  // "ab", though "a ##bc" is as good
  EXPECT_EQ(tokenizer.encode("abcdb"), (Ids{9, 5}));
  EXPECT_EQ(tokenizer.encode("ab abc.a"), (Ids{4, 4, 7, 10, 3}));
  EXPECT_EQ(tokenizer.encode("##"), (Ids{14, 14}));  // as text, not as a prefix
  EXPECT_EQ(tokenizer.encode(""), Ids{});
}

TEST(WordPiece, AWordWithARestIsUnknownAsAWhole) {
  const Tokenizer tokenizer = read_bert(small_bert());
  EXPECT_EQ(tokenizer.encode("abx a"), (Ids{0, 3}));
  EXPECT_EQ(tokenizer.encode("ba"), (Ids{0}));  // "b" begins no word
  EXPECT_EQ(tokenizer.encode("abbbbb"), (Ids{4, 5, 5, 5, 5}));
  EXPECT_EQ(tokenizer.encode("abbbbbb"), (Ids{0}));  // seven characters
}

TEST(WordPiece, CountsCharactersNotBytes) {
  json description = small_bert();
  description["normalizer"]["strip_accents"] = false;
  const Tokenizer tokenizer = read_bert(description);
  EXPECT_EQ(tokenizer.encode("\u00C9\u00E9\u00E9\u00E9\u00E9\u00E9"),
            (Ids{11, 12, 12, 12, 12, 12}));
  EXPECT_EQ(tokenizer.encode("a\u00E8"), (Ids{0}));  // not cut inside a character
}

TEST(WordPiece, WithoutAPrefixAllTokensContinue) {
  json description = small_bert();
  description["model"]["continuing_subword_prefix"] = "";
  EXPECT_EQ(read_bert(description).encode("abaa"), (Ids{4, 3, 3}));
}

TEST(WordPiece, NormalizersOfBertStandAloneAndInASequence) {
  json description = small_bert();
  description["model"]["vocab"]["##\u0301"] = 15;
  description["model"]["vocab"]["A"] = 16;
  const json nfd = {{"type", "NFD"}}, lowercase = {{"type", "Lowercase"}};
  description["normalizer"] = {{"type", "Sequence"}, {"normalizers", {nfd, lowercase}}};
  EXPECT_EQ(read_bert(description).encode("\u00C1 AB"), (Ids{3, 15, 4}));
  description["normalizer"] = nfd;
  EXPECT_EQ(read_bert(description).encode("\u00C1"), (Ids{16, 15}));
  description["normalizer"] = {{"type", "Sequence"},
                               {"normalizers", {{{"type", "BertNormalizer"}}}}};
  EXPECT_EQ(read_bert(description).encode("\u00C1 AB"), (Ids{3, 4}));
}

// Files of the first versions do not say which model they hold.
TEST(WordPiece, IsKnownWithoutItsType) {
  json description = small_bert();
  description["model"].erase("type");
  EXPECT_EQ(read_bert(description).encode("abc"), (Ids{4, 7}));
}

TEST(WordPiece, ALongWordIsNotSlow) {
  json description = small_bert();
  description["model"]["max_input_chars_per_word"] = 1 << 30;
  const std::size_t count = 3'000'000;  // a search over all ends would take 10^13 steps
  EXPECT_EQ(read_bert(description).encode("a" + std::string(count, 'b')).size(), count);
}

TEST(WordPiece, ALongTokenDoesNotMakeAWordSlow) {
  json description = small_bert();
  description["model"]["max_input_chars_per_word"] = 1 << 30;
  description["model"]["vocab"]["##" + std::string(10'000, 'b') + "c"] = 15;
  const Tokenizer tokenizer = read_bert(description);
  const auto begin = std::chrono::steady_clock::now();
  const std::size_t count = 50'000;  // 10^12 bytes to look at if each length up to it were tried
  EXPECT_EQ(tokenizer.encode("a" + std::string(count, 'b')).size(), count);
  EXPECT_EQ(tokenizer.encode("ab" + std::string(10'000, 'b') + "c"), (Ids{4, 15}));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::minutes(1));
}

TEST(WordPiece, SpecialTokensStandAroundAText) {
  const Tokenizer tokenizer = read_bert(small_bert());
  EXPECT_EQ(tokenizer.encode("a", true), (Ids{1, 3, 2}));
  EXPECT_EQ(Ids(tokenizer.special_before().begin(), tokenizer.special_before().end()), (Ids{1}));
  EXPECT_EQ(Ids(tokenizer.special_after().begin(), tokenizer.special_after().end()), (Ids{2}));
}

TEST(WordPiece, DecoderJoinsPiecesAndCleansEachTokenUp) {
  json description = small_bert();
  EXPECT_EQ(read_bert(description).decode(Ids{4, 7, 3, 10, 13, 3}), "abc a. a");
  description["decoder"]["cleanup"] = false;
  EXPECT_EQ(read_bert(description).decode(Ids{4, 7, 3, 10, 3}), "abc a . a");
  EXPECT_EQ(read_bert(description).decode(Ids{7, 3}), "##c a");  // the first stays as it is
}

/// The message of the FileError that reading gives after `path` of the file is set to `value`.
std::string error_with(const char* path, const json& value) {
  json description = small_bert();
  description[json::json_pointer(path)] = value;
  try {
    read_bert(description);
  } catch (const FileError& error) {
    return error.what();
  }
  return "no error";
}

void expect_in(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
  EXPECT_EQ(message.find("bert.json: "), 0u) << message;
}

TEST(WordPieceErrors, RefuseMalformedFiles) {
  expect_in(error_with("/model/unk_token", "[NONE]"), "\"[NONE]\" is not in the vocabulary");
  expect_in(error_with("/model/unk_token", nullptr), "model.unk_token");
  expect_in(error_with("/model/unk_token", 0), "model.unk_token: expected a string");
  expect_in(error_with("/model/continuing_subword_prefix", 7), "expected a string");
  expect_in(error_with("/model/max_input_chars_per_word", -1), "is -1; expected 0 or more");
  expect_in(error_with("/model/max_input_chars_per_word", "6"), "expected an integer");
  expect_in(error_with("/model/vocab", json::array({"a"})), "model.vocab");
  expect_in(error_with("/model/vocab/a", -1), "\"a\" is -1");
  expect_in(error_with("/model/vocab/a", 1LL << 40), "\"a\" is 1099511627776");
  expect_in(error_with("/model/vocab/a", "3"), "\"a\" is \"3\"");
  expect_in(error_with("/normalizer/lowercase", 1), "normalizer.lowercase");
  expect_in(error_with("/normalizer/strip_accents", "yes"), "normalizer.strip_accents");
  expect_in(error_with("/decoder/cleanup", 1), "decoder.cleanup");
  expect_in(error_with("/decoder/prefix", 1), "decoder.prefix");
}

TEST(WordPieceErrors, RefuseWrongSpecialTokens) {
  expect_in(error_with("/post_processor/sep", json::array({"[SEP]", 15})), "15 is outside");
  expect_in(error_with("/post_processor/cls", json::array({"[CLS]", -1})), "is -1");
  expect_in(error_with("/post_processor/cls", json::array({"[CLS]", (1LL << 32) + 1})),
            "is 4294967297");
  expect_in(error_with("/post_processor/cls", json::array({"[CLS]"})), "post_processor.cls");
  expect_in(error_with("/post_processor/cls", json::array({1, 1})), "expected a string");
  expect_in(error_with("/post_processor/sep", nullptr), "post_processor.sep");
}

}  // namespace
}  // namespace cleave
