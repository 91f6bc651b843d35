#include "post_processor.h"

#include <fmt/format.h>

#include <limits>

#include "json_node.h"

namespace cleave {
namespace {

std::int32_t token_id(const JsonNode& node) {
  const std::int64_t id = node.as_integer();
  if (id < 0 || id > std::numeric_limits<std::int32_t>::max())
    node.fail(fmt::format("the token id is {}; expected a number of the vocabulary", id));
  return static_cast<std::int32_t>(id);
}

/// The id of ["[SEP]", 102].
std::int32_t id_of_pair(const JsonNode& node) {
  const std::vector<JsonNode> pair = node.elements();
  if (pair.size() != 2) node.fail("expected a token and its id");
  pair[0].as_string();
  return token_id(pair[1]);
}

std::vector<std::int32_t> ids_of(const JsonNode& declarations, const std::string& token) {
  std::vector<std::int32_t> ids;
  for (const JsonNode& id : declarations.at(token).at("ids").elements())
    ids.push_back(token_id(id));
  return ids;
}

}  // namespace

PostProcessor PostProcessor::from_json(const JsonNode& node) {
  PostProcessor processor;
  if (!node.is_null()) processor.add(node);
  return processor;
}

void PostProcessor::add(const JsonNode& node) {
  const std::string type = node.type();
  if (type == "ByteLevel") return;
  if (type == "Sequence") {
    for (const JsonNode& part : node.at("processors").elements()) add(part);
    return;
  }
  if (type == "BertProcessing") {
    before.insert(before.begin(), id_of_pair(node.at("cls")));
    after.push_back(id_of_pair(node.at("sep")));
    return;
  }
  if (type != "TemplateProcessing")
    node.fail(fmt::format(
        "post-processor \"{}\" is not supported; expected Sequence, TemplateProcessing, "
        "BertProcessing or ByteLevel",
        type));
  add_template(node);
}

void PostProcessor::add_template(const JsonNode& node) {
  // Processors of a sequence wrap what the ones before them made.
  std::vector<std::int32_t> left, right;
  bool has_text = false;
  for (const JsonNode& part : node.at("single").elements()) {
    if (part.has("SpecialToken")) {
      const std::string token = part.at("SpecialToken").at("id").as_string();
      const auto ids = ids_of(node.at("special_tokens"), token);
      auto& side = has_text ? right : left;
      side.insert(side.end(), ids.begin(), ids.end());
    } else if (!has_text && part.at("Sequence").at("id").as_string() == "A") {
      has_text = true;
    } else {
      part.fail("expected a SpecialToken, or Sequence A once");
    }
  }
  if (!has_text) node.fail("the template \"single\" lacks Sequence A");
  before.insert(before.begin(), left.begin(), left.end());
  after.insert(after.end(), right.begin(), right.end());
}

}  // namespace cleave
