#include "nfc.h"

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "unicode.h"
#include "unicode_tables.h"

// UAX #15: decompose fully, sort runs of combining marks by their class, compose.

namespace cleave {
namespace {

using unicode_tables::Decomposition;

// Hangul syllables are composed by arithmetic (Unicode 3.12).
constexpr char32_t kHangulBase = 0xAC00, kLeadBase = 0x1100, kVowelBase = 0x1161,
                   kTrailBase = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTrails = 28, kSyllables = kLeads * kVowels * kTrails;

std::uint8_t combining_class(char32_t code_point) {
  const auto ranges = unicode_tables::combining_ranges();
  const auto found = std::lower_bound(
      ranges.begin(), ranges.end(), code_point,
      [](const unicode_tables::CombiningRange& range, char32_t c) { return range.last < c; });
  return found != ranges.end() && found->first <= code_point ? found->combining_class : 0;
}

const Decomposition* find_decomposition(char32_t code_point) {
  const auto table = unicode_tables::decompositions();
  const auto found =
      std::lower_bound(table.begin(), table.end(), code_point,
                       [](const Decomposition& entry, char32_t c) { return entry.composed < c; });
  return found != table.end() && found->composed == code_point ? &*found : nullptr;
}

void append_decomposed(std::vector<char32_t>& out, char32_t c) {
  if (c >= kHangulBase && c < kHangulBase + kSyllables) {
    const char32_t index = c - kHangulBase;
    out.push_back(kLeadBase + index / (kVowels * kTrails));
    out.push_back(kVowelBase + index / kTrails % kVowels);
    if (index % kTrails != 0) out.push_back(kTrailBase + index % kTrails);
    return;
  }
  const Decomposition* entry = find_decomposition(c);
  if (entry == nullptr) {
    out.push_back(c);
    return;
  }
  append_decomposed(out, entry->first);
  if (entry->second != 0) append_decomposed(out, entry->second);
}

void sort_marks(std::vector<char32_t>& text) {
  const auto by_class = [](char32_t a, char32_t b) {
    return combining_class(a) < combining_class(b);
  };
  for (auto begin = text.begin(); begin != text.end();) {
    const auto is_mark = [](char32_t c) { return combining_class(c) != 0; };
    begin = std::find_if(begin, text.end(), is_mark);
    const auto end = std::find_if_not(begin, text.end(), is_mark);
    std::stable_sort(begin, end, by_class);
    begin = end;
  }
}

/// The composition of a pair, or 0.
char32_t compose_pair(char32_t first, char32_t second) {
  if (first >= kLeadBase && first < kLeadBase + kLeads && second >= kVowelBase &&
      second < kVowelBase + kVowels)
    return kHangulBase + ((first - kLeadBase) * kVowels + (second - kVowelBase)) * kTrails;
  if (first >= kHangulBase && first < kHangulBase + kSyllables &&
      (first - kHangulBase) % kTrails == 0 && second > kTrailBase && second < kTrailBase + kTrails)
    return first + (second - kTrailBase);

  static const auto kPairs = [] {
    std::unordered_map<std::uint64_t, char32_t> pairs;
    for (const Decomposition& entry : unicode_tables::decompositions())
      if (entry.composes)
        pairs.emplace(std::uint64_t{entry.first} << 32 | entry.second, entry.composed);
    return pairs;
  }();
  const auto found = kPairs.find(std::uint64_t{first} << 32 | second);
  return found == kPairs.end() ? 0 : found->second;
}

/// Composes in place: each mark or letter joins the last starter unless something between them
/// blocks it (a starter, or a mark of the same or a higher class).
void compose(std::vector<char32_t>& text) {
  std::size_t written = 0, starter = 0;
  bool has_starter = false;
  int last_class = -1;  // of what follows the starter; -1: nothing does
  for (const char32_t c : text) {
    const int mark_class = combining_class(c);
    if (has_starter && last_class < mark_class) {
      if (const char32_t composed = compose_pair(text[starter], c); composed != 0) {
        text[starter] = composed;
        continue;
      }
    }
    if (mark_class == 0) {
      starter = written;
      has_starter = true;
      last_class = -1;
    } else {
      last_class = mark_class;
    }
    text[written++] = c;
  }
  text.resize(written);
}

}  // namespace

std::string normalize_nfc(std::string_view text) {
  // Below U+0300 nothing decomposes without composing back, and nothing composes.
  constexpr char32_t kFirstMark = 0x300;
  std::vector<char32_t> code_points;
  bool is_trivial = true;
  for (std::size_t position = 0; position < text.size();) {
    const CodePoint next = decode_utf8(text, position);
    is_trivial = is_trivial && next.value < kFirstMark;
    append_decomposed(code_points, next.value);
    position += next.length;
  }
  if (is_trivial) return std::string(text);
  sort_marks(code_points);
  compose(code_points);
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : code_points) append_utf8(out, c);
  return out;
}

std::string normalize_nfd(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::vector<char32_t> run;  // from one starter to before the next: marks are sorted within
  const auto flush = [&] {
    sort_marks(run);
    for (const char32_t c : run) append_utf8(out, c);
    run.clear();
  };
  std::vector<char32_t> parts;
  for (std::size_t position = 0; position < text.size();) {
    const CodePoint next = decode_utf8(text, position);
    position += next.length;
    parts.clear();
    append_decomposed(parts, next.value);
    if (combining_class(parts.front()) == 0) flush();
    run.insert(run.end(), parts.begin(), parts.end());
  }
  flush();
  return out;
}

}  // namespace cleave
