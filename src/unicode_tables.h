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

// What HuggingFace tokenizers takes for these classes; sorted and disjoint. Its categories are
// those of Unicode 8, its letter case that of Unicode 17.

/// Control, format and private-use characters, and U+FFFD: what cleaning a text for BERT removes.
std::span<const Range> control_ranges();
/// Category Mn: what stripping accents removes.
std::span<const Range> accent_ranges();
/// Category P, and every printable ASCII character that is no letter, digit or space.
std::span<const Range> punctuation_ranges();

struct CaseRange {
  char32_t first, last;  ///< inclusive
  char32_t step;         ///< only first, first + step, ... change
  std::int32_t delta;    ///< what they change by
};
/// Sorted by `first`; without U+0130, whose lower case is two code points.
std::span<const CaseRange> lowercase_ranges();

struct CombiningRange {
  char32_t first, last;          ///< inclusive
  std::uint8_t combining_class;  ///< canonical combining class, > 0
};
/// Sorted and disjoint; a code point outside has class 0, and so have marks since Unicode 10, which
/// HuggingFace tokenizers does not know.
std::span<const CombiningRange> combining_ranges();

struct Decomposition {
  char32_t composed, first, second;  ///< second = 0: a singleton
  bool composes;                     ///< first + second give `composed` back (no exclusion)
};
/// Canonical decompositions, one step each, sorted by `composed`; without Hangul.
std::span<const Decomposition> decompositions();

}  // namespace cleave::unicode_tables
