#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cleave {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

/// Asks for huge pages where [memory, memory + bytes) has whole ones, before it is first written.
/// What is read in long streams loses a tenth of the bandwidth to the page walks of small pages.
/// Advice only; a system may ignore it.
inline void advise_huge_pages(void* memory, std::size_t bytes) {
#ifdef __linux__
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace cleave
