#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cleave {

/// A vocabulary: spellings to ids and back. All spellings lie in one string, behind an index of ids
/// and an open-addressed one of hashes: some 18 bytes a token, where a map of strings and a vector
/// of them take 130. Immutable.
class TokenTable {
 public:
  using Entry = std::pair<std::int32_t, std::string_view>;

  TokenTable() = default;
  /// @param entries  ids >= 0 and their spellings, all of them different. Ids may leave holes; of
  ///                 an id that occurs twice all spellings are found, and the last stands for it.
  /// @throws InvalidArgument  the spellings are 4 GiB or more
  explicit TokenTable(std::vector<Entry> entries);

  std::int32_t size() const {
    return begin_.empty() ? 0 : static_cast<std::int32_t>(begin_.size() - 1);
  }
  std::int32_t max_id() const { return ids_.empty() ? size() - 1 : ids_.back(); }
  /// -1 if there is no such spelling.
  std::int32_t find(std::string_view spelling) const;
  /// Empty if there is no such id. Valid while the table lives.
  std::optional<std::string_view> spelling(std::int32_t id) const;

 private:
  std::string_view text_of(std::size_t entry) const {
    return std::string_view(text_).substr(begin_[entry], begin_[entry + 1] - begin_[entry]);
  }

  std::int32_t id_of(std::int32_t entry) const { return ids_.empty() ? entry : ids_[entry]; }
  // Four bytes a slot: at 0.6, a look-up that finds nothing meets 3.6 slots, mostly of one line.
  static constexpr double kMostFull = 0.6;
  std::size_t first_slot(std::string_view spelling) const noexcept;
  std::size_t next_slot(std::size_t slot) const noexcept {
    return slot + 1 == slots_.size() ? 0 : slot + 1;
  }

  // Entries in ascending order of their ids.
  std::string text_;                  // their spellings, one after the other
  std::vector<std::uint32_t> begin_;  // [entries + 1], into text_
  std::vector<std::int32_t> ids_;     // [entries]; empty: each entry's id is its number
  std::vector<std::int32_t> slots_;   // entries by hash, -1: free; at most kMostFull of them used
};

}  // namespace cleave
