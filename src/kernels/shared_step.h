#pragma once

#include <atomic>
#include <functional>
#include <utility>

#include "kernels/wait_until.h"

namespace cleave {

/// A step of a parallel phase that a part of its work needs: whoever asks first does it, while
/// others go on with what does not need it. So nobody waits for a part that has not begun (it may
/// run later on the same thread).
class SharedStep {
 public:
  explicit SharedStep(std::function<void()> work) : work_(std::move(work)) {}

  /// Does it, unless somebody has begun.
  /// @throws  what the work throws
  void begin() {
    int open = kOpen;
    if (!state_.compare_exchange_strong(open, kBegun, std::memory_order_relaxed)) return;
    int end = kFailed;
    const Ending ending{state_, end};
    work_();
    end = kDone;
  }
  /// The same, and waits for whoever has begun.
  /// @return whether it is done; else the one that began throws.
  bool finish() {
    begin();
    wait_until([this] { return state_.load(std::memory_order_acquire) != kBegun; });
    return state_.load(std::memory_order_relaxed) == kDone;
  }

 private:
  enum State : int { kOpen, kBegun, kDone, kFailed };
  struct Ending {
    std::atomic<int>& state;
    const int& value;
    ~Ending() { state.store(value, std::memory_order_release); }
  };

  std::function<void()> work_;
  std::atomic<int> state_{kOpen};
};

}  // namespace cleave
