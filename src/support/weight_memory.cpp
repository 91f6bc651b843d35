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

std::shared_ptr<std::byte[]> allocate_huge(std::size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto memory = allocate_aligned(bytes, kHugePage);
  advise_huge_pages(memory.get(), bytes);
  return memory;
}

// The stretch that is being filled; its blocks own it.
struct Filling {
  std::mutex mutex;
  std::weak_ptr<std::byte[]> stretch;
  std::size_t used = 0;
};

}  // namespace

std::shared_ptr<std::byte[]> allocate_weights(std::int64_t bytes) {
  const std::size_t size =
      (static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)) + 63) / 64 * 64;
  if (size < kOwnBytes) return allocate_aligned(size, 64);
  if (size >= kLargeBytes) return allocate_huge(size);
  static Filling filling;
  const std::scoped_lock lock(filling.mutex);
  std::shared_ptr<std::byte[]> stretch = filling.stretch.lock();
  if (stretch == nullptr || filling.used + size > kStretchBytes) {
    stretch = allocate_huge(kStretchBytes);
    filling.stretch = stretch;
    filling.used = 0;
  }
  std::byte* block = stretch.get() + filling.used;
  filling.used += size;
  return {std::move(stretch), block};
}

}  // namespace cleave
