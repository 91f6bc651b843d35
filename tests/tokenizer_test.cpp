#include "cleave/tokenizer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "cleave/checkpoint.h"
#include "cleave/error.h"
#include "support/paths.h"

// Golden ids and texts were written by scripts/golden/make_tokenizer_golden.py (HuggingFace
// tokenizers 0.23.3). If they move, find out which stage moved before updating them.

namespace cleave {
namespace {

using nlohmann::json;
using testing::demo_llama_dir;
using testing::minilm_dir;
using testing::shared_dir;
using testing::smollm2_gguf;
using testing::source_dir;
using testing::tinystories_dir;

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

json golden(const std::string& name) {
  return json::parse(
      read_file(source_dir() / "tests" / "golden" / fmt::format("tokenizer_{}.json", name)));
}

std::string base64_decode(const std::string& text) {
  const std::string alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  unsigned bits = 0, count = 0;
  for (const char c : text) {
    if (c == '=') break;
    bits = bits << 6 | static_cast<unsigned>(alphabet.find(c));
    count += 6;
    if (count >= 8) bytes.push_back(static_cast<char>(bits >> (count -= 8)));
  }
  return bytes;
}

std::string fnv1a(const std::vector<std::int32_t>& ids) {
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (const std::int32_t id : ids)
    for (int shift = 0; shift < 32; shift += 8)
      hash = (hash ^ (static_cast<std::uint32_t>(id) >> shift & 0xFF)) * 0x100000001B3u;
  return fmt::format("{:016x}", hash);
}

/// Ids with and without special tokens, and what they decode to.
void expect_golden_string(const Tokenizer& tokenizer, const std::string& text, const json& want) {
  SCOPED_TRACE(json(text).dump(-1, ' ', true, json::error_handler_t::replace));
  const auto plain = want["ids"].get<std::vector<std::int32_t>>();
  const auto special = want.contains("ids_with_special")
                           ? want["ids_with_special"].get<std::vector<std::int32_t>>()
                           : plain;
  EXPECT_EQ(tokenizer.encode(text, false), plain);
  EXPECT_EQ(tokenizer.encode(text, true), special);
  const auto decoded = want["decoded"].get<std::string>();
  EXPECT_EQ(tokenizer.decode(special, false), decoded);
  EXPECT_EQ(tokenizer.decode(special, true), want.value("decoded_without_special", decoded));
}

/// Adversarial strings.
void expect_golden_strings(const Tokenizer& tokenizer, const std::string& name) {
  const json strings = golden("strings")["strings"], expected = golden(name)["strings"];
  ASSERT_EQ(strings.size(), expected.size());
  ASSERT_GT(strings.size(), 100u);
  for (std::size_t i = 0; i < strings.size(); ++i) {
    SCOPED_TRACE(fmt::format("string {}", i));
    expect_golden_string(tokenizer, base64_decode(strings[i].get<std::string>()), expected[i]);
  }
}

/// Whole files, compared by count, hash and the first ids.
void expect_golden_texts(const Tokenizer& tokenizer, const std::string& name) {
  CLEAVE_SKIP_WITHOUT(shared_dir() / "text");
  const json expected = golden(name)["texts"];
  ASSERT_FALSE(expected.empty());
  for (const json& want : expected) {
    const auto path = shared_dir() / "text" / want["file"].get<std::string>();
    ASSERT_TRUE(std::filesystem::exists(path)) << path;
    SCOPED_TRACE(path.filename().string());
    auto ids = tokenizer.encode(read_file(path));
    EXPECT_EQ(ids.size(), want["count"].get<std::size_t>());
    EXPECT_EQ(fnv1a(ids), want["fnv1a"].get<std::string>());
    const auto first = want["first"].get<std::vector<std::int32_t>>();
    ids.resize(std::min(ids.size(), first.size()));
    EXPECT_EQ(ids, first);
  }
}

TEST(TokenizerGolden, DemoLlamaStrings) {
  expect_golden_strings(Tokenizer::from_file(demo_llama_dir() / "tokenizer.json"), "demo");
}

TEST(TokenizerGolden, DemoLlamaTexts) {
  expect_golden_texts(Tokenizer::from_file(demo_llama_dir() / "tokenizer.json"), "demo");
}

TEST(TokenizerGolden, TinyStoriesStrings) {
  CLEAVE_SKIP_WITHOUT(tinystories_dir());
  expect_golden_strings(Tokenizer::from_file(tinystories_dir() / "tokenizer.json"), "tinystories");
}

TEST(TokenizerGolden, TinyStoriesTexts) {
  CLEAVE_SKIP_WITHOUT(tinystories_dir());
  expect_golden_texts(Tokenizer::from_file(tinystories_dir() / "tokenizer.json"), "tinystories");
}

/// The tokenizer that a golden file holds, on that file's own strings.
Tokenizer expect_golden_own(const std::string& name) {
  const json file = golden(name);
  Tokenizer tokenizer = Tokenizer::from_json(file["tokenizer"][0].dump(), name);
  EXPECT_GT(file["own"].size(), 50u);
  for (const json& want : file["own"])
    expect_golden_string(tokenizer, want["text"].get<std::string>(), want);
  return tokenizer;
}

TEST(TokenizerGolden, UncasedWordPiece) {
  expect_golden_strings(expect_golden_own("uncased"), "uncased");
}

TEST(TokenizerGolden, CasedWordPiece) { expect_golden_own("cased"); }

TEST(LargeTokenizerGolden, MiniLmTexts) {
  CLEAVE_SKIP_WITHOUT(minilm_dir());
  expect_golden_texts(Tokenizer::from_file(minilm_dir() / "tokenizer.json"), "minilm");
}

TEST(LargeTokenizerGolden, SmolLm2Strings) {
  CLEAVE_SKIP_WITHOUT(smollm2_gguf());
  expect_golden_strings(Tokenizer::from_checkpoint(Checkpoint::open(smollm2_gguf())), "smollm2");
}

TEST(LargeTokenizerGolden, SmolLm2Texts) {
  CLEAVE_SKIP_WITHOUT(smollm2_gguf());
  expect_golden_texts(Tokenizer::from_checkpoint(Checkpoint::open(smollm2_gguf())), "smollm2");
}

/// A byte-pair model of a few letters, for single properties.
json small_tokenizer() {
  return json::parse(R"({
    "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
    "post_processor": null, "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "unk_token": null,
      "vocab": {"a": 0, "b": 1, "c": 2, " ": 3, "ab": 4, "aa": 5, "aaaa": 6, "?": 7},
      "merges": ["a b", ["a", "a"], "aa aa"]}})");
}

