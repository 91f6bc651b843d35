#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string_view>

#include "cleave/c_api.h"
#include "cleave/kernels.h"
#include "fail.h"

// What every function of the C interface does at the border between C and C++.
namespace cleave {

/// Keeps `message` as what cleave_last_error() says in this thread. `message` is cut if it is
/// longer than a line may be.
cleave_status c_failure(cleave_status status, std::string_view function,
                        std::string_view message) noexcept;

/// The status of the exception that is being handled, its message kept for cleave_last_error().
cleave_status c_failure_of_current_exception(std::string_view function) noexcept;

/// Runs the body of a C function; no exception leaves it.
template <typename Body>
cleave_status c_guarded(std::string_view function, const Body& body) noexcept {
  try {
    body();
    return CLEAVE_OK;
  } catch (...) {
    return c_failure_of_current_exception(function);
  }
}

inline void c_check_pointer(const void* pointer, const char* name) {
  if (pointer == nullptr) fail_argument("{} is NULL", name);
}

/// Refuses a struct that this library cannot read. `smallest`: bytes of the fields that every
/// version has; `known`: of those that this one has.
void c_check_struct(const void* given, const char* name, std::size_t smallest, std::size_t known);

/// A copy of a caller's struct, which may be shorter or longer than ours; what it lacks is zero.
template <typename Struct>
Struct c_read_struct(const Struct* given, const char* name, std::size_t smallest) {
  c_check_struct(given, name, smallest, sizeof(Struct));
  Struct copy;
  std::memset(&copy, 0, sizeof copy);
  std::memcpy(&copy, given, std::min<std::size_t>(given->struct_size, sizeof copy));
  return copy;
}

/// The threads of one call as a ParallelFor. Between regions it holds no lock and no thread.
class CallerThreads {
 public:
  /// @param threads  NULL: the calling thread alone
  /// @throws InvalidArgument  the struct cannot be honoured
  explicit CallerThreads(const cleave_threads* threads);
  CallerThreads(const CallerThreads&) = delete;
  CallerThreads& operator=(const CallerThreads&) = delete;

  bool spmd() const { return threads_.kind == CLEAVE_THREADS_SPMD; }
  /// Valid while this lives.
  ParallelFor parallel_for();
  /// Throws what this thread's share threw. To be called once, after the last region: the other
  /// threads of an SPMD call wait at the barrier for this one, whatever happens to it.
  void finish() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  using Body = void (*)(void* context, std::int64_t begin, std::int64_t end);
  struct Region;
  void check_callback() const;
  void check_spmd() const;
  static void run_callback(void* self, std::int64_t n, std::int64_t grain, void* context,
                           Body body);
  static void run_spmd(void* self, std::int64_t n, std::int64_t grain, void* context, Body body);

  cleave_threads threads_;
  std::exception_ptr error_;
};

}  // namespace cleave
