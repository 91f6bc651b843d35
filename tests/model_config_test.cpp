#include "cleave/model_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "decoder_tensors.h"

namespace cleave {
namespace {

using nlohmann::json;

json llama() {
  return {{"model_type", "llama"},         {"vocab_size", 100},      {"hidden_size", 64},
          {"intermediate_size", 96},       {"num_hidden_layers", 2}, {"num_attention_heads", 8},
          {"num_key_value_heads", 4},      {"rms_norm_eps", 1e-5},   {"rope_theta", 5e5},
          {"max_position_embeddings", 256}};
}

ModelConfig parse(const json& config) { return parse_model_config(config.dump(), "config.json"); }

std::string error_of(const json& config) {
  try {
    parse(config);
  } catch (const FileError& error) {
    return error.what();
  }
  return "";
}

TEST(ModelConfig, ReadsALlama) {
  const ModelConfig c = parse(llama());
  EXPECT_EQ(c.family, Family::kLlama);
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.rope.theta, 5e5);
  EXPECT_EQ(c.rope.type, RopeConfig::Type::kDefault);
  EXPECT_FALSE(c.is_moe());
  EXPECT_FALSE(c.bos_token_id.has_value());
  EXPECT_TRUE(c.eos_token_ids.empty());
}

TEST(ModelConfig, BothSpellingsOfRopeMeanTheSame) {
  const json scaling = {{"rope_type", "llama3"},
                        {"factor", 32.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 4096}};
  json old_form = llama();
  old_form["rope_scaling"] = scaling;
  json new_form = llama();
  new_form.erase("rope_theta");
  new_form["rope_parameters"] = scaling;
  new_form["rope_parameters"]["rope_theta"] = 5e5;
  for (const json& form : {old_form, new_form}) {
    const RopeConfig rope = parse(form).rope;
    EXPECT_EQ(rope.type, RopeConfig::Type::kLlama3);
    EXPECT_EQ(rope.theta, 5e5);
    EXPECT_EQ(rope.factor, 32.0);
    EXPECT_EQ(rope.original_max_position_embeddings, 4096);
  }
  json legacy = llama();
  legacy["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  EXPECT_EQ(parse(legacy).rope.type, RopeConfig::Type::kLinear);
}

TEST(ModelConfig, FamiliesDifferInWhatTheyLeaveOut) {
  json mistral = llama();
  mistral["model_type"] = "mistral";
  EXPECT_EQ(parse(mistral).sliding_window, 4096);
  mistral["sliding_window"] = nullptr;
  EXPECT_EQ(parse(mistral).sliding_window, 0);
  json mixtral = llama();
  mixtral["model_type"] = "mixtral";
  mixtral.erase("rope_theta");
  const ModelConfig c = parse(mixtral);
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.experts_per_token, 2);
  EXPECT_EQ(c.rope.theta, 1e6);
}

TEST(ModelConfig, EndOfTextIsOneIdOrSeveral) {
  json config = llama();
  config["eos_token_id"] = 7;
  EXPECT_EQ(parse(config).eos_token_ids, std::vector<std::int32_t>{7});
  config["eos_token_id"] = {7, 9};
  EXPECT_EQ(parse(config).eos_token_ids, (std::vector<std::int32_t>{7, 9}));
}

TEST(ModelConfig, RefusalsNameTheKey) {
  const auto with = [](const char* key, const json& value) {
    json config = llama();
    config[key] = value;
    return error_of(config);
  };
  const auto expect = [](const std::string& error, const char* part) {
    EXPECT_NE(error.find(part), std::string::npos) << "gave: " << error;
    EXPECT_NE(error.find("config.json"), std::string::npos);
  };
  expect(with("model_type", "gpt2"), "'gpt2' is not supported; llama, mistral, mixtral");
  expect(with("architectures", {"LlamaForSequenceClassification"}), "architectures");
  expect(with("num_key_value_heads", 3), "num_key_value_heads 3");
  expect(with("num_attention_heads", 7), "num_attention_heads 7");
  expect(with("head_dim", 9), "head_dim is 9");
  expect(with("hidden_size", "64"), "'hidden_size'");
  expect(with("hidden_size", 0), "hidden_size is 0");
  expect(with("vocab_size", nullptr), "'vocab_size' is missing");
  expect(with("vocab_size", 1ull << 40), "vocab_size");
  expect(with("hidden_act", "mish"), "silu");
  expect(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 2}}), "yarn");
  expect(with("rope_scaling", {{"rope_type", "linear"}}), "'factor' is missing");
  expect(with("torch_dtype", "int8"), "torch_dtype");
  expect(with("quantization_config", {{"bits", 4}}), "quantised");
  expect(with("rms_norm_eps", 0), "rms_norm_eps");
  expect(with("eos_token_id", 100), "vocab_size is 100");
  EXPECT_THROW(parse_model_config("{", "config.json"), FileError);
  EXPECT_THROW(parse_model_config("[]", "config.json"), FileError);
}

