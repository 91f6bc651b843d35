#include "token_table.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "fail.h"

namespace cleave {

TokenTable::TokenTable(std::vector<Entry> entries)
    : slots_(static_cast<std::size_t>(static_cast<double>(entries.size()) / kMostFull) + 2, -1) {
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return a.first < b.first; });
  std::size_t bytes = 0;
  for (const auto& [id, spelling] : entries) bytes += spelling.size();
  if (bytes > std::numeric_limits<std::uint32_t>::max())
    fail_argument("TokenTable: {} spellings of {} bytes; expected less than 4 GiB in all",
                  entries.size(), bytes);
  text_.reserve(bytes);
  begin_.reserve(entries.size() + 1);
  begin_.push_back(0);
  bool numbered = true;
  for (const auto& [id, spelling] : entries) {
    std::size_t slot = first_slot(spelling);
    while (slots_[slot] >= 0) slot = next_slot(slot);
    slots_[slot] = size();
    numbered = numbered && id == size();
    text_ += spelling;
    begin_.push_back(static_cast<std::uint32_t>(text_.size()));
  }
  if (numbered) return;
  ids_.reserve(entries.size());
  for (const auto& [id, spelling] : entries) ids_.push_back(id);
}

std::size_t TokenTable::first_slot(std::string_view spelling) const noexcept {
  // 32 bits of the hash, as a fraction of 2^32, choose a slot of any number of slots.
  const std::uint64_t hash = static_cast<std::uint32_t>(std::hash<std::string_view>{}(spelling));
  return static_cast<std::size_t>(hash * slots_.size() >> 32);
}

std::int32_t TokenTable::find(std::string_view spelling) const {
  if (slots_.empty()) return -1;
  for (std::size_t slot = first_slot(spelling); slots_[slot] >= 0; slot = next_slot(slot))
    if (text_of(static_cast<std::size_t>(slots_[slot])) == spelling) return id_of(slots_[slot]);
  return -1;
}

std::optional<std::string_view> TokenTable::spelling(std::int32_t id) const {
  // Without holes and doubles, an id is the number of its entry.
  if (id >= 0 && id < size() && id_of(id) == id && (id + 1 == size() || id_of(id + 1) != id))
    return text_of(static_cast<std::size_t>(id));
  const auto after = std::upper_bound(ids_.begin(), ids_.end(), id);
  if (after == ids_.begin() || *(after - 1) != id) return std::nullopt;
  return text_of(static_cast<std::size_t>(after - ids_.begin() - 1));
}

}  // namespace cleave
