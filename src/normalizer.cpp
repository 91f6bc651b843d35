#include "normalizer.h"

#include <fmt/format.h>

#include "json_node.h"
#include "nfc.h"
#include "pattern.h"

namespace cleave {

Normalizer Normalizer::from_json(const JsonNode& node) {
  Normalizer normalizer;
  if (!node.is_null()) normalizer.add(node);
  return normalizer;
}

void Normalizer::add(const JsonNode& node) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const JsonNode& part : node.at("normalizers").elements()) add(part);
  } else if (type == "Prepend") {
    steps_.push_back([prefix = node.at("prepend").as_string()](std::string text) {
      return text.empty() ? text : prefix + text;
    });
  } else if (type == "Replace") {
    steps_.push_back([pattern = Pattern::from_json(node.at("pattern")),
                      content = node.at("content").as_string()](const std::string& text) {
      return pattern.replace(text, content);
    });
  } else if (type == "NFC") {
    steps_.push_back([](const std::string& text) { return normalize_nfc(text); });
  } else {
    node.fail(fmt::format(
        "normalizer \"{}\" is not supported; expected Sequence, Prepend, Replace or NFC", type));
  }
}

std::string Normalizer::apply(std::string text) const {
  for (const Step& step : steps_) text = step(std::move(text));
  return text;
}

}  // namespace cleave
