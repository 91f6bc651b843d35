#include "json.h"

#include <set>
#include <vector>

#include "fail.h"

namespace cleave {

nlohmann::json parse_json_object(std::string_view text, const std::string& origin) {
  using Event = nlohmann::json::parse_event_t;
  // nlohmann keeps the last of two equal keys; for a file that describes memory that is an attack
  // or a defect, so the keys of every open object are remembered.
  std::vector<std::set<std::string>> open_objects;
  const auto watch = [&](int, Event event, nlohmann::json& parsed) {
    if (event == Event::object_start) open_objects.emplace_back();
    if (event == Event::object_end) open_objects.pop_back();
    if (event == Event::key && !open_objects.back().insert(parsed.get<std::string>()).second)
      fail_file("{}: key '{}' occurs twice in one object", origin, parsed.get<std::string>());
    return true;
  };
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& error) {
    // Its text starts with "[json.exception.parse_error.101] "; the reader of ours needs no number.
    const std::string what = error.what();
    const auto end_of_tag = what.find("] ");
    fail_file("{}: is not valid JSON: {}", origin,
              end_of_tag == std::string::npos ? what : what.substr(end_of_tag + 2));
  }
  if (!value.is_object())
    fail_file("{}: holds a JSON {}; expected an object", origin, value.type_name());
  return value;
}

const nlohmann::json* JsonReader::find(const std::string& key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void JsonReader::fail_type(const std::string& key, const char* expected) const {
  std::string shown = find(key)->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
  fail_file("{}: key '{}' is {}; expected {}", origin_, key, shown, expected);
}

std::optional<std::int64_t> JsonReader::integer(const std::string& key) const {
  const nlohmann::json* value = find(key);
  if (value == nullptr) return std::nullopt;
  const bool too_large = value->is_number_unsigned() &&
                         value->get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max();
  if (!value->is_number_integer() || too_large) fail_type(key, "an integer");
  return value->get<std::int64_t>();
}

std::optional<double> JsonReader::number(const std::string& key) const {
  const nlohmann::json* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) fail_type(key, "a number");
  return value->get<double>();
}

std::optional<bool> JsonReader::boolean(const std::string& key) const {
  const nlohmann::json* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) fail_type(key, "true or false");
  return value->get<bool>();
}

std::optional<std::string> JsonReader::string(const std::string& key) const {
  const nlohmann::json* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) fail_type(key, "a string");
  return value->get<std::string>();
}

}  // namespace cleave
