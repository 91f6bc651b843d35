#include "kernels/stealing_ranges.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "support/thread_pool.h"

namespace cleave {
namespace {

TEST(StealingRanges, EveryTaskIsTakenOnceHoweverUnequalTheShares) {
  constexpr std::int64_t kParts = 4, kTasks = 1000;
  ThreadPool pool(kParts);
  std::vector<StealingRanges::Range> memory(kParts);
  const StealingRanges ranges(memory.data(), kParts);
  for (const std::int64_t first_share : {0, 7, 1000}) {
    ranges.set(0, 0, first_share);
    for (std::int64_t part = 1; part < kParts; ++part)
      ranges.set(part, part == 1 ? first_share : kTasks, kTasks);
    std::vector<std::vector<std::int64_t>> taken(kParts);
    pool.parallel_for()(kParts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t part = begin; part < end; ++part)
        for (std::int64_t i = ranges.take(part); i >= 0; i = ranges.take(part))
          taken[part].push_back(i);
    });
    std::vector<std::int64_t> all;
    for (const auto& part : taken) all.insert(all.end(), part.begin(), part.end());
    std::sort(all.begin(), all.end());
    ASSERT_EQ(all.size(), kTasks);
    for (std::int64_t i = 0; i < kTasks; ++i) ASSERT_EQ(all[i], i);
  }
}

TEST(StealingRanges, APartGoesForwardsAndAThiefTakesTheLast) {
  std::vector<StealingRanges::Range> memory(2);
  const StealingRanges ranges(memory.data(), 2);
  ranges.set(0, 0, 3);
  ranges.set(1, 3, 3);
  EXPECT_EQ(ranges.take(0), 0);
  EXPECT_TRUE(ranges.is_empty(1));
  EXPECT_EQ(ranges.take(1), 2);
  EXPECT_FALSE(ranges.is_empty(0));
  EXPECT_EQ(ranges.take(0), 1);
  EXPECT_TRUE(ranges.is_empty(0));
  EXPECT_EQ(ranges.take(0), -1);
  EXPECT_EQ(ranges.take(1), -1);
}

}  // namespace
}  // namespace cleave
