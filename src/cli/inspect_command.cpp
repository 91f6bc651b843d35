#include <fmt/format.h>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct InspectOptions {
  CommonOptions common;
  std::string model;
};

/// Weights read per token when `rho` of the FFN runs, as a speed-up over dense: what decoding one
/// token at a time can gain at most, since it is bound by the bytes it reads. Encoders have all
/// tokens at once: of them it is the multiply-adds that count.
double ceiling(const ModelConfig& c, const ModelCost& cost, double dense_ffn, double rho) {
  const auto active = static_cast<double>(c.causal ? cost.active_parameters : cost.macs_per_token);
  const double others = active - static_cast<double>(cost.ffn_macs_per_token);
  return (others + dense_ffn) / (others + rho * dense_ffn);
}

Json export_targets(const ModelConfig& c) {
  Json targets = Json::array();
  if (is_bert(c.family)) return Json::array({family_name(Family::kBertMoe)});
  if (c.mlp_bias || c.activation != Activation::kSilu)
    return targets;  // stock experts have no biases, and engines hard-code SiLU
  if (!c.attention_bias) targets.push_back("mixtral");
  const bool slides = c.sliding_window > 0 && c.sliding_window < c.max_position_embeddings;
  if (c.head_dim * c.num_heads == c.hidden_size && !slides) targets.push_back("granitemoeshared");
  return targets;
}

Json rope_json(const RopeConfig& rope) {
  Json json{{"theta", rope.theta}};
  if (rope.type == RopeConfig::Type::kDefault) return json;
  json["type"] = rope.type == RopeConfig::Type::kLinear ? "linear" : "llama3";
  json["factor"] = rope.factor;
  return json;
}

Json to_json(const InspectOptions& options, const Checkpoint& checkpoint) {
  const ModelConfig& c = checkpoint.config();
  const ModelCost cost = model_cost(c);
  const auto ffn = static_cast<double>(cost.whole_ffn_macs);
  Json json{{"model", options.model},
            {"format", checkpoint.format() == Checkpoint::Format::kGguf ? "gguf" : "safetensors"},
            {"family", family_name(c.family)},
            {"layers", c.num_layers},
            {"hidden_size", c.hidden_size},
            {"intermediate_size", c.intermediate_size},
            {"heads", c.num_heads},
            {"kv_heads", c.num_kv_heads},
            {"head_dim", c.head_dim},
            {"vocab_size", c.vocab_size},
            {"max_position_embeddings", c.max_position_embeddings},
            {"rope", c.rotary ? rope_json(c.rope) : Json(nullptr)},
            {"causal", c.causal},
            {"has_head", c.has_head},
            {"activation", activation_name(c.activation)},
            {"tied_embeddings", c.tie_word_embeddings},
            {"dtype", dtype_name(c.dtype)},
            {"tensors", checkpoint.tensors().size()},
            {"parameters", cost.parameters},
            {"active_parameters", cost.active_parameters},
            {"macs_per_token", cost.macs_per_token},
            {"ffn_share",
             static_cast<double>(cost.ffn_parameters) / static_cast<double>(cost.parameters)},
            {"experts", c.num_experts},
            {"experts_per_token", c.experts_per_token},
            {"shared_intermediate_size", c.shared_intermediate_size},
            {"shared_widths", c.shared_widths},
            {"export_targets", export_targets(c)}};
  if (!c.shared_widths.empty() && !is_bert(c.family)) {
    ModelConfig stock = c;
    stock.shared_widths.clear();
    json["stock_macs_per_token"] = model_cost(stock).macs_per_token;
  }
  Json ceilings = Json::object();
  for (const char* rho : {"0.25", "0.50", "0.75"})
    ceilings[rho] = ceiling(c, cost, ffn, std::stod(rho));
  json["speedup_ceiling"] = ceilings;
  if (const auto made = read_provenance(checkpoint.directory());
      made && checkpoint.format() == Checkpoint::Format::kSafetensors) {
    json["made_by"] = {{"tool_version", made->tool_version},
                       {"source", made->source},
                       {"source_sha256", made->source_sha256},
                       {"partition", made->partition},
                       {"router", made->router},
                       {"gate", gate_mode_name(made->gate)},
                       {"seed", made->seed}};
  }
  return json;
}

