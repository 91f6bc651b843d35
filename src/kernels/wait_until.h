#pragma once

#include <thread>

namespace cleave {

/// Waits for another part of the same phase that is at work: it has begun, and will not be long.
template <typename Ready>
void wait_until(const Ready& ready) {
  constexpr int kLooks = 10000;  // some tens of microseconds
  for (int i = 0; !ready();)
    if (++i > kLooks) std::this_thread::yield();
}

}  // namespace cleave
