#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
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

/// Gives back the whole pages of [memory, memory + bytes), of `operator new`'s memory that was not
/// written or is not needed: it reads as zeros, or as before, and costs nothing until it is
/// written.
inline void discard_pages(void* memory, std::size_t bytes) {
#ifdef __linux__
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace cleave
