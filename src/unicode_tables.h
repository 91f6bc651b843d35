#pragma once

#include <cstdint>
#include <span>

// Excerpts of the Unicode character database, written by scripts/make_unicode_tables.py.
namespace cleave::unicode_tables {

struct Range {
  char32_t first, last;  ///< inclusive
};

/// Code points of category Nd, Nl, No, as sorted disjoint ranges.
std::span<const Range> numeric_ranges();

struct CombiningRange {
  char32_t first, last;          ///< inclusive
  std::uint8_t combining_class;  ///< canonical combining class, > 0
};
/// Sorted and disjoint; a code point outside has class 0.
std::span<const CombiningRange> combining_ranges();

struct Decomposition {
  char32_t composed, first, second;  ///< second = 0: a singleton
  bool composes;                     ///< first + second give `composed` back (no exclusion)
};
/// Canonical decompositions, one step each, sorted by `composed`; without Hangul.
std::span<const Decomposition> decompositions();

}  // namespace cleave::unicode_tables
