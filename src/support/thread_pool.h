#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cleave/kernels.h"

namespace cleave {

/// Threads that stay alive between calls. A forward pass makes hundreds of calls of a few hundred
/// microseconds each, so a waiting thread spins briefly before it sleeps.
///
/// [0, n) is cut into at most threads() equal ranges, the same for the same n and grain: results
/// are reproducible for a fixed number of threads. The caller runs the first range itself. A call
/// from inside a body runs in that thread alone; calls from several threads wait for each other.
class ThreadPool {
 public:
  /// @param threads  in all, the caller included; 0: as many as the machine has cores
  /// @throws InvalidArgument  threads < 0 or beyond kMaxThreads
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  static constexpr int kMaxThreads = 1024;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  /// Valid while the pool lives. An exception of a body reaches the caller once all ranges are done
  /// (the one of the lowest range, if there are several).
  ParallelFor parallel_for() { return {&ThreadPool::run, this, threads()}; }

 private:
  using Body = void (*)(void* body_context, std::int64_t begin, std::int64_t end);
  struct Job {
    Body body = nullptr;
    void* context = nullptr;
    std::int64_t n = 0;
    std::int64_t ranges = 0;
    int cpu = -1;  // of the caller
  };

  static void run(void* pool, std::int64_t n, std::int64_t grain, void* context, Body body);
  void distribute(const Job& job);
  void run_range(std::int64_t index);
  void work(std::int64_t index);

  std::mutex one_call_;
  std::vector<std::exception_ptr> errors_;  // [threads]
  bool spin_ = true;                        // there is a core for every thread
  std::atomic<bool> stop_{false};
  // What the workers wait for and what the caller waits for, on cache lines of their own.
  alignas(64) std::atomic<std::uint32_t> round_{0};    // changes when a job is there
  Job job_;                                            // beside it: both are read at once
  alignas(64) std::atomic<std::uint32_t> running_{0};  // workers that have not finished the round
  alignas(64) std::vector<std::thread> workers_;
};

}  // namespace cleave
