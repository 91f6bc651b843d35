#include <algorithm>
#include <iterator>
#include <utility>

#include "cleave/export.h"
#include "decoder_tensors.h"
#include "export_directory.h"
#include "export_moe.h"
#include "fail.h"
#include "moe_layer_check.h"
#include "target_config.h"

// BERT encoders: with experts, which cleave alone reads, and dense with other FFNs.

namespace cleave {
namespace {

namespace fs = std::filesystem;

constexpr MoeTarget kBertTensors{"bert_moe_tensors", "cleave_bert_moe", /*gated=*/false};
constexpr const char* kWriteMoe = "write_bert_moe";
constexpr const char* kWriteDense = "write_bert_dense";
constexpr const char* kPooler[] = {"pooler.dense.weight", "pooler.dense.bias"};

void check_bert_source(const char* function, const ModelConfig& source) {
  if (!is_bert(source.family))
    fail_argument("{}: the model is a {}; expected a BERT encoder", function,
                  family_name(source.family));
}

/// `values`, or zeros where there are none.
std::vector<float> or_zeros(const std::vector<float>& values, std::int64_t count) {
  return values.empty() ? std::vector<float>(static_cast<std::size_t>(count)) : values;
}

void add_shared(const ExpertBank& shared, std::int64_t index, std::vector<NamedTensor>& out) {
  const std::int64_t width = shared.rows(), D = shared.d_model;
  if (width == 0) return;
  out.push_back({BertMoeNames::shared_input(index), {width, D}, [&shared] { return shared.up; }});
  out.push_back({BertMoeNames::shared_input_bias(index), {width}, [&shared] {
                   return or_zeros(shared.up_bias, shared.rows());
                 }});
  out.push_back({BertMoeNames::shared_output(index), {D, width}, [&shared] {
                   return fused_down(shared, 1.0f);  // its weight is 1
                 }});
}

void add_layer(const MoeLayer& layer, std::int64_t index, std::vector<NamedTensor>& out) {
  const ExpertBank& bank = layer.experts;
  const std::int64_t E = bank.num_experts(), D = bank.d_model, I = bank.width(0);
  out.push_back({BertMoeNames::router(index), {E, D}, [&layer] { return stored_router(layer); }});
  out.push_back({BertMoeNames::input(index), {E, I, D}, [&bank] { return bank.up; }});
  out.push_back({BertMoeNames::input_bias(index), {E, I}, [&bank] {
                   return or_zeros(bank.up_bias, bank.rows());
                 }});
  out.push_back({BertMoeNames::output(index), {E, D, I}, [&layer] {
                   return fused_down(layer.experts, static_cast<float>(folded_scale(layer)));
                 }});
  out.push_back({BertMoeNames::output_bias(index), {D}, [&bank] {
                   return or_zeros(bank.down_bias, bank.d_model);
                 }});
  add_shared(layer.shared, index, out);
}

/// What a stock BertModel holds and neither pass of ours computes: it would be missed.
void add_pooler(const Checkpoint& source, std::vector<NamedTensor>& out) {
  const std::int64_t D = source.config().hidden_size;
  const std::vector<std::int64_t> shapes[] = {{D, D}, {D}};
  for (std::size_t i = 0; i < std::size(kPooler); ++i) {
    const char* name = kPooler[i];
    if (!source.contains(name)) continue;
    if (source.info(name).shape != shapes[i])
      fail_file("{}: tensor '{}' has shape {}; expected {}", source.path().string(), name,
                shape_text(source.info(name).shape), shape_text(shapes[i]));
    out.push_back({name, shapes[i], [&source, name] { return source.read(name); }});
  }
}

void check_ffn(const DenseFfn& ffn, const DenseFfn& first, const ModelConfig& source,
               std::size_t index) {
  const std::int64_t H = ffn.hidden, D = source.hidden_size;
  if (H < 1 || H != first.hidden || ffn.activation != first.activation || ffn.d_model != D)
    fail_argument(
        "{}: layer {} has {} neurons, activation {} and width D = {}; expected {}, {} and {} as in "
        "layer 0",
        kWriteDense, index, H, activation_name(ffn.activation), ffn.d_model,
        std::max<std::int64_t>(1, first.hidden), activation_name(first.activation), D);
  if (!ffn.gate.empty() || !ffn.gate_bias.empty())
    fail_argument("{}: layer {}: the FFN has a gate, which BERT cannot hold", kWriteDense, index);
  const auto expect = [&](const char* name, const std::vector<float>& values, std::int64_t size,
                          bool may_lack) {
    if (may_lack && values.empty()) return;
    if (static_cast<std::int64_t>(values.size()) != size)
      fail_argument("{}: layer {}: {} has {} values; expected {}", kWriteDense, index, name,
                    values.size(), size);
  };
  expect("up", ffn.up, H * D, false);
  expect("down", ffn.down, D * H, false);
  expect("up_bias", ffn.up_bias, H, true);
  expect("down_bias", ffn.down_bias, D, true);
}

void add_dense_layer(const DenseFfn& ffn, const LayerNames& names, std::vector<NamedTensor>& out) {
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  out.push_back({names.up + ".weight", {H, D}, [&ffn] { return ffn.up; }});
  out.push_back({names.up + ".bias", {H}, [&ffn] { return or_zeros(ffn.up_bias, ffn.hidden); }});
  out.push_back({names.down + ".weight", {D, H}, [&ffn] { return ffn.down; }});
  out.push_back(
      {names.down + ".bias", {D}, [&ffn] { return or_zeros(ffn.down_bias, ffn.d_model); }});
}

DType dense_write_dtype(const ModelConfig& source, std::span<const DenseFfn> ffns) {
  const DType dtype = default_write_dtype(source, 1.0);
  for (const DenseFfn& ffn : ffns)
    for (const auto* values : {&ffn.up, &ffn.down, &ffn.up_bias, &ffn.down_bias})
      if (!holds_exactly(dtype, *values)) return DType::kF32;
  return dtype;
}

}  // namespace

std::vector<NamedTensor> bert_moe_tensors(const Checkpoint& source,
                                          std::span<const MoeLayer> layers) {
  const ModelConfig& config = source.config();
  check_bert_source(kBertTensors.function, config);
  check_moe_layers(kBertTensors, config, layers);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    check_shared(kBertTensors.function, layers[l]);
    if (layers[l].shared.rows() > 0)
      check_bank(kBertTensors, config, layers[l].shared, "shared experts", l);
  }
  const ExpertBank& bank = layers[0].experts;
  const BertMoeShape shape{bank.num_experts(), layers[0].experts_per_token, bank.width(0),
                           shared_widths(layers)};
  std::vector<NamedTensor> tensors =
      backbone_tensors(source, bert_moe_config(config, shape, DType::kF32));
  for (std::size_t l = 0; l < layers.size(); ++l)
    add_layer(layers[l], static_cast<std::int64_t>(l), tensors);
  add_pooler(source, tensors);
  return tensors;
}

