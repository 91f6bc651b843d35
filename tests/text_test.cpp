#include "cleave/text.h"

#include <gtest/gtest.h>

#include <fstream>

#include "cleave/error.h"
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

}  // namespace
}  // namespace cleave