json granite(double attention_multiplier = 0.35355339059327379) {  // 8^-0.5
  json config = llama();
  config["model_type"] = "granitemoeshared";
  config["intermediate_size"] = 12;
  config["num_local_experts"] = 4;
  config["num_experts_per_tok"] = 4;
  config["shared_intermediate_size"] = 48;
  config["attention_multiplier"] = attention_multiplier;
  return config;
}

TEST(ModelConfig, ReadsGranitesMixtures) {
  const ModelConfig shared = parse(granite());
  EXPECT_EQ(shared.family, Family::kGraniteMoeShared);
  EXPECT_EQ(shared.num_experts, 4);
  EXPECT_EQ(shared.shared_intermediate_size, 48);
  json plain = granite();
  plain["model_type"] = "granitemoe";
  EXPECT_EQ(parse(plain).family, Family::kGraniteMoe);
  EXPECT_EQ(parse(plain).shared_intermediate_size, 0);
}

TEST(ModelConfig, RefusesGraniteMultipliersByName) {
  const auto expect = [](const json& config, const char* part) {
    EXPECT_NE(error_of(config).find(part), std::string::npos) << "gave: " << error_of(config);
  };
  const auto with = [](const char* key, const json& value) {
    json config = granite();
    config[key] = value;
    return config;
  };
  EXPECT_EQ(error_of(granite()), "");
  EXPECT_EQ(error_of(granite(0.3535533)), "");  // written by hand, with fewer digits
  expect(granite(0.125), "attention_multiplier is 0.125; expected head_dim^-0.5 = 0.3535");
  json none = granite();
  none.erase("attention_multiplier");
  expect(none, "attention_multiplier is 1 by default");
  expect(with("embedding_multiplier", 12.0), "'embedding_multiplier' is 12.0; expected 1");
  expect(with("residual_multiplier", 0.22), "'residual_multiplier' is 0.22; expected 1");
  expect(with("logits_scaling", 6), "'logits_scaling' is 6; expected 1");
  expect(with("position_embedding_type", "nope"), "position_embedding_type");
  expect(with("shared_intermediate_size", -1), "shared_intermediate_size is -1");
  expect(with("shared_intermediate_size", nullptr), "'shared_intermediate_size' is missing");
  expect(with("num_experts_per_tok", 5), "num_experts_per_tok is 5");
}

TEST(ModelCost, SharedExpertsCountAsActive) {
  const ModelCost dense = model_cost(parse(llama()));
  const ModelCost all = model_cost(parse(granite()));
  const std::int64_t routers = 2 * 4 * 64;
  EXPECT_EQ(all.parameters, dense.parameters + routers);
  EXPECT_EQ(all.ffn_macs_per_token, dense.ffn_macs_per_token);
  EXPECT_EQ(all.whole_ffn_macs, dense.whole_ffn_macs);
  EXPECT_EQ(dense.whole_ffn_macs, dense.ffn_macs_per_token);
  json one = granite();
  one["num_experts_per_tok"] = 1;
  const ModelCost cost = model_cost(parse(one));
  EXPECT_EQ(cost.shared_macs_per_token, 2 * 3 * 64 * 48);
  EXPECT_EQ(cost.ffn_macs_per_token, 2 * 3 * 64 * (48 + 12));
  EXPECT_EQ(cost.whole_ffn_macs, all.whole_ffn_macs);
  EXPECT_EQ(all.active_parameters - cost.active_parameters, 2 * 3 * 64 * 3 * 12);
}

