#include "support/thread_pool.h"

#include <fmt/format.h>

#include <algorithm>

#include "cleave/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cleave {
namespace {

thread_local bool inside_body = false;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Some 20 to 50 microseconds of spinning, the length of the serial stretches between two parallel
// ones, then a futex. Longer spinning takes the core from others on a shared machine.
template <typename Ready>
void wait_for_change(const std::atomic<std::uint32_t>& value, const Ready& ready) {
  constexpr int kSpins = 1000;
  for (int i = 0; i < kSpins; ++i) {
    if (ready(value.load(std::memory_order_acquire))) return;
    pause();
  }
  for (std::uint32_t seen = value.load(std::memory_order_acquire); !ready(seen);
       seen = value.load(std::memory_order_acquire))
    value.wait(seen, std::memory_order_acquire);
}

int checked_threads(int threads) {
  if (threads < 0 || threads > ThreadPool::kMaxThreads)
    throw InvalidArgument(
        fmt::format("threads: {} is not a number of threads; expected 1 to {}, or 0 for as many as "
                    "the machine has cores",
                    threads, ThreadPool::kMaxThreads));
  if (threads > 0) return threads;
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(cores, 1, ThreadPool::kMaxThreads);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  const int count = checked_threads(threads);
  errors_.resize(count);
  workers_.reserve(count - 1);
  for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(void* pool, std::int64_t n, std::int64_t grain, void* context, Body body) {
  auto& self = *static_cast<ThreadPool*>(pool);
  const std::int64_t ranges =
      std::min<std::int64_t>(self.threads(), n / std::max<std::int64_t>(1, grain));
  if (ranges <= 1 || inside_body) return body(context, 0, n);
  self.distribute({body, context, n, ranges});
}

void ThreadPool::distribute(const Job& job) {
  const std::scoped_lock lock(one_call_);
  job_ = job;
  running_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  run_range(0);
  wait_for_change(running_, [](std::uint32_t left) { return left == 0; });
  std::exception_ptr first;
  for (std::exception_ptr& error : errors_) {
    if (error != nullptr && first == nullptr) first = error;
    error = nullptr;
  }
  if (first != nullptr) std::rethrow_exception(first);
}

void ThreadPool::run_range(std::int64_t index) {
  if (index >= job_.ranges) return;
  inside_body = true;
  try {
    // The remainder goes one each to the first ranges.
    const std::int64_t share = job_.n / job_.ranges, rest = job_.n % job_.ranges;
    const std::int64_t begin = index * share + std::min(index, rest);
    job_.body(job_.context, begin, begin + share + (index < rest ? 1 : 0));
  } catch (...) {
    errors_[index] = std::current_exception();
  }
  inside_body = false;
}

void ThreadPool::work(std::int64_t index) {
  for (std::uint32_t done = 0;; ++done) {
    wait_for_change(round_, [&](std::uint32_t round) { return round != done; });
    if (stop_.load(std::memory_order_relaxed)) return;
    run_range(index);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

}  // namespace cleave
