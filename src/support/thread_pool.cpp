#include "support/thread_pool.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "cleave/error.h"
#include "support/pause.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace cleave {
namespace {

thread_local bool inside_body = false;

// What a waiting thread spins before it sleeps: longer than the serial stretches of a forward pass
// and of drawing a token from the logits. To be woken from a futex takes tens of microseconds, more
// on a virtual machine; longer spinning would take the core from others for nothing.
constexpr std::chrono::microseconds kSpinTime(100);
// After that the caller, whose workers are at work, goes on looking and offers its core to them
// each time: to sleep, and to be woken onto a worker's core, would cost more.
constexpr std::chrono::milliseconds kYieldTime(2);

#if defined(__linux__)
int current_cpu() { return sched_getcpu(); }

/// Moves this thread off `cpu`. A kernel may wake a thread on the core of the one that wakes it,
/// though others are idle, and leave the two to take turns there for milliseconds.
void leave_cpu(int cpu) {
  cpu_set_t allowed;
  if (cpu < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0) return;
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_cpu() { return -1; }
void leave_cpu(int) {}
#endif

/// Waits until `ready` says so of `value`. Where there are more threads than cores, whoever spins
/// may keep the one from running that it waits for.
template <typename Ready>
void wait_for_change(const std::atomic<std::uint32_t>& value, bool spin,
                     std::chrono::microseconds yield_time, const Ready& ready) {
  constexpr int kPausesPerLook = 16;  // at the clock, which is slower than at the value
  if (spin) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < kPausesPerLook; ++i) {
        if (ready(value.load(std::memory_order_acquire))) return;
        pause_core();
      }
    } while (std::chrono::steady_clock::now() < end);
    while (std::chrono::steady_clock::now() < end + yield_time) {
      if (ready(value.load(std::memory_order_acquire))) return;
      std::this_thread::yield();
    }
  }
  for (std::uint32_t seen = value.load(std::memory_order_acquire); !ready(seen);
       seen = value.load(std::memory_order_acquire))
    value.wait(seen, std::memory_order_acquire);
}

int cores() { return static_cast<int>(std::thread::hardware_concurrency()); }

int checked_threads(int threads) {
  if (threads < 0 || threads > ThreadPool::kMaxThreads)
    throw InvalidArgument(
        fmt::format("threads: {} is not a number of threads; expected 1 to {}, or 0 for as many as "
                    "the machine has cores",
                    threads, ThreadPool::kMaxThreads));
  if (threads > 0) return threads;
  return std::clamp(cores(), 1, ThreadPool::kMaxThreads);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  const int count = checked_threads(threads);
  spin_ = count <= cores();
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
  self.distribute({body, context, n, ranges, current_cpu()});
}

void ThreadPool::distribute(const Job& job) {
  const std::scoped_lock lock(one_call_);
  job_ = job;
  running_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  run_range(0);
  wait_for_change(running_, spin_, kYieldTime, [](std::uint32_t left) { return left == 0; });
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
    wait_for_change(round_, spin_, {}, [&](std::uint32_t round) { return round != done; });
    if (stop_.load(std::memory_order_relaxed)) return;
    if (spin_ && current_cpu() == job_.cpu) leave_cpu(job_.cpu);
    run_range(index);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

}  // namespace cleave