std::string to_text(const Json& j, const ModelConfig& config) {
  std::string text = fmt::format(
      "{}: {} ({}, {})\n"
      "  layers {}, D {}, {} {}, heads {} / {} kv of {}, vocabulary {}{}\n"
      "  parameters {}, FFN {:.1f} % of them; {} multiply-adds a token\n",
      j["model"].get<std::string>(), j["family"].get<std::string>(), j["format"].get<std::string>(),
      j["dtype"].get<std::string>(), j["layers"].get<std::int64_t>(),
      j["hidden_size"].get<std::int64_t>(), j["experts"] == 0 ? "H" : "I",
      j["intermediate_size"].get<std::int64_t>(), j["heads"].get<std::int64_t>(),
      j["kv_heads"].get<std::int64_t>(), j["head_dim"].get<std::int64_t>(),
      j["vocab_size"].get<std::int64_t>(), j["tied_embeddings"].get<bool>() ? " (tied)" : "",
      human_count(j["parameters"].get<double>()), 100.0 * j["ffn_share"].get<double>(),
      human_count(j["macs_per_token"].get<double>()));
  if (j["experts"] != 0)
    text += fmt::format("  experts {}, {} active per token{}; {} parameters active\n",
                        j["experts"].get<int>(), j["experts_per_token"].get<int>(),
                        j["shared_intermediate_size"] == 0
                            ? ""
                            : fmt::format(", {} shared neurons always", shared_text(config)),
                        human_count(j["active_parameters"].get<double>()));
  if (j.contains("stock_macs_per_token"))
    text += fmt::format(
        "  shared slices are padded to {} neurons; a stock loader computes that too: {} "
        "multiply-adds a token\n",
        config.shared_intermediate_size, human_count(j["stock_macs_per_token"].get<double>()));
  if (j.contains("made_by")) {
    const Json& m = j["made_by"];
    text += fmt::format("  made by cleave {} from {}: partition {}",
                        m["tool_version"].get<std::string>(), m["source"].get<std::string>(),
                        m["partition"].get<std::string>());
    if (j["experts"] != 0)
      text += fmt::format(", router {}, gate {}", m["router"].get<std::string>(),
                          m["gate"].get<std::string>());
    text += fmt::format(", seed {}\n", m["seed"].get<std::uint64_t>());
  }
  text += "  can be written as:";
  for (const Json& target : j["export_targets"]) text += " " + target.get<std::string>();
  if (is_bert(config.family))
    text += " (opens in cleave; no stock class holds an encoder with experts)\n";
  else
    text += j["export_targets"].empty()
                ? " nothing yet (biases, or an activation that stock MoE classes lack)\n"
                : " (opens in Transformers, vLLM; llama.cpp after its own conversion)\n";
  text += fmt::format("  {}speed-up at most, by active share of the FFN:",
                      config.causal ? "decode " : "");
  for (const auto& [rho, value] : j["speedup_ceiling"].items())
    text += fmt::format("  {} {:.2f}x", rho, value.get<double>());
  return text + "\n";
}

void run_inspect(const InspectOptions& options) {
  const Checkpoint checkpoint = Checkpoint::open(options.model);
  const Json json = to_json(options, checkpoint);
  print_result(options.common, json, options.common.json ? "" : to_text(json, checkpoint.config()));
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command = app.add_subcommand(
      "inspect", "Family, shapes, what it can become, and how much faster at most");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_flag("--json", options->common.json,
                    "Print one JSON object on stdout and nothing else there");
  command->callback([options] { run_inspect(*options); });
}

}  // namespace cleave::cli