Tokenizer make(const json& description) {
  return Tokenizer::from_json(description.dump(), "small.json");
}

using Ids = std::vector<std::int32_t>;

TEST(Tokenizer, MergesByRankThenFromTheLeft) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_EQ(tokenizer.encode("aab"), (Ids{0, 4}));  // "a b" ranks before "a a"
  EXPECT_EQ(tokenizer.encode("aaa"), (Ids{5, 0}));  // leftmost of two equals
  EXPECT_EQ(tokenizer.encode("aaaaa"), (Ids{6, 0}));
  EXPECT_EQ(tokenizer.encode("axb"), (Ids{4}));  // without unk, the unknown vanishes
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.vocab_size(), 8);
  EXPECT_EQ(tokenizer.token_to_id("aaaa"), 6);
  EXPECT_EQ(tokenizer.token_to_id("aaa"), -1);
}

TEST(Tokenizer, LongWordsGiveWhatTheirPartsGive) {
  const Tokenizer tokenizer = make(small_tokenizer());
  // "c" joins nothing, so the long word may be cut at it; ids are those of its parts.
  std::string text;
  Ids expected;
  for (int i = 0; i < 500; ++i) {
    text += std::string(i % 7, 'a') + (i % 3 == 0 ? "b" : "") + "c";
    const Ids part = tokenizer.encode(std::string(i % 7, 'a') + (i % 3 == 0 ? "b" : ""));
    expected.insert(expected.end(), part.begin(), part.end());
    expected.push_back(2);
  }
  EXPECT_EQ(tokenizer.encode(text), expected);
}

