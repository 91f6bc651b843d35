#include "c_border.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "support/thread_pool.h"

struct cleave_pool {
  explicit cleave_pool(int threads) : pool(threads) {}
  cleave::ThreadPool pool;
};

namespace cleave {
namespace {

// A plain array: it needs no construction per thread and no memory when memory is what is missing.
thread_local char c_last_error[1024] = "";

}  // namespace

cleave_status c_failure(cleave_status status, std::string_view function,
                        std::string_view message) noexcept {
  std::size_t used = 0;
  for (const std::string_view part : {function, std::string_view(": "), message}) {
    const std::size_t count = std::min(part.size(), sizeof c_last_error - 1 - used);
    std::memcpy(c_last_error + used, part.data(), count);
    used += count;
  }
  c_last_error[used] = '\0';
  return status;
}

cleave_status c_failure_of_current_exception(std::string_view function) noexcept {
  try {
    throw;
  } catch (const InvalidArgument& error) {
    return c_failure(CLEAVE_INVALID_ARGUMENT, function, error.what());
  } catch (const std::bad_alloc&) {
    return c_failure(CLEAVE_OUT_OF_MEMORY, function, "out of memory");
  } catch (const std::exception& error) {
    return c_failure(CLEAVE_INTERNAL_ERROR, function, error.what());
  } catch (...) {
    return c_failure(CLEAVE_INTERNAL_ERROR, function, "an exception of unknown type");
  }
}

void c_check_struct(const void* given, const char* name, std::size_t smallest, std::size_t known) {
  c_check_pointer(given, name);
  std::uint32_t head[2];
  std::memcpy(head, given, sizeof head);
  const auto [size, version] = head;
  if (size < smallest)
    fail_argument("{}: struct_size is {}; expected at least {} bytes; start from {}_init()", name,
                  size, smallest, name);
  if (version != CLEAVE_ABI_VERSION)
    fail_argument("{}: abi_version is {}, this library speaks {}; compile against its c_api.h",
                  name, version, CLEAVE_ABI_VERSION);
  const auto* bytes = static_cast<const unsigned char*>(given);
  for (std::size_t i = known; i < size; ++i)
    if (bytes[i] != 0)
      fail_argument(
          "{}: byte {} of {} is set, but this library (cleave {}) knows {}; leave the newer fields "
          "zero or use a newer library",
          name, i, size, cleave_version(), known);
}

CallerThreads::CallerThreads(const cleave_threads* threads) {
  if (threads == nullptr) {
    threads_ = cleave_threads_init();
    return;
  }
  threads_ = c_read_struct(threads, "cleave_threads", offsetof(cleave_threads, reserved));
  if (threads_.reserved != 0) fail_argument("cleave_threads: reserved is not 0");
  switch (threads_.kind) {
    case CLEAVE_THREADS_CALLER:
      return;
    case CLEAVE_THREADS_CALLBACK:
      check_callback();
      return;
    case CLEAVE_THREADS_SPMD:
      check_spmd();
      return;
    case CLEAVE_THREADS_POOL:
      c_check_pointer(threads_.pool, "cleave_threads.pool");
      return;
  }
  fail_argument("cleave_threads: kind is {}; expected one of CLEAVE_THREADS_*", threads_.kind);
}

void CallerThreads::check_callback() const {
  if (threads_.num_threads < 1 || threads_.num_threads > ThreadPool::kMaxThreads)
    fail_argument("cleave_threads: num_threads is {}; expected 1 to {}", threads_.num_threads,
                  ThreadPool::kMaxThreads);
  if (threads_.parallel_for == nullptr)
    fail_argument(
        "cleave_threads: parallel_for is NULL; the kind CLEAVE_THREADS_CALLBACK needs it");
}

void CallerThreads::check_spmd() const {
  if (threads_.num_threads < 1 || threads_.num_threads > ThreadPool::kMaxThreads)
    fail_argument("cleave_threads: num_threads is {}; expected 1 to {}", threads_.num_threads,
                  ThreadPool::kMaxThreads);
  if (threads_.thread_index < 0 || threads_.thread_index >= threads_.num_threads)
    fail_argument("cleave_threads: thread_index is {} of {} threads; expected 0 to {}",
                  threads_.thread_index, threads_.num_threads, threads_.num_threads - 1);
  if (threads_.barrier == nullptr && threads_.num_threads > 1)
    fail_argument("cleave_threads: barrier is NULL; the kind CLEAVE_THREADS_SPMD needs it");
}

ParallelFor CallerThreads::parallel_for() {
  switch (threads_.kind) {
    case CLEAVE_THREADS_POOL:
      return threads_.pool->pool.parallel_for();
    case CLEAVE_THREADS_CALLBACK:
      return {&CallerThreads::run_callback, this, threads_.num_threads};
    case CLEAVE_THREADS_SPMD:
      return {&CallerThreads::run_spmd, this, threads_.num_threads};
    default:
      return {};
  }
}

/// [0, n) in equal ranges, the remainder one each to the first: as ThreadPool cuts it.
struct CallerThreads::Region {
  Region(std::int64_t n_in, std::int64_t grain, int threads, void* context_in, Body body_in)
      : n(n_in),
        ranges(std::clamp<std::int64_t>(n_in / std::max<std::int64_t>(1, grain), 1, threads)),
        context(context_in),
        body(body_in) {}

