#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
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

/// For every split of the ids between two characters.
void expect_the_whole_text(const Tokenizer& tokenizer, const Ids& ids) {
  const std::string whole = tokenizer.decode(ids);
  for (std::size_t split = 0; split <= ids.size(); ++split) {
    const std::string prompt = tokenizer.decode(std::span(ids).first(split));
    if (prompt.ends_with("\xEF\xBF\xBD")) continue;
    const auto pieces = pieces_of(tokenizer, ids, split);
    EXPECT_EQ(prompt + joined(pieces), whole) << "split " << split;
    for (const std::string& piece : pieces)
      EXPECT_EQ(piece.find("\xEF\xBF\xBD"), std::string::npos) << "split " << split;
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
