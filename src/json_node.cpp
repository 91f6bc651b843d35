#include "json_node.h"

#include <fmt/format.h>

#include "cleave/error.h"

namespace cleave {

bool JsonNode::has(std::string_view key) const {
  if (!value_->is_object()) return false;
  const auto found = value_->find(key);
  return found != value_->end() && !found->is_null();
}

JsonNode JsonNode::at(std::string_view key) const {
  if (!value_->is_object()) fail(fmt::format("expected an object with the key \"{}\"", key));
  const auto found = value_->find(key);
  if (found == value_->end()) fail(fmt::format("the key \"{}\" is missing", key));
  return {*found, *origin_, path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key)};
}

JsonNode JsonNode::at_or_null(std::string_view key) const {
  static const nlohmann::json kNull;
  if (value_->is_object() && value_->contains(key)) return at(key);
  return {kNull, *origin_, path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key)};
}

std::vector<JsonNode> JsonNode::elements() const {
  std::vector<JsonNode> nodes;
  if (is_null()) return nodes;
  if (!value_->is_array()) fail(fmt::format("expected an array, got {}", value_->type_name()));
  nodes.reserve(value_->size());
  for (std::size_t i = 0; i < value_->size(); ++i)
    nodes.push_back({(*value_)[i], *origin_, fmt::format("{}[{}]", path_, i)});
  return nodes;
}

std::string JsonNode::as_string() const {
  if (!value_->is_string()) fail(fmt::format("expected a string, got {}", value_->type_name()));
  return value_->get<std::string>();
}

std::int64_t JsonNode::as_integer() const {
  if (!value_->is_number_integer())
    fail(fmt::format("expected an integer, got {}", value_->type_name()));
  return value_->get<std::int64_t>();
}

std::string JsonNode::string_or(std::string_view key, std::string fallback) const {
  return has(key) ? at(key).as_string() : std::move(fallback);
}

std::int64_t JsonNode::integer_or(std::string_view key, std::int64_t fallback) const {
  return has(key) ? at(key).as_integer() : fallback;
}

bool JsonNode::bool_or(std::string_view key, bool fallback) const {
  if (!has(key)) return fallback;
  const JsonNode node = at(key);
  if (!node.value().is_boolean())
    node.fail(fmt::format("expected true or false, got {}", node.value().type_name()));
  return node.value().get<bool>();
}

std::string JsonNode::type() const { return at("type").as_string(); }

void JsonNode::fail(std::string_view message) const {
  if (path_.empty()) throw FileError(fmt::format("{}: {}", *origin_, message));
  throw FileError(fmt::format("{}: {}: {}", *origin_, path_, message));
}

}  // namespace cleave
