#pragma once

#include <thread>

#include "support/pause.h"

namespace cleave {

/// Waits for another part of the same parallel region that is at work: it has begun, and will not
/// be long.
template <typename Ready>
void wait_until(const Ready& ready) {
  constexpr int kLooks = 1000;  // some tens of microseconds
  for (int i = 0; !ready();) {
    if (i < kLooks) {
      ++i;
      pause_core();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace cleave
