#include "kernels/shared_step.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <vector>

#include "support/thread_pool.h"

namespace cleave {
namespace {

TEST(SharedStep, IsDoneOnceAndSeenByAllWhoFinishIt) {
  constexpr std::int64_t kParts = 4;
  ThreadPool pool(kParts);
  for (int round = 0; round < 200; ++round) {
    int done = 0;  // not atomic: only the step writes it, and finish() orders the readers
    SharedStep step([&] { ++done; });
    std::vector<int> seen(kParts);
    pool.parallel_for()(kParts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t part = begin; part < end; ++part) {
        if (part == round % kParts) step.begin();
        EXPECT_TRUE(step.finish());
        seen[part] = done;
      }
    });
    ASSERT_EQ(seen, std::vector<int>(kParts, 1));
  }
}

TEST(SharedStep, OneThatFailsThrowsOnceAndTellsTheOthers) {
  int tries = 0;
  SharedStep step([&] {
    ++tries;
    throw std::runtime_error("no");
  });
  EXPECT_THROW(step.begin(), std::runtime_error);
  EXPECT_NO_THROW(step.begin());
  EXPECT_FALSE(step.finish());
  EXPECT_EQ(tries, 1);
}

}  // namespace
}  // namespace cleave
