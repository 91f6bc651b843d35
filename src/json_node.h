#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace cleave {

/// A value inside a JSON document that knows where it is, so that every complaint names the
/// document and the path to the value. Borrows the document.
class JsonNode {
 public:
  /// @param origin  names the document in messages
  JsonNode(const nlohmann::json& value, const std::string& origin)
      : value_(&value), origin_(&origin) {}

  const nlohmann::json& value() const { return *value_; }
  bool is_null() const { return value_->is_null(); }
  /// The key is there and its value is not null.
  bool has(std::string_view key) const;

  /// @throws FileError  this is no object, or it has no such key
  JsonNode at(std::string_view key) const;
  /// The same, but a null node if the key is absent.
  JsonNode at_or_null(std::string_view key) const;
  /// The elements of an array, or nothing for null.
  /// @throws FileError  neither array nor null
  std::vector<JsonNode> elements() const;

  // Typed reads of this value, and of a key of this object with a default for null or absent.
  std::string as_string() const;
  std::int64_t as_integer() const;
  std::string string_or(std::string_view key, std::string fallback) const;
  std::int64_t integer_or(std::string_view key, std::int64_t fallback) const;
  bool bool_or(std::string_view key, bool fallback) const;
  /// The string under "type".
  std::string type() const;

  /// Throws FileError "<origin>: <path>: <message>".
  [[noreturn]] void fail(std::string_view message) const;

 private:
  JsonNode(const nlohmann::json& value, const std::string& origin, std::string path)
      : value_(&value), origin_(&origin), path_(std::move(path)) {}

  const nlohmann::json* value_;
  const std::string* origin_;
  std::string path_;
};

}  // namespace cleave
