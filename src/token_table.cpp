#include "token_table.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "fail.h"

namespace cleave {

TokenTable::TokenTable(std::vector<Entry> entries)
    : slots_(std::bit_ceil(2 * entries.size() + 1), -1) {
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return a.first < b.first; });
  std::size_t bytes = 0;
  for (const auto& [id, spelling] : entries) bytes += spelling.size();
  if (bytes > std::numeric_limits<std::uint32_t>::max())
    fail_argument("TokenTable: {} spellings of {} bytes; expected less than 4 GiB in all",
                  entries.size(), bytes);
  text_.reserve(bytes);
  begin_.reserve(entries.size() + 1);
  ids_.reserve(entries.size());
  begin_.push_back(0);
  for (const auto& [id, spelling] : entries) {
    std::size_t slot = std::hash<std::string_view>{}(spelling) & (slots_.size() - 1);
    while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
    slots_[slot] = size();
    text_ += spelling;
    begin_.push_back(static_cast<std::uint32_t>(text_.size()));
    ids_.push_back(id);
  }
}

std::int32_t TokenTable::find(std::string_view spelling) const {
  if (slots_.empty()) return -1;
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t slot = std::hash<std::string_view>{}(spelling)&mask; slots_[slot] >= 0;
       slot = (slot + 1) & mask)
    if (text_of(static_cast<std::size_t>(slots_[slot])) == spelling) return ids_[slots_[slot]];
  return -1;
}

std::optional<std::string_view> TokenTable::spelling(std::int32_t id) const {
  // Without holes and doubles, an id is the number of its entry.
  if (id >= 0 && id < size() && ids_[id] == id && (id + 1 == size() || ids_[id + 1] != id))
    return text_of(static_cast<std::size_t>(id));
  const auto after = std::upper_bound(ids_.begin(), ids_.end(), id);
  if (after == ids_.begin() || *(after - 1) != id) return std::nullopt;
  return text_of(static_cast<std::size_t>(after - ids_.begin() - 1));
}

}  // namespace cleave
