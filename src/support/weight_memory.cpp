#include "support/weight_memory.h"

#include <algorithm>
#include <mutex>
#include <new>

#include "support/huge_pages.h"

namespace cleave {
namespace {

// Blocks below kOwnBytes gain nothing from a place beside others (and tools that look for writes
// beyond a block find them); from kLargeBytes on, a block fills its own pages.
constexpr std::size_t kOwnBytes = std::size_t{64} << 10;
constexpr std::size_t kLargeBytes = std::size_t{16} << 20;
constexpr std::size_t kStretchBytes = std::size_t{32} << 20;

std::shared_ptr<std::byte[]> allocate_aligned(std::size_t bytes, std::size_t alignment) {
  const auto align = static_cast<std::align_val_t>(alignment);
  auto* memory = static_cast<std::byte*>(::operator new[](bytes, align));
  return {memory, [align](std::byte* p) { ::operator delete[](p, align); }};
}

/// Huge pages but for the end, of which a huge page would leave up to 2 MiB unused.
std::shared_ptr<std::byte[]> allocate_huge(std::size_t bytes) {
  auto memory = allocate_aligned(bytes, kHugePage);
  advise_huge_pages(memory.get(), bytes);
  return memory;
}

// The stretch that is being filled; its blocks own it.
struct Filling {
  std::mutex mutex;
  std::weak_ptr<std::byte[]> stretch;
  std::size_t used = 0;

  /// What is behind the last block may be in memory, as part of its huge page.
  void trim() const {
    if (const std::shared_ptr<std::byte[]> whole = stretch.lock())
      discard_pages(whole.get() + used, kStretchBytes - used);
  }
};
Filling& filling() {
  static Filling only;
  return only;
}

}  // namespace

std::shared_ptr<std::byte[]> allocate_weights(std::int64_t bytes) {
  const std::size_t size =
      (static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)) + 63) / 64 * 64;
  if (size < kOwnBytes) return allocate_aligned(size, 64);
  if (size >= kLargeBytes) return allocate_huge(size);
  Filling& now = filling();
  const std::scoped_lock lock(now.mutex);
  std::shared_ptr<std::byte[]> stretch = now.stretch.lock();
  if (stretch == nullptr || now.used + size > kStretchBytes) {
    now.trim();
    stretch = allocate_huge(kStretchBytes);
    now.stretch = stretch;
    now.used = 0;
  }
  std::byte* block = stretch.get() + now.used;
  now.used += size;
  return {std::move(stretch), block};
}

void trim_weights() {
  Filling& now = filling();
  const std::scoped_lock lock(now.mutex);
  now.trim();
}

}  // namespace cleave
