#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace cleave {

/// A range of task numbers for each part. A part takes its own from the front; when there are none
/// left, it takes others' from the back. So parts keep to neighbouring tasks, and none waits long
/// for one that was slower than planned: its core may be shared, or clocked lower.
class StealingRanges {
 public:
  struct alignas(64) Range {
    std::atomic<std::uint64_t> bounds;  ///< the next task below, the end in the upper half
  };

  /// @param ranges  [parts], unset
  StealingRanges(Range* ranges, std::int64_t parts) : ranges_(ranges), parts_(parts) {}

  /// Before any part takes a task. Tasks are fewer than 2^32.
  void set(std::int64_t part, std::int64_t begin, std::int64_t end) const {
    new (&ranges_[part]) Range;
    ranges_[part].bounds.store(pack(begin, end), std::memory_order_relaxed);
  }

  /// The part's next task, or -1.
  std::int64_t take(std::int64_t part) const {
    for (std::int64_t i = 0; i < parts_; ++i) {
      const std::int64_t task = take_from((part + i) % parts_, /*front=*/i == 0);
      if (task >= 0) return task;
    }
    return -1;
  }

  /// Whether the part's own tasks are taken.
  bool is_empty(std::int64_t part) const {
    const std::uint64_t now = ranges_[part].bounds.load(std::memory_order_relaxed);
    return (now & 0xffffffffu) >= now >> 32;
  }

 private:
  static std::uint64_t pack(std::int64_t begin, std::int64_t end) {
    return static_cast<std::uint64_t>(begin) | static_cast<std::uint64_t>(end) << 32;
  }
  std::int64_t take_from(std::int64_t part, bool front) const {
    std::atomic<std::uint64_t>& bounds = ranges_[part].bounds;
    // What tasks read was written before the parts began, or the caller orders it.
    std::uint64_t now = bounds.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<std::int64_t>(now & 0xffffffffu);
      const auto end = static_cast<std::int64_t>(now >> 32);
      if (begin >= end) return -1;
      const std::uint64_t rest = front ? pack(begin + 1, end) : pack(begin, end - 1);
      if (bounds.compare_exchange_weak(now, rest, std::memory_order_relaxed))
        return front ? begin : end - 1;
    }
  }

  Range* ranges_;
  std::int64_t parts_;
};

}  // namespace cleave
