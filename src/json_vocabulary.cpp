#include "json_vocabulary.h"

#include <fmt/format.h>

#include <vector>

#include "json_node.h"

namespace cleave {

TokenTable read_vocabulary(const JsonNode& vocab) {
  // A larger id is a damaged file, and would make tables by id huge.
  constexpr std::int64_t kMaxId = (1 << 24) - 1;
  if (!vocab.value().is_object()) vocab.fail("expected an object of tokens and their ids");
  std::vector<TokenTable::Entry> entries;
  entries.reserve(vocab.value().size());
  for (auto token = vocab.value().begin(); token != vocab.value().end(); ++token) {
    const nlohmann::json& id = token.value();
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() > kMaxId)
      vocab.fail(
          fmt::format("the id of \"{}\" is {}; expected 0..{}", token.key(), id.dump(), kMaxId));
    entries.emplace_back(id.get<std::int32_t>(), token.key());
  }
  return TokenTable(std::move(entries));
}

}  // namespace cleave