  void run(std::int64_t index) const {
    const std::int64_t share = n / ranges, rest = n % ranges;
    const std::int64_t begin = index * share + std::min(index, rest);
    body(context, begin, begin + share + (index < rest ? 1 : 0));
  }
  /// A cleave_task: the caller's threads run C, which no exception may cross.
  static void task(void* region, std::int32_t index) noexcept {
    auto& self = *static_cast<Region*>(region);
    if (index < 0 || index >= self.ranges) return;  // not counted as done
    try {
      self.run(index);
    } catch (...) {
      if (!self.failed.exchange(true)) self.error = std::current_exception();
    }
    self.done.fetch_add(1, std::memory_order_release);
  }

  std::int64_t n, ranges;
  void* context;
  Body body;
  std::atomic<std::int64_t> done{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

void CallerThreads::run_callback(void* self, std::int64_t n, std::int64_t grain, void* context,
                                 Body body) {
  const cleave_threads& threads = static_cast<CallerThreads*>(self)->threads_;
  Region region(n, grain, threads.num_threads, context, body);
  if (region.ranges == 1) return region.run(0);
  threads.parallel_for(threads.context, static_cast<std::int32_t>(region.ranges), &Region::task,
                       &region);
  if (region.error != nullptr) std::rethrow_exception(region.error);
  const std::int64_t done = region.done.load(std::memory_order_acquire);
  if (done != region.ranges)
    fail_argument(
        "cleave_threads: parallel_for returned after {} of {} tasks; it must run each once", done,
        region.ranges);
}

void CallerThreads::run_spmd(void* self, std::int64_t n, std::int64_t grain, void* context,
                             Body body) {
  auto& me = *static_cast<CallerThreads*>(self);
  const Region region(n, grain, me.threads_.num_threads, context, body);
  if (me.threads_.thread_index < region.ranges && me.error_ == nullptr) {
    try {
      region.run(me.threads_.thread_index);
    } catch (...) {
      me.error_ = std::current_exception();
    }
  }
  if (me.threads_.num_threads > 1) me.threads_.barrier(me.threads_.context);
}

}  // namespace cleave

const char* cleave_last_error(void) { return cleave::c_last_error; }

cleave_status cleave_pool_create(int32_t num_threads, cleave_pool** pool) {
  return cleave::c_guarded("cleave_pool_create", [&] {
    cleave::c_check_pointer(pool, "pool");
    *pool = nullptr;
    *pool = new cleave_pool(num_threads);
  });
}

void cleave_pool_destroy(cleave_pool* pool) { delete pool; }
