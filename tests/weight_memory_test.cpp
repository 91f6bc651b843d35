#include "support/weight_memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cleave {
namespace {

TEST(WeightMemory, BlocksAreApartAndOutliveEachOther) {
  struct Block {
    std::shared_ptr<std::byte[]> memory;
    std::size_t size;
    int value;
  };
  std::vector<Block> blocks;
  const auto expect_own_bytes = [&] {
    for (const Block& block : blocks)
      ASSERT_TRUE(
          std::all_of(block.memory.get(), block.memory.get() + block.size,
                      [&](std::byte b) { return b == static_cast<std::byte>(block.value); }))
          << block.value;
  };
  // Below, within and beyond a shared stretch of 32 MB; more than one stretch in all.
  for (const std::size_t size :
       {1, 100 << 10, 7 << 20, 13 << 20, 65, 17 << 20, 15 << 20, 3 << 20}) {
    const int value = static_cast<int>(blocks.size()) + 1;
    blocks.push_back({allocate_weights(static_cast<std::int64_t>(size)), size, value});
    ASSERT_EQ(reinterpret_cast<std::uintptr_t>(blocks.back().memory.get()) % 64, 0u);
    std::memset(blocks.back().memory.get(), value, size);
  }
  expect_own_bytes();
  blocks.erase(blocks.begin() + 1, blocks.begin() + 4);
  expect_own_bytes();
  EXPECT_NE(allocate_weights(0), nullptr);
}

TEST(WeightMemory, TrimmingKeepsWhatIsThereAndWhatComes) {
  constexpr std::size_t kBytes = 100 << 10;
  const auto first = allocate_weights(kBytes);
  std::memset(first.get(), 1, kBytes);
  trim_weights();
  const auto second = allocate_weights(kBytes);
  EXPECT_EQ(first.get() + kBytes, second.get());
  std::memset(second.get(), 2, kBytes);
  trim_weights();
  const auto holds = [](const std::shared_ptr<std::byte[]>& block, int value) {
    return std::all_of(block.get(), block.get() + kBytes,
                       [&](std::byte b) { return b == static_cast<std::byte>(value); });
  };
  EXPECT_TRUE(holds(first, 1));
  EXPECT_TRUE(holds(second, 2));
}

#ifdef __linux__
TEST(WeightMemory, TrimmingGivesBackWhatIsBehindTheLastBlock) {
  constexpr std::size_t kBytes = 100 << 10, kTail = 256 << 10;
  const auto block = allocate_weights(kBytes);
  std::memset(block.get(), 1, kBytes);
  std::byte* tail = block.get() + kBytes;  // of the same stretch
  std::memset(tail, 2, kTail);
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(tail) + page - 1) / page * page;
  const std::size_t pages = (kTail - page) / page;  // whole ones
  const auto resident = [&] {
    std::vector<unsigned char> in_memory(pages);
    EXPECT_EQ(mincore(reinterpret_cast<void*>(first), pages * page, in_memory.data()), 0);
    return std::count_if(in_memory.begin(), in_memory.end(), [](unsigned char p) { return p & 1; });
  };
  EXPECT_EQ(resident(), static_cast<std::ptrdiff_t>(pages));
  trim_weights();
  EXPECT_EQ(resident(), 0);
  EXPECT_TRUE(std::all_of(block.get(), block.get() + kBytes,
                          [](std::byte b) { return b == std::byte{1}; }));
}
#endif

TEST(WeightMemory, NeighboursShareAStretch) {
  const auto first = allocate_weights(128 << 10), second = allocate_weights(128 << 10);
  EXPECT_EQ(first.get() + (128 << 10), second.get());
}

}  // namespace
}  // namespace cleave
