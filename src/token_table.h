#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cleave {

/// A vocabulary: spellings to ids and back. All spellings lie in one string, behind an index of ids
/// and an open-addressed one of hashes: some 25 bytes a token, where a map of strings and a vector
/// of them take 130. Immutable.
class TokenTable {
 public:
  using Entry = std::pair<std::int32_t, std::string_view>;

  TokenTable() = default;
  /// @param entries  ids >= 0 and their spellings, all of them different. Ids may leave holes; of
  ///                 an id that occurs twice all spellings are found, and the last stands for it.
  /// @throws InvalidArgument  the spellings are 4 GiB or more
  explicit TokenTable(std::vector<Entry> entries);

  std::int32_t size() const { return static_cast<std::int32_t>(ids_.size()); }
  std::int32_t max_id() const { return ids_.empty() ? -1 : ids_.back(); }
  /// -1 if there is no such spelling.
  std::int32_t find(std::string_view spelling) const;
  /// Empty if there is no such id. Valid while the table lives.
  std::optional<std::string_view> spelling(std::int32_t id) const;

 private:
  std::string_view text_of(std::size_t entry) const {
    return std::string_view(text_).substr(begin_[entry], begin_[entry + 1] - begin_[entry]);
  }

  // Entries in ascending order of their ids.
  std::string text_;                  // their spellings, one after the other
  std::vector<std::uint32_t> begin_;  // [entries + 1], into text_
  std::vector<std::int32_t> ids_;     // [entries]
  std::vector<std::int32_t> slots_;   // entries by hash, -1: free; a power of two, under half full
};

}  // namespace cleave
