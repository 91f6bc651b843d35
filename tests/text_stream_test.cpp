#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "cleave/tokenizer.h"
#include "support/paths.h"

namespace cleave {
namespace {

using nlohmann::json;
using testing::demo_llama_dir;
using Ids = std::vector<std::int32_t>;

/// As Llama 2 has it: a space is U+2581, unknown characters are bytes, and the decoder takes the
/// first space of all away.
Tokenizer metaspace_tokenizer() {
  json vocab = {{"\u2581", 0}, {"a", 1}, {"\u2581a", 2}, {"b", 3}, {"</s>", 4}};
  for (int byte = 0; byte < 256; ++byte) {
    constexpr char kHex[] = "0123456789ABCDEF";
    vocab[std::string("<0x") + kHex[byte / 16] + kHex[byte % 16] + ">"] = 5 + byte;
  }
  json description = json::parse(R"({
    "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null,
    "added_tokens": [{"id": 4, "content": "</s>", "special": true}],
    "decoder": {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
      {"type": "ByteFallback"}, {"type": "Fuse"},
      {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "byte_fallback": true, "merges": [["\u2581", "a"]]}})");
  description["model"]["vocab"] = vocab;
  return Tokenizer::from_json(description.dump(), "metaspace.json");
}
constexpr std::int32_t kByte = 5;  // the id of <0x00>

/// What ids [split, end) add to the text of those before, pushed one by one.
std::vector<std::string> pieces_of(const Tokenizer& tokenizer, const Ids& ids, std::size_t split) {
  TextStream stream(tokenizer, std::span(ids).first(split));
  std::vector<std::string> pieces;
  for (std::size_t i = split; i < ids.size(); ++i) pieces.push_back(stream.push(ids[i]));
  pieces.push_back(stream.flush());
  return pieces;
}

std::string joined(const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  return text;
}

constexpr std::string_view kReplacement = "\uFFFD";

/// The text of whole characters in ids [0, split). Where the last is incomplete, either the ids
/// before it tell, or all of them without the U+FFFD: whichever is more.
std::string text_before(const Tokenizer& tokenizer, std::span<const std::int32_t> ids) {
  std::string cut = tokenizer.decode(ids);
  while (cut.ends_with(kReplacement)) cut.resize(cut.size() - kReplacement.size());
  while (tokenizer.decode(ids).ends_with(kReplacement)) ids = ids.first(ids.size() - 1);
  return std::max(cut, tokenizer.decode(ids),
                  [](const auto& a, const auto& b) { return a.size() < b.size(); });
}

/// For every split of the ids, inside a character as well.
void expect_the_whole_text(const Tokenizer& tokenizer, const Ids& ids) {
  const std::string whole = tokenizer.decode(ids);
  for (std::size_t split = 0; split <= ids.size(); ++split) {
    const std::string prompt = text_before(tokenizer, std::span(ids).first(split));
    const auto pieces = pieces_of(tokenizer, ids, split);
    EXPECT_EQ(prompt + joined(pieces), whole) << "split " << split;
    for (const std::string& piece : pieces)
      EXPECT_EQ(piece.find(kReplacement), std::string::npos) << "split " << split;
  }
}

constexpr const char* kText = " a b \u4F60\u597D a\U0001F600\U0001F600b  a\u00E9 aab";

TEST(TextStream, GivesTheWholeTextOfBytes) {
  const auto tokenizer = Tokenizer::from_file(demo_llama_dir() / "tokenizer.json");
  expect_the_whole_text(tokenizer, tokenizer.encode(kText));
}

TEST(TextStream, GivesTheWholeTextWhereADecoderStripsASpace) {
  const Tokenizer tokenizer = metaspace_tokenizer();
  Ids ids{2, 0, 3, 2, 1};
  for (const unsigned char byte : std::string("\u4F60\u597D\U0001F600"))
    ids.push_back(kByte + byte);
  for (const std::int32_t id : {2, 2, 4, 0, 3, 2, 4, 4, 2}) ids.push_back(id);
  for (const unsigned char byte : std::string("\u00E9")) ids.push_back(kByte + byte);
  expect_the_whole_text(tokenizer, ids);
  EXPECT_EQ(pieces_of(tokenizer, {2, 2, 4, 2, 3}, 1),
            (std::vector<std::string>{" a", "", " a", "b", ""}));
}

TEST(TextStream, HoldsACharacterBackUntilItIsComplete) {
  const Tokenizer tokenizer = metaspace_tokenizer();
  EXPECT_EQ(pieces_of(tokenizer, {1, kByte + 0xE4, kByte + 0xBD, kByte + 0xA0, 1}, 1),
            (std::vector<std::string>{"", "", "\u4F60", "a", ""}));
  EXPECT_EQ(pieces_of(tokenizer, {1, kByte + 0xE4, kByte + 0xBD}, 1),
            (std::vector<std::string>{"", "", "\uFFFD\uFFFD"}));
  EXPECT_EQ(pieces_of(tokenizer, {1, kByte + 0xE4, 3}, 1),
            (std::vector<std::string>{"", "\uFFFDb", ""}));
}

TEST(TextStream, CompletesACharacterThatThePromptBegins) {
  const Tokenizer tokenizer = metaspace_tokenizer();
  EXPECT_EQ(pieces_of(tokenizer, {1, kByte + 0xE4, kByte + 0xBD, kByte + 0xA0, 2}, 2),
            (std::vector<std::string>{"", "\u4F60", " a", ""}));
  EXPECT_EQ(pieces_of(tokenizer, {1, kByte + 0xE4, 4, 3}, 3),
            (std::vector<std::string>{"\uFFFDb", ""}));
}

/// Bytes that are no character: the whole text, and something of it every few ids.
void expect_invalid_bytes_shown(const Tokenizer& tokenizer, std::int32_t invalid,
                                std::int32_t letter) {
  for (const std::size_t prompt : {0, 1, 2, 5, 100}) {
    Ids ids(prompt + 5'000, invalid);
    ids[0] = ids.back() = letter;
    const auto pieces = pieces_of(tokenizer, ids, prompt);
    const std::string before = tokenizer.decode(std::span(ids).first(prompt));
    const std::string text = joined(pieces), whole = tokenizer.decode(ids);
    EXPECT_TRUE(whole.ends_with(text)) << "prompt " << prompt;
    EXPECT_LE(before.size() + text.size() - whole.size(), 3 * kReplacement.size());
    std::size_t silent = 0;
    for (const std::string& piece : pieces) {
      silent = piece.empty() ? silent + 1 : 0;
      ASSERT_LE(silent, 8u) << "prompt " << prompt;
    }
  }
}

TEST(TextStream, ShowsBytesThatAreNoCharacter) {
  expect_invalid_bytes_shown(metaspace_tokenizer(), kByte + 0xFF, 1);
  const auto tokenizer = Tokenizer::from_file(demo_llama_dir() / "tokenizer.json");
  const std::int32_t invalid = tokenizer.token_to_id("\u00FF");  // byte 0xFF's spelling
  ASSERT_GE(invalid, 0);
  expect_invalid_bytes_shown(tokenizer, invalid, tokenizer.token_to_id("a"));
  Ids ids(8, invalid);  // a character that begins with the ninth, when they are shown
  for (const char* byte : {"\u00E4", "\u00BD", "\u0142"})
    ids.push_back(tokenizer.token_to_id(byte));
  EXPECT_EQ(joined(pieces_of(tokenizer, ids, 0)), tokenizer.decode(ids));
}

// Were they kept, this would decode 10^10 ids.
TEST(TextStream, DropsTokensWithoutText) {
  const Tokenizer tokenizer = metaspace_tokenizer();
  Ids ids(200'000, 4);
  ids[0] = 2;
  ids[150'000] = kByte + 0xC3;
  ids[160'000] = kByte + 0xA9;
  ids.back() = 2;
  const auto pieces = pieces_of(tokenizer, ids, 50'000);
  EXPECT_EQ(joined(pieces), "\u00E9 a");
  EXPECT_EQ(pieces[110'000], "\u00E9");
}

// Decoding all ids at every token would be 2 * 10^10 of them, an hour.
TEST(TextStream, CostsAsMuchPerTokenHoweverManyThereWere) {
  const Tokenizer tokenizer = metaspace_tokenizer();
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(joined(pieces_of(tokenizer, Ids(200'000, 1), 100'000)), std::string(100'000, 'a'));
  const auto elapsed = std::chrono::steady_clock::now() - start;
  EXPECT_LT(std::chrono::duration<double>(elapsed).count(), 20.0);
}

}  // namespace
}  // namespace cleave