void write_bert_moe(const fs::path& out, const Checkpoint& source, const BertMoeShape& shape,
                    std::span<const NamedTensor> tensors, const Provenance& provenance,
                    const WriteSpec& spec) {
  const ModelConfig& config = source.config();
  check_output(out, spec.overwrite);
  check_bert_source(kWriteMoe, config);
  check_experts_per_token(kWriteMoe, shape.experts_per_token, shape.num_experts);
  const auto layers = static_cast<std::int64_t>(shape.shared_widths.size());
  if (layers != 0 && layers != config.num_layers)
    fail_argument("{}: shared widths of {} layers; the model has {}", kWriteMoe, layers,
                  config.num_layers);
  for (const std::int64_t width : shape.shared_widths)
    if (width < 0) fail_argument("{}: {} shared neurons; expected 0 or more", kWriteMoe, width);
  const DType dtype = spec.dtype.value_or(default_write_dtype(config, provenance.folded_scale));
  write_model_directory(
      out, source,
      {kWriteMoe, bert_moe_config(config, shape, dtype), {std::begin(kPooler), std::end(kPooler)}},
      tensors, provenance, spec);
}

void write_bert_dense(const fs::path& out, const Checkpoint& source, std::span<const DenseFfn> ffns,
                      const Provenance& provenance, const WriteSpec& spec) {
  const ModelConfig& config = source.config();
  check_output(out, spec.overwrite);
  check_bert_source(kWriteDense, config);
  if (static_cast<std::int64_t>(ffns.size()) != config.num_layers)
    fail_argument("{}: {} FFNs given; the model has {} layers", kWriteDense, ffns.size(),
                  config.num_layers);
  for (std::size_t l = 0; l < ffns.size(); ++l) check_ffn(ffns[l], ffns[0], config, l);
  const DType dtype = spec.dtype ? *spec.dtype : dense_write_dtype(config, ffns);
  ModelConfig target = bert_dense_config(config, ffns[0].hidden, dtype);
  target.activation = ffns[0].activation;
  std::vector<NamedTensor> tensors = backbone_tensors(source, target);
  for (std::size_t l = 0; l < ffns.size(); ++l)
    add_dense_layer(ffns[l], LayerNames(target, static_cast<std::int64_t>(l)), tensors);
  add_pooler(source, tensors);
  write_model_directory(out, source,
                        {kWriteDense, target, {std::begin(kPooler), std::end(kPooler)}}, tensors,
                        provenance, spec);
}

}  // namespace cleave
