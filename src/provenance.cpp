#include "provenance.h"

#include <limits>

#include "fail.h"
#include "json.h"
#include "mapped_file.h"

namespace cleave {
namespace {

constexpr std::int64_t kFormatVersion = 1;

nlohmann::json spec_object(const Provenance& provenance) {
  if (provenance.spec_json.empty()) return nlohmann::json::object();
  try {
    return parse_json_object(provenance.spec_json, "spec_json");
  } catch (const FileError& error) {  // it is the caller's argument, not a file
    throw InvalidArgument(std::string("provenance: ") + error.what());
  }
}

template <typename T>
T need(std::optional<T> value, const JsonReader& json, const char* key) {
  if (!value) fail_file("{}: key '{}' is missing", json.origin(), key);
  return *std::move(value);
}

GateMode read_gate(const JsonReader& json) {
  const std::string name = need(json.string("gate"), json, "gate");
  for (const auto mode : {GateMode::kSoftmax, GateMode::kHard})
    if (name == gate_mode_name(mode)) return mode;
  json.fail_type("gate", "softmax or hard");
}

std::uint64_t read_seed(const JsonReader& json) {
  const nlohmann::json* seed = json.find("seed");
  if (seed == nullptr) fail_file("{}: key 'seed' is missing", json.origin());
  if (!seed->is_number_unsigned()) json.fail_type("seed", "a number that is not negative");
  return seed->get<std::uint64_t>();
}

std::vector<std::vector<std::int32_t>> read_neurons(const JsonReader& json, const char* key) {
  const nlohmann::json* layers = json.find(key);
  if (layers == nullptr) return {};
  if (!layers->is_array()) json.fail_type(key, "a list of lists of neurons");
  std::vector<std::vector<std::int32_t>> order;
  for (const auto& layer : *layers) {
    if (!layer.is_array()) json.fail_type(key, "a list of lists of neurons");
    order.emplace_back();
    for (const auto& neuron : layer) {
      const bool is_neuron =
          neuron.is_number_unsigned() && neuron <= std::numeric_limits<std::int32_t>::max();
      if (!is_neuron && neuron != ExpertBank::kPadding)
        json.fail_type(key, "a list of lists of neurons");
      order.back().push_back(neuron.get<std::int32_t>());
    }
  }
  return order;
}

/// One key a line, one layer a line: a diff of two files stays readable.
std::string key_per_line(const nlohmann::ordered_json& object) {
  std::string text = "{\n";
  for (const auto& [key, value] : object.items())
    text += fmt::format("  {}: {},\n", nlohmann::json(key).dump(), value.dump());
  return text;
}

std::string neurons_text(const char* key, const std::vector<std::vector<std::int32_t>>& layers) {
  std::string text = fmt::format("  \"{}\": [", key);
  for (std::size_t l = 0; l < layers.size(); ++l)
    text += fmt::format("{}\n    [{}]", l == 0 ? "" : ",", fmt::join(layers[l], ","));
  return text + (layers.empty() ? "]" : "\n  ]");
}

}  // namespace

std::string provenance_json(const Provenance& p) {
  nlohmann::ordered_json object = {
      {"format_version", kFormatVersion},
      {"tool_version", p.tool_version},
      {"source", p.source},
      {"source_sha256", p.source_sha256},
      {"num_experts", p.num_experts},
      {"experts_per_token", p.experts_per_token},
      {"partition", p.partition},
      {"seed", p.seed},
      {"gate", gate_mode_name(p.gate)},
      {"folded_scale", p.folded_scale},
      {"router_epsilon", p.router_epsilon},
      {"router", p.router},
      {"spec", spec_object(p)},
  };
  std::string shared;
  if (p.shared_width > 0) {
    object["shared_experts"] = p.shared_experts;
    object["shared_width"] = p.shared_width;
    shared = neurons_text("shared_neurons", p.shared_neurons) + ",\n";
  }
  return key_per_line(object) + shared + neurons_text("neuron_order", p.neuron_order) + "\n}\n";
}

std::optional<Provenance> read_provenance(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / "cleave.json";
  if (!std::filesystem::exists(file)) return std::nullopt;
  const nlohmann::json object = parse_json_object(read_text_file(file), file.string());
  const JsonReader json(object, file.string());
  const auto version = need(json.integer("format_version"), json, "format_version");
  if (version != kFormatVersion)
    fail_file("{}: is of format version {}; this cleave reads {}. Use a newer cleave",
              file.string(), version, kFormatVersion);
  Provenance p;
  p.tool_version = need(json.string("tool_version"), json, "tool_version");
  p.source = need(json.string("source"), json, "source");
  p.source_sha256 = need(json.string("source_sha256"), json, "source_sha256");
  p.num_experts = need(json.integer("num_experts"), json, "num_experts");
  p.experts_per_token = need(json.integer("experts_per_token"), json, "experts_per_token");
  p.partition = need(json.string("partition"), json, "partition");
  p.seed = read_seed(json);
  p.gate = read_gate(json);
  p.folded_scale = need(json.number("folded_scale"), json, "folded_scale");
  p.router_epsilon = need(json.number("router_epsilon"), json, "router_epsilon");
  p.router = need(json.string("router"), json, "router");
  const nlohmann::json* spec = json.find("spec");
  p.spec_json = spec == nullptr ? "{}" : spec->dump();
  p.neuron_order = read_neurons(json, "neuron_order");
  p.shared_experts = json.integer("shared_experts").value_or(0);
  p.shared_width = json.integer("shared_width").value_or(0);
  p.shared_neurons = read_neurons(json, "shared_neurons");
  return p;
}

}  // namespace cleave
