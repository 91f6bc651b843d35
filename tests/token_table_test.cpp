#include "token_table.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cleave/error.h"

namespace cleave {
namespace {

TEST(TokenTable, FindsSpellingsAndIds) {
  std::vector<std::string> spellings;
  std::vector<TokenTable::Entry> entries;
  for (int i = 0; i < 1000; ++i) spellings.push_back(std::string(i % 7, 'x') + std::to_string(i));
  for (int i = 999; i >= 0; --i) entries.emplace_back(i, spellings[i]);
  const TokenTable table(std::move(entries));
  EXPECT_EQ(table.size(), 1000);
  EXPECT_EQ(table.max_id(), 999);
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(table.find(spellings[i]), i);
    EXPECT_EQ(table.spelling(i), spellings[i]);
  }
  EXPECT_EQ(table.find("1000"), -1);
  EXPECT_EQ(table.find(""), -1);
  EXPECT_FALSE(table.spelling(-1));
  EXPECT_FALSE(table.spelling(1000));
}

TEST(TokenTable, RefusesMoreThanItsIndexCounts) {
  const std::string spelling(std::size_t{1} << 24, 'x');
  std::vector<TokenTable::Entry> entries;
  for (int i = 0; i < 256; ++i) entries.emplace_back(i, spelling);
  EXPECT_THROW(TokenTable(std::move(entries)), InvalidArgument);
}

TEST(TokenTable, IdsMayLeaveHolesAndOccurTwice) {
  const TokenTable table({{7, "g"}, {0, ""}, {3, "c"}, {3, "d"}, {4, "e"}});
  EXPECT_EQ(table.size(), 5);
  EXPECT_EQ(table.max_id(), 7);
  EXPECT_EQ(table.find(""), 0);
  EXPECT_EQ(table.find("c"), 3);
  EXPECT_EQ(table.find("d"), 3);
  EXPECT_EQ(table.find("e"), 4);
  EXPECT_EQ(table.spelling(0), "");
  EXPECT_EQ(table.spelling(3), "d");
  EXPECT_EQ(table.spelling(4), "e");
  EXPECT_EQ(table.spelling(7), "g");
  for (const int hole : {1, 2, 5, 6, 8}) EXPECT_FALSE(table.spelling(hole)) << hole;
}

TEST(TokenTable, MayBeEmpty) {
  for (const TokenTable& table : {TokenTable(), TokenTable(std::vector<TokenTable::Entry>())}) {
    EXPECT_EQ(table.size(), 0);
    EXPECT_EQ(table.max_id(), -1);
    EXPECT_EQ(table.find("a"), -1);
    EXPECT_FALSE(table.spelling(0));
  }
}

}  // namespace
}  // namespace cleave
