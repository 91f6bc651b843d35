#include "support/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <numeric>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "cleave/error.h"

namespace cleave {
namespace {

TEST(ThreadPool, CoversEveryItemOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.threads(), threads);
    for (std::int64_t n = 0; n < 40; ++n)
      for (const std::int64_t grain : {1, 3, 100}) {
        std::vector<int> hits(n, 0);
        pool.parallel_for()(n, grain, [&](std::int64_t begin, std::int64_t end) {
          ASSERT_TRUE(end - begin >= grain || (begin == 0 && end == n));
          for (std::int64_t i = begin; i < end; ++i) ++hits[i];
        });
        ASSERT_EQ(hits, std::vector<int>(n, 1)) << threads << " threads, grain " << grain;
      }
  }
}

TEST(ThreadPool, RunsOnSeveralThreads) {
  ThreadPool pool(3);
  std::vector<std::thread::id> ids(3);
  pool.parallel_for()(3, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) ids[i] = std::this_thread::get_id();
  });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  EXPECT_NE(ids[0], ids[1]);
  EXPECT_NE(ids[1], ids[2]);
}

TEST(ThreadPool, ManyShortCalls) {
  ThreadPool pool(4);
  std::int64_t total = 0;
  for (int call = 0; call < 5000; ++call) {
    std::int64_t sums[4] = {};
    pool.parallel_for()(4, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) sums[i] = i + call;
    });
    total += std::accumulate(std::begin(sums), std::end(sums), std::int64_t{0});
  }
  EXPECT_EQ(total, 5000 * 6 + 4 * (4999 * 5000 / 2));
}

// Whoever waits spins at first, but not for long.
TEST(ThreadPool, AnIdlePoolTakesNoProcessorTime) {
  ThreadPool pool(2);
  pool.parallel_for()(2, 1, [](std::int64_t, std::int64_t) {});
  const std::clock_t before = std::clock();  // of the process, all threads
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC, 0.1);
}

TEST(ThreadPool, AnExceptionReachesTheCallerAndThePoolLives) {
  ThreadPool pool(3);
  const auto fail_at = [&](std::int64_t bad) {
    pool.parallel_for()(3, 1, [&](std::int64_t begin, std::int64_t end) {
      if (begin <= bad && bad < end) throw std::runtime_error("range " + std::to_string(bad));
    });
  };
  for (const std::int64_t bad : {0, 1, 2}) {
    try {
      fail_at(bad);
      FAIL() << "lost the exception of range " << bad;
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(error.what(), "range " + std::to_string(bad));
    }
  }
  EXPECT_NO_THROW(fail_at(7));
}

TEST(ThreadPool, ACallFromInsideABodyRunsInThatThread) {
  ThreadPool pool(2);
  std::vector<int> hits(20, 0);
  pool.parallel_for()(2, 1, [&](std::int64_t outer, std::int64_t) {
    pool.parallel_for()(10, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) ++hits[outer * 10 + i];
    });
  });
  EXPECT_EQ(hits, std::vector<int>(20, 1));
}

TEST(ThreadPool, RefusesANonsensicalNumberOfThreads) {
  EXPECT_THROW(ThreadPool(-1), InvalidArgument);
  EXPECT_THROW(ThreadPool(1 << 20), InvalidArgument);
}

#if defined(__linux__)
// A worker may move to another core; it must not stay bound to some of them.
TEST(ThreadPool, WorkersKeepTheCoresTheyMayRunOn) {
  const auto allowed = [] {
    cpu_set_t set;
    EXPECT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
    return CPU_COUNT(&set);
  };
  const int expected = allowed();
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that the worker sleeps, too
    std::atomic<int> least{expected};
    pool.parallel_for()(2, 1, [&](std::int64_t, std::int64_t) {
      const int mine = allowed();
      if (mine < expected) least = mine;
    });
    ASSERT_EQ(least, expected);
  }
}
#endif

}  // namespace
}  // namespace cleave
