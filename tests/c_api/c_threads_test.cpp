#include <fmt/format.h>

#include <atomic>

#include "c_api/c_layer.h"
#include "c_border.h"

namespace cleave {
namespace {

using namespace testing;

struct FreePool {
  void operator()(cleave_pool* pool) const { cleave_pool_destroy(pool); }
};
using PoolHandle = std::unique_ptr<cleave_pool, FreePool>;

PoolHandle create_pool(int n) {
  cleave_pool* pool = nullptr;
  EXPECT_EQ(cleave_pool_create(n, &pool), CLEAVE_OK) << cleave_last_error();
  return PoolHandle(pool);
}

cleave_threads pool_threads(cleave_pool* pool) {
  cleave_threads threads = cleave_threads_init();
  threads.kind = CLEAVE_THREADS_POOL;
  threads.pool = pool;
  return threads;
}

struct Shape {
  std::int64_t E, T, K;  // K = 0: dense
};
// One token, few, many: every way of cutting the work.
constexpr Shape kShapes[] = {{6, 1, 2},    {6, 7, 3}, {2, 500, 1},
                             {2, 1500, 2}, {1, 3, 0}, {1, 300, 0}};

TEST(CApi, AllKindsOfThreadsGiveTheSameBits) {
  for (const Shape& shape : kShapes)
    for (const std::int32_t packed : {CLEAVE_BF16, CLEAVE_INT4})
      for (int n = 1; n <= 4; ++n) {
        SCOPED_TRACE(fmt::format("E={} T={} K={} threads={} packed={}", shape.E, shape.T, shape.K,
                                 n, packed));
        const CLayer layer({.E = shape.E, .D = 65, .I = 40, .biases = true, .packed = packed});
        const ExpertsHandle experts = create(layer.desc());
        const auto make = [&] {
          return std::make_unique<CCall>(experts.get(), shape.T, shape.K, n, 11);
        };
        const auto by_pool = make(), by_callback = make(), backward = make(), together = make(),
                   alone = make();
        const Expectation expected(layer, *alone, 1.0f);
        const PoolHandle pool = create_pool(n);
        const cleave_threads of_pool = pool_threads(pool.get()), of_callback = callback_threads(n),
                             one_by_one = backward_threads(n);
        ASSERT_EQ(by_pool->run(&of_pool), CLEAVE_OK) << cleave_last_error();
        ASSERT_EQ(by_callback->run(&of_callback), CLEAVE_OK) << cleave_last_error();
        ASSERT_EQ(backward->run(&one_by_one), CLEAVE_OK) << cleave_last_error();
        ASSERT_EQ(Spmd(n).run(*together), std::vector<cleave_status>(n, CLEAVE_OK));
        ASSERT_EQ(by_pool->y.values, by_callback->y.values);
        ASSERT_EQ(by_pool->y.values, backward->y.values);
        ASSERT_EQ(by_pool->y.values, together->y.values);
        expect_near(by_pool->y, expected.y, expected.magnitude, expected.bound);
        if (n > 1) continue;
        ASSERT_EQ(alone->run(), CLEAVE_OK) << cleave_last_error();
        ASSERT_EQ(by_pool->y.values, alone->y.values);
      }
}

// What a race would spoil: one handle, many threads, a workspace each.
TEST(CApi, ManyThreadsShareOneHandle) {
  const CLayer layer({.E = 6, .D = 64, .I = 48, .biases = true, .packed = CLEAVE_INT8});
  const ExpertsHandle experts = create(layer.desc());
  constexpr int kCallers = 4;
  std::vector<std::vector<float>> expected(kCallers), actual(kCallers);
  for (int i = 0; i < kCallers; ++i) {
    const CCall c(experts.get(), 3 + 20 * i, 2, 1, i);
    ASSERT_EQ(c.run(), CLEAVE_OK);
    expected[i] = c.y.values;
  }
  on_threads(kCallers, [&](int i) {
    for (int round = 0; round < 5; ++round) {
      const CCall c(experts.get(), 3 + 20 * i, 2, 1, i);
      if (c.run() == CLEAVE_OK) actual[i] = c.y.values;
    }
  });
  EXPECT_EQ(actual, expected);
}

TEST(CApi, ManyThreadsShareOnePool) {
  const CLayer layer({.E = 6, .D = 64, .I = 48});
  const ExpertsHandle experts = create(layer.desc());
  const PoolHandle pool = create_pool(2);
  std::vector<std::vector<float>> actual(3);
  on_threads(3, [&](int i) {
    const cleave_threads threads = pool_threads(pool.get());
    const CCall c(experts.get(), 30, 2, 2, 1);
    if (c.run(&threads) == CLEAVE_OK) actual[i] = c.y.values;
  });
  EXPECT_FALSE(actual[0].empty());
  EXPECT_EQ(actual[0], actual[1]);
  EXPECT_EQ(actual[0], actual[2]);
}

TEST(CApi, PacksOnTheCallersThreads) {
  const CLayer layer({.E = 5, .D = 33, .I = 40, .stored = CLEAVE_F16, .packed = CLEAVE_INT4});
  cleave_experts_desc desc = layer.desc();
  const ExpertsHandle alone = create(desc);
  const cleave_threads threads = callback_threads(3);
  desc.threads = &threads;
  const ExpertsHandle together = create(desc);
  EXPECT_EQ(alone->packed.unpack().up, together->packed.unpack().up);
  EXPECT_EQ(alone->packed.unpack().down_t, together->packed.unpack().down_t);
}

TEST(CApi, EachOfTheThreadsHearsOfAMistake) {
  const CLayer layer({});
  const ExpertsHandle experts = create(layer.desc());
  CCall c(experts.get(), 5, 2, 3, 1);
  c.routing.ids[7] = 99;
  const OwnedMatrix before = c.y;
  Spmd spmd(3);  // would hang if only some of them met at the barrier
  EXPECT_EQ(spmd.run(c), std::vector<cleave_status>(3, CLEAVE_INVALID_ARGUMENT));
  EXPECT_EQ(c.y.values, before.values);
}

// Inside of CallerThreads, for what no operand can provoke.
TEST(CApiThreads, AThreadThatFailsStillMeetsTheOthers) {
  constexpr int kThreads = 3;
  Spmd spmd(kThreads);
  std::atomic<int> second_regions{0}, errors{0};
  on_threads(kThreads, [&](int i) {
    const cleave_threads mine = spmd.threads(i);
    CallerThreads threads(&mine);
    const ParallelFor parallel = threads.parallel_for();
    parallel(kThreads, 1, [&](std::int64_t begin, std::int64_t) {
      if (begin == 1) fail_argument("part 1 fails");
    });
    parallel(kThreads, 1, [&](std::int64_t, std::int64_t) { ++second_regions; });
    try {
      threads.finish();
    } catch (const InvalidArgument&) {
      ++errors;
    }
  });
  EXPECT_EQ(second_regions, kThreads - 1);
  EXPECT_EQ(errors, 1);
}

TEST(CApiThreads, NoExceptionCrossesTheCallersCallback) {
  const cleave_threads mine = callback_threads(4);  // its threads would end the process
  CallerThreads threads(&mine);
  std::atomic<int> parts{0};
  EXPECT_THROW(threads.parallel_for()(4, 1,
                                      [&](std::int64_t begin, std::int64_t) {
                                        ++parts;
                                        if (begin % 2 == 1) fail_argument("part {} fails", begin);
                                      }),
               InvalidArgument);
  EXPECT_EQ(parts, 4);
}

TEST(CApiThreads, ACallbackThatForgetsATaskIsFound) {
  const CLayer layer({});
  const ExpertsHandle experts = create(layer.desc());
  const CCall c(experts.get(), 5, 2, 3, 1);
  cleave_threads threads = callback_threads(3);
  threads.parallel_for = [](void*, std::int32_t tasks, cleave_task task, void* context) {
    for (std::int32_t i = 0; i + 1 < tasks; ++i) task(context, i);
  };
  EXPECT_EQ(c.run(&threads), CLEAVE_INVALID_ARGUMENT);
  EXPECT_NE(std::string(cleave_last_error()).find("after 2 of 3 tasks"), std::string::npos)
      << cleave_last_error();
}

TEST(CApiThreads, CutsEveryRangeOnce) {
  for (const int n : {1, 3, 4})
    for (const std::int64_t items : {1, 2, 3, 7, 100})
      for (const std::int64_t grain : {1, 4}) {
        std::vector<std::atomic<int>> seen(items);
        auto body = [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) ++seen[i];
        };
        const cleave_threads mine = callback_threads(n);
        CallerThreads(&mine).parallel_for()(items, grain, body);
        Spmd spmd(n);
        on_threads(n, [&](int i) {
          const cleave_threads share = spmd.threads(i);
          CallerThreads(&share).parallel_for()(items, grain, body);
        });
        for (const auto& count : seen) ASSERT_EQ(count, 2) << n << " " << items << " " << grain;
      }
}

}  // namespace
}  // namespace cleave
