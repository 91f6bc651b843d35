#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace cleave {

/// Parses a JSON object strictly: one value, UTF-8, no duplicate keys. `origin` names the file in
/// messages.
/// @throws FileError  with the position of the fault
nlohmann::json parse_json_object(std::string_view text, const std::string& origin);

/// Typed access to one JSON object's keys. A key that is absent or null gives an empty optional;
/// one of the wrong type throws a FileError that names file and key.
class JsonReader {
 public:
  JsonReader(const nlohmann::json& object, std::string origin)
      : object_(object), origin_(std::move(origin)) {}

  bool has(const std::string& key) const { return find(key) != nullptr; }
  std::optional<std::int64_t> integer(const std::string& key) const;
  std::optional<double> number(const std::string& key) const;
  std::optional<bool> boolean(const std::string& key) const;
  std::optional<std::string> string(const std::string& key) const;
  /// The value itself, or nullptr where it is absent or null.
  const nlohmann::json* find(const std::string& key) const;
  const std::string& origin() const { return origin_; }
  [[noreturn]] void fail_type(const std::string& key, const char* expected) const;

 private:
  const nlohmann::json& object_;
  std::string origin_;
};

}  // namespace cleave
