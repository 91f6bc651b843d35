#include "cleave/text.h"

#include <gtest/gtest.h>

#include <fstream>

#include "cleave/error.h"
#include "cleave/model_config.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"

namespace cleave {
namespace {

std::filesystem::path write(const testing::TempDir& dir, const std::string& content) {
  const auto file = dir.path() / "text.txt";
  std::ofstream(file, std::ios::binary) << content;
  return file;
}

void expect_error(const std::filesystem::path& file, const std::string& part) {
  try {
    read_text(file);
    FAIL() << "read " << file;
  } catch (const FileError& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(file.string()), std::string::npos) << error.what();
  }
}

TEST(ReadText, ReturnsTheBytes) {
  const testing::TempDir dir;
  const std::string text = "A line,\r\n\xC3\xA9t\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80\n";
  EXPECT_EQ(read_text(write(dir, text)), text);
  const std::string almost = "nineteen good bytes, one bad \xFF";  // under one in ten
  EXPECT_EQ(read_text(write(dir, almost)), almost);
}

TEST(ReadText, RefusesWhatIsNoText) {
  const testing::TempDir dir;
  expect_error(dir.path() / "absent.txt", "no such");
  expect_error(dir.path(), "directory");
  expect_error(write(dir, ""), "no text");
  expect_error(write(dir, " \n\t\r\n"), "no text");
  expect_error(write(dir, std::string("abc\0def", 7)), "NUL byte at offset 3");
  expect_error(write(dir, "abcdefgh\xFF"), "1 of 9");          // more than one in ten
  expect_error(write(dir, "abcdefg\xED\xA0\x80"), "3 of 10");  // a surrogate
  expect_error(write(dir, "abcdef\xC0\xAF"), "2 of 8");        // overlong
  expect_error(write(dir, "abcdef\xE2\x82"), "2 of 8");        // cut off
  expect_error(write(dir, "abc\xF4\x90\x80\x80"), "4 of 7");   // beyond U+10FFFF
}

TEST(MakeWindows, CutsDisjointWindowsAndDropsTheRest) {
  const TokenWindows windows = make_windows({1, 2, 3, 4, 5, 6, 7}, 3, 0, "text");
  ASSERT_EQ(windows.count(), 2);
  EXPECT_EQ(windows.window(0)[0], 1);
  EXPECT_EQ(windows.window(1)[2], 6);
  EXPECT_EQ(windows.tokens.size(), 6u);
  EXPECT_EQ(make_windows({1, 2, 3, 4, 5, 6, 7}, 2, 5, "text").count(), 2);
  EXPECT_EQ(make_windows({1, 2, 3, 4}, 2, 100, "text").count(), 2);
}

TEST(MakeWindows, RefusesTooLittle) {
  EXPECT_THROW(make_windows({1, 2, 3}, 1, 0, "text"), InvalidArgument);
  EXPECT_THROW(make_windows({1, 2, 3}, 2, -1, "text"), InvalidArgument);
  EXPECT_THROW(make_windows({1, 2, 3}, 3, 2, "text"), InvalidArgument);
  try {
    make_windows({1, 2, 3}, 4, 0, "story.txt");
    FAIL() << "made a window of too few tokens";
  } catch (const FileError& error) {
    EXPECT_EQ(std::string(error.what()).find("story.txt: has 3 tokens"), 0u) << error.what();
  }
}

TEST(MakeWindows, FramesArePartOfEachWindow) {
  const WindowFrame frame{{101}, {102, 103}};
  const TokenWindows windows = make_windows({1, 2, 3, 4, 5}, 5, 0, "text", frame);
  EXPECT_EQ(windows.tokens, (std::vector<std::int32_t>{101, 1, 2, 102, 103, 101, 3, 4, 102, 103}));
  EXPECT_EQ(windows.count(), 2);
  EXPECT_EQ(windows.before, 1);
  EXPECT_EQ(windows.after, 2);
  EXPECT_EQ(make_windows({1, 2, 3, 4, 5}, 5, 9, "text", frame).count(), 1);  // not two of 5
  EXPECT_EQ(make_windows({1, 2}, 5, 5, "text", frame).count(), 1);
  EXPECT_THROW(make_windows({1, 2}, 3, 0, "text", frame), InvalidArgument);  // no room for text
  EXPECT_THROW(make_windows({1, 2}, 5, 4, "text", frame), InvalidArgument);
  EXPECT_THROW(make_windows({1}, 5, 0, "text", frame), FileError);
}

/// Knows "a" (3) and "b" (4), and puts [CLS] (1) and [SEP] (2) around a text.
Tokenizer framing_tokenizer(bool frames = true) {
  const std::string processor =
      R"({"type": "BertProcessing", "cls": ["[CLS]", 1], "sep": ["[SEP]", 2]})";
  return Tokenizer::from_json(R"({"added_tokens": [], "pre_tokenizer": {"type": "BertPreTokenizer"},
      "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}},
      "post_processor": )" + (frames ? processor : "null") +
                                  "}",
                              "frame.json");
}

TEST(ModelWindows, OfAnEncoderStandBetweenSpecialTokens) {
  using Tokens = std::vector<std::int32_t>;
  ModelConfig encoder;
  encoder.causal = false;
  const auto tokens = [](const ModelConfig& config, const Tokenizer& tokenizer) {
    return model_windows(config, tokenizer, "a b a b a", 4, 0, "text").tokens;
  };
  EXPECT_EQ(tokens(encoder, framing_tokenizer()), (Tokens{1, 3, 4, 2, 1, 3, 4, 2}));
  EXPECT_EQ(tokens(encoder, framing_tokenizer(false)), (Tokens{3, 4, 3, 4}));
  EXPECT_EQ(tokens(ModelConfig{}, framing_tokenizer()), (Tokens{3, 4, 3, 4}));
}

TEST(ModelWindows, AreNoLongerThanThereAreLearnedPositions) {
  ModelConfig config;
  config.max_position_embeddings = 4;
  EXPECT_EQ(model_windows(config, framing_tokenizer(), "a b a b a", 5, 0, "text").count(), 1);
  config.rotary = false;
  EXPECT_EQ(model_windows(config, framing_tokenizer(), "a b a b a", 4, 0, "text").count(), 1);
  EXPECT_THROW(model_windows(config, framing_tokenizer(), "a b a b a", 5, 0, "text"),
               InvalidArgument);
}

}  // namespace
}  // namespace cleave