TEST(ModelCost, AllExpertsOnCostTheDenseModelAndTheRouters) {
  const ModelConfig dense = parse(llama());
  json moe_json = llama();
  moe_json["model_type"] = "mixtral";
  moe_json["intermediate_size"] = 12;
  moe_json["num_experts_per_tok"] = 8;
  const ModelConfig moe = parse(moe_json);
  const ModelCost a = model_cost(dense);
  const ModelCost b = model_cost(moe);
  const std::int64_t routers = 2 * 8 * 64;
  EXPECT_EQ(b.router_macs_per_token, routers);
  EXPECT_EQ(b.parameters, a.parameters + routers);
  EXPECT_EQ(b.macs_per_token, a.macs_per_token + routers);
  EXPECT_EQ(b.ffn_macs_per_token, a.ffn_macs_per_token);
  // By hand: attention 64*64*2 + 32*64*2, FFN 3*64*96, two norms; embedding, head, last norm.
  EXPECT_EQ(a.parameters, 2 * (12288 + 18432 + 128) + 2 * 6400 + 64);
  EXPECT_EQ(a.active_parameters, a.parameters - 6400);
}

json bert() {
  return {{"model_type", "bert"},     {"architectures", {"BertModel"}},
          {"vocab_size", 100},        {"hidden_size", 60},
          {"intermediate_size", 90},  {"num_hidden_layers", 2},
          {"num_attention_heads", 4}, {"hidden_act", "gelu"},
          {"layer_norm_eps", 1e-9},   {"max_position_embeddings", 32},
          {"type_vocab_size", 3}};
}

TEST(ModelConfig, ReadsABert) {
  const ModelConfig c = parse(bert());
  EXPECT_EQ(c.family, Family::kBert);
  EXPECT_FALSE(c.causal);
  EXPECT_FALSE(c.has_head);
  EXPECT_FALSE(c.gated_ffn);
  EXPECT_FALSE(c.rotary);
  EXPECT_TRUE(c.layer_norm);
  EXPECT_EQ(c.norm_place, NormPlace::kAfter);
  EXPECT_TRUE(c.attention_bias);
  EXPECT_TRUE(c.mlp_bias);
  EXPECT_EQ(c.rms_norm_eps, 1e-9);
  EXPECT_EQ(c.activation, Activation::kGelu);
  EXPECT_EQ(c.head_dim, 15);  // odd: nothing is rotated
  EXPECT_EQ(c.type_vocab_size, 3);
  json without = bert();
  without["architectures"] = {"BertForMaskedLM"};  // its encoder is read
  for (const char* key : {"layer_norm_eps", "hidden_act", "type_vocab_size"}) without.erase(key);
  const ModelConfig defaults = parse(without);
  EXPECT_EQ(defaults.rms_norm_eps, 1e-12);
  EXPECT_EQ(defaults.activation, Activation::kGelu);
  EXPECT_EQ(defaults.type_vocab_size, 2);
  without["hidden_act"] = "gelu_new";
  EXPECT_EQ(parse(without).activation, Activation::kGeluTanh);
  const ModelConfig decoder = parse(llama());
  EXPECT_TRUE(decoder.causal && decoder.has_head && decoder.gated_ffn && decoder.rotary);
  EXPECT_FALSE(decoder.layer_norm);
  EXPECT_EQ(decoder.norm_place, NormPlace::kBefore);
}

