#pragma once

#include <atomic>
#include <csignal>

namespace cleave::cli {

inline constexpr int kInterruptedExit = 130;  // as shells count SIGINT

/// Ctrl-C (or SIGTERM) once: requested() turns true, and the command ends in good order. Twice: the
/// default, at once. One object at a time.
class InterruptGuard {
 public:
  InterruptGuard() {
    flag() = false;
    for (const int signal : {SIGINT, SIGTERM})
      std::signal(signal, [](int number) {
        flag() = true;
        std::signal(number, SIG_DFL);
      });
  }
  ~InterruptGuard() {
    for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  static bool requested() { return flag(); }
  static std::atomic<bool>& flag() { return flag_; }

 private:
  static inline std::atomic<bool> flag_{false};
};

}  // namespace cleave::cli