TEST(Tokenizer, RunOfEqualCharactersIsNotQuadratic) {
  const Tokenizer tokenizer = make(small_tokenizer());
  const auto seconds = [&](std::size_t count) {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(tokenizer.encode(std::string(count, 'a')), Ids(count / 4, 6));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  // A quadratic search would take 10^12 steps, hours; n log n takes a fraction of a second.
  EXPECT_LT(seconds(1'000'000), 20.0);
}

TEST(Tokenizer, FusesUnknownCharactersOnlyIfAsked) {
  json description = small_tokenizer();
  description["model"]["unk_token"] = "?";
  EXPECT_EQ(make(description).encode("axyb"), (Ids{0, 7, 7, 1}));
  description["model"]["fuse_unk"] = true;
  EXPECT_EQ(make(description).encode("axyb"), (Ids{0, 7, 1}));
}

TEST(Tokenizer, IgnoreMergesTakesAWholeWordFromTheVocabulary) {
  json description = small_tokenizer();
  description["model"]["merges"] = json::array();
  EXPECT_EQ(make(description).encode("aaaa"), (Ids{0, 0, 0, 0}));
  description["model"]["ignore_merges"] = true;
  EXPECT_EQ(make(description).encode("aaaa"), (Ids{6}));
}

json added(const char* content, const json& options = json::object()) {
  json token = {{"id", 0},         {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", true}};
  token.update(options);
  return token;
}

TEST(Tokenizer, AddedTokensTakeTheLongestMatchAndStripAsAsked) {
  json description = small_tokenizer();
  description["added_tokens"] = {added("<x>"), added("<x>y"), added("<l>", {{"lstrip", true}}),
                                 added("<r>", {{"rstrip", true}}),
                                 added("word", {{"single_word", true}})};
  const Tokenizer tokenizer = make(description);  // ids 8, 9, 10, 11, 12
  EXPECT_EQ(tokenizer.encode("a<x>b<x>yb"), (Ids{0, 8, 1, 9, 1}));
  EXPECT_EQ(tokenizer.encode("a  <l> b"), (Ids{0, 10, 3, 1}));
  EXPECT_EQ(tokenizer.encode("a <r>\t\n b"), (Ids{0, 3, 11, 1}));
  EXPECT_EQ(tokenizer.encode("word a"), (Ids{12, 3, 0}));
  EXPECT_EQ(tokenizer.encode("worda"), (Ids{0}));
  EXPECT_EQ(tokenizer.decode(Ids{0, 8, 1}, true), "ab");
  EXPECT_EQ(tokenizer.decode(Ids{0, 8, 1}, false), "a<x>b");
}

TEST(Tokenizer, ConcurrentEncodingGivesTheSameIds) {
  const Tokenizer tokenizer = Tokenizer::from_file(demo_llama_dir() / "tokenizer.json");
  const std::string text =
      "Once upon a time, 12 cats\tand 3 dogs met. <|endoftext|> \xF0\x9F\x98\x80\n";
  const Ids expected = tokenizer.encode(text);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int& count : wrong)
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) count += tokenizer.encode(text) != expected;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

/// The message of the FileError that reading gives.
std::string error_of(const std::string& text) {
  try {
    Tokenizer::from_json(text, "bad.json");
  } catch (const FileError& error) {
    return error.what();
  }
  return "no error";
}

TEST(TokenizerErrors, NameTheOriginAndTheUnknownComponent) {
  for (const char* part : {"normalizer", "pre_tokenizer", "post_processor", "decoder", "model"}) {
    json description = small_tokenizer();
    description[part] = {{"type", "Flux"}};
    const std::string message = error_of(description.dump());
    EXPECT_NE(message.find("bad.json"), std::string::npos) << message;
    EXPECT_NE(message.find("\"Flux\""), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

TEST(TokenizerErrors, RefuseMalformedFiles) {
  EXPECT_NE(error_of("{\"model\": ").find("no valid JSON"), std::string::npos);
  EXPECT_NE(error_of("[]").find("model"), std::string::npos);
  EXPECT_NE(error_of("{}").find("model"), std::string::npos);
  json description = small_tokenizer();
  description["model"]["merges"].push_back("a z");
  EXPECT_NE(error_of(description.dump()).find("\"z\""), std::string::npos);
  description = small_tokenizer();
  description["model"]["merges"].push_back("b a");  // "ba" is no token
  EXPECT_NE(error_of(description.dump()).find("\"ba\""), std::string::npos);
  description = small_tokenizer();
  description["model"]["vocab"]["z"] = -1;
  EXPECT_NE(error_of(description.dump()).find("\"z\""), std::string::npos);
  description = small_tokenizer();
  description["model"]["vocab"] = 3;
  EXPECT_NE(error_of(description.dump()).find("model.vocab"), std::string::npos);
  description = small_tokenizer();
  description["pre_tokenizer"] = {{"type", "Split"},
                                  {"pattern", {{"Regex", "(a"}}},
                                  {"behavior", "Isolated"},
                                  {"invert", false}};
  EXPECT_NE(error_of(description.dump()).find("pre_tokenizer.pattern"), std::string::npos);
  EXPECT_THROW(Tokenizer::from_file("/nonexistent/tokenizer.json"), FileError);
}

TEST(TokenizerErrors, RefuseIdsOutsideTheVocabulary) {
  const Tokenizer tokenizer = make(small_tokenizer());
  EXPECT_THROW(tokenizer.decode(Ids{8}), InvalidArgument);
  EXPECT_THROW(tokenizer.decode(Ids{-1}), InvalidArgument);
}

}  // namespace
}  // namespace cleave
