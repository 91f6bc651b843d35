#include "cleave/train/data.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cleave/error.h"

namespace cleave::train {
namespace {

TEST(WindowOrder, EveryWindowOnceAnEpochInAnOrderOfItsOwn) {
  WindowOrder order(10, 3);
  const auto first = order.next(10);
  const auto second = order.next(10);
  for (auto epoch : {first, second}) {
    std::sort(epoch.begin(), epoch.end());
    std::vector<std::int64_t> all(10);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(epoch, all);
  }
  EXPECT_NE(first, second);
  EXPECT_NE(first, WindowOrder(10, 4).next(10)) << "another seed, another order";
}

// Written by scripts/golden/make_training.py, which has its own mt19937_64.
TEST(WindowOrder, IsTheSameOnEveryMachine) {
  EXPECT_EQ(epoch_permutation(6, 5, 0), (std::vector<std::int64_t>{2, 5, 1, 0, 3, 4}));
  EXPECT_EQ(epoch_permutation(6, 5, 1), (std::vector<std::int64_t>{5, 4, 0, 2, 1, 3}));
}

TEST(WindowOrder, GoesOnWhereTheCursorStood) {
  WindowOrder whole(7, 1);
  whole.next(9);  // into the second epoch
  const DataCursor cursor = whole.cursor();
  EXPECT_EQ(cursor.epoch, 1);
  EXPECT_EQ(cursor.position, 2);
  WindowOrder resumed(7, 1);
  resumed.seek(cursor);
  EXPECT_EQ(resumed.next(20), whole.next(20));
}

TEST(WindowOrder, RefusesTheImpossible) {
  EXPECT_THROW(WindowOrder(0, 1), InvalidArgument);
  WindowOrder order(3, 1);
  EXPECT_THROW(order.seek({0, 3}), InvalidArgument);
}

TokenWindows counting(std::int64_t context, std::int64_t windows) {
  TokenWindows text;
  text.context = context;
  text.tokens.resize(static_cast<std::size_t>(context * windows));
  std::iota(text.tokens.begin(), text.tokens.end(), 0);
  return text;
}

TEST(BatchTokens, StacksTheWindows) {
  const std::vector<std::int64_t> ids = {2, 0};
  const at::Tensor batch = batch_tokens(counting(3, 3), ids);
  EXPECT_TRUE(at::equal(batch, at::tensor({6, 7, 8, 0, 1, 2}, at::kLong).view({2, 3})));
}

TEST(HoldOut, TakesTheEnd) {
  const auto split = hold_out(counting(3, 4), 1);
  EXPECT_EQ(split.train.count(), 3);
  EXPECT_EQ(split.held_out.tokens, (std::vector<std::int32_t>{9, 10, 11}));
  EXPECT_THROW(hold_out(counting(3, 4), 4), InvalidArgument);
}

TEST(CheckTokens, NamesTheWindow) {
  EXPECT_NO_THROW(check_tokens(counting(3, 4), 12));
  EXPECT_THROW(check_tokens(counting(3, 4), 11), InvalidArgument);
}

}  // namespace
}  // namespace cleave::train