TEST(ModelConfig, RefusesBertsThatAreNoPlainEncoders) {
  const auto expect = [](const char* key, const json& value, const char* part) {
    json config = bert();
    config[key] = value;
    EXPECT_NE(error_of(config).find(part), std::string::npos) << key << ": " << error_of(config);
  };
  expect("position_embedding_type", "relative_key", "absolute");
  expect("is_decoder", true, "only encoders");
  expect("add_cross_attention", true, "only encoders");
  expect("layer_norm_eps", 0.0, "layer_norm_eps");
  expect("type_vocab_size", -1, "type_vocab_size");
  expect("hidden_act", "mish", "hidden_act");
  expect("num_attention_heads", 7, "hidden_size 60 is not a multiple");
  expect("num_key_value_heads", 2, "num_key_value_heads is 2; a BERT has as many");
  expect("head_dim", 30, "head_dim is 30; a BERT has hidden_size / num_attention_heads = 60 / 4");
}

TEST(ModelConfig, ReadsABertWithExperts) {
  json config = bert();
  config["model_type"] = "cleave_bert_moe";
  config["architectures"] = {"CleaveBertMoeModel"};
  EXPECT_NE(error_of(config).find("num_local_experts"), std::string::npos) << error_of(config);
  config["num_local_experts"] = 8;
  config["num_experts_per_tok"] = 3;
  EXPECT_EQ(parse(config).shared_intermediate_size, 0);
  config["shared_intermediate_size"] = 12;
  const ModelConfig c = parse(config);
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.experts_per_token, 3);
  EXPECT_EQ(c.shared_width(1), 12);
  config["shared_intermediate_size"] = {0, 7};
  EXPECT_EQ(parse(config).shared_intermediate_size, 7);
  EXPECT_EQ(parse(config).shared_width(0), 0);
  EXPECT_EQ(parse(config).shared_width(1), 7);
  config["shared_intermediate_size"] = {1, 2, 3};
  EXPECT_NE(error_of(config).find("names 3 layers; the model has 2"), std::string::npos);
  for (const json& bad : {json{1, -2}, json{1, "2"}, json{1, 1ull << 40}}) {
    config["shared_intermediate_size"] = bad;
    EXPECT_NE(error_of(config).find("a number of neurons"), std::string::npos) << bad;
  }
  config["shared_intermediate_size"] = 12;
  config["architectures"] = {"BertModel"};
  EXPECT_NE(error_of(config).find("CleaveBertMoeModel"), std::string::npos);
}

/// Elements of all tensors.
std::int64_t stored_elements(const ModelConfig& c) {
  std::int64_t sum = 0;
  for (const ExpectedTensor& tensor : decoder_tensors(c)) {
    std::int64_t count = 1;
    for (const std::int64_t extent : tensor.shape) count *= extent;
    sum += count;
  }
  return sum;
}

TEST(ModelConfig, ParametersAreTheElementsOfAllTensors) {
  json with_experts = bert();
  with_experts["model_type"] = "cleave_bert_moe";
  with_experts.erase("architectures");
  with_experts["num_local_experts"] = 8;
  with_experts["num_experts_per_tok"] = 3;
  with_experts["shared_intermediate_size"] = {5, 0};
  json biased = llama();
  biased["attention_bias"] = biased["mlp_bias"] = true;
  for (const json& config : {bert(), with_experts, llama(), biased})
    EXPECT_EQ(model_cost(parse(config)).parameters, stored_elements(parse(config))) << config;

  const ModelCost dense = model_cost(parse(bert()));  // D 60, H 90, 2 layers
  EXPECT_EQ(dense.ffn_macs_per_token, 2 * 2 * 60 * 90);
  EXPECT_EQ(dense.macs_per_token, 2 * (4 * 60 * 60 + 2 * 60 * 90));  // no head
  const ModelCost moe = model_cost(parse(with_experts));             // I 90
  EXPECT_EQ(moe.ffn_macs_per_token, 2 * 60 * (2 * 3 * 90 + 5));
  EXPECT_EQ(moe.whole_ffn_macs, 2 * 60 * (2 * 8 * 90 + 5));
  EXPECT_EQ(moe.router_macs_per_token, 2 * 8 * 60);
}

}  // namespace
}  // namespace cleave
