#include <algorithm>
#include <utility>

#include "cleave/export.h"
#include "export_directory.h"
#include "export_moe.h"
#include "fail.h"
#include "target_config.h"

// A dense Llama whose FFNs are other ones than the source's: what pruning without routing leaves.

namespace cleave {
namespace {

constexpr const char* kWriteLlama = "write_llama_dense";

void check_ffn(const DenseFfn& ffn, const DenseFfn& first, const ModelConfig& source,
               std::size_t index) {
  const std::int64_t H = ffn.hidden, D = source.hidden_size;
  if (H < 1 || H != first.hidden || ffn.activation != first.activation)
    fail_argument(
        "{}: layer {} has {} neurons and activation {}, layer 0 {} and {}; Llama has one choice "
        "for all layers, of at least one neuron",
        kWriteLlama, index, H, activation_name(ffn.activation), first.hidden,
        activation_name(first.activation));
  if (ffn.d_model != D)
    fail_argument("{}: layer {} is of width D = {}, the model of {}", kWriteLlama, index,
                  ffn.d_model, D);
  const auto expect = [&](const char* name, const std::vector<float>& values, std::int64_t size,
                          bool may_lack) {
    if (may_lack && values.empty()) return;
    if (static_cast<std::int64_t>(values.size()) != size)
      fail_argument("{}: layer {}: {} has {} values; expected {}", kWriteLlama, index, name,
                    values.size(), size);
  };
  expect("gate", ffn.gate, H * D, false);
  expect("up", ffn.up, H * D, false);
  expect("down", ffn.down, D * H, false);
  expect("gate_bias", ffn.gate_bias, H, true);
  expect("up_bias", ffn.up_bias, H, true);
  expect("down_bias", ffn.down_bias, D, true);
}

bool has_bias(const DenseFfn& ffn) {
  return !ffn.gate_bias.empty() || !ffn.up_bias.empty() || !ffn.down_bias.empty();
}

/// `biases`: Llama has all of them or none; what the FFN lacks is zero.
void add_dense_layer(const DenseFfn& ffn, bool biases, std::int64_t index,
                     std::vector<NamedTensor>& out) {
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  const std::string prefix = fmt::format("model.layers.{}.mlp.", index);
  const auto add = [&](const char* name, std::vector<std::int64_t> shape,
                       const std::vector<float>& values) {
    out.push_back({prefix + name, std::move(shape), [&values] { return values; }});
  };
  const auto add_bias = [&](const char* name, std::int64_t size, const std::vector<float>& values) {
    out.push_back({prefix + name, {size}, [&values, size] {
                     return values.empty() ? std::vector<float>(static_cast<std::size_t>(size))
                                           : values;
                   }});
  };
  add("gate_proj.weight", {H, D}, ffn.gate);
  add("up_proj.weight", {H, D}, ffn.up);
  add("down_proj.weight", {D, H}, ffn.down);
  if (!biases) return;
  add_bias("gate_proj.bias", H, ffn.gate_bias);
  add_bias("up_proj.bias", H, ffn.up_bias);
  add_bias("down_proj.bias", D, ffn.down_bias);
}

DType dense_write_dtype(const ModelConfig& source, std::span<const DenseFfn> ffns) {
  const DType dtype = default_write_dtype(source, 1.0);
  for (const DenseFfn& ffn : ffns)
    for (const auto* values :
         {&ffn.gate, &ffn.up, &ffn.down, &ffn.gate_bias, &ffn.up_bias, &ffn.down_bias})
      if (!holds_exactly(dtype, *values)) return DType::kF32;
  return dtype;
}

}  // namespace

void write_llama_dense(const std::filesystem::path& out, const Checkpoint& source,
                       std::span<const DenseFfn> ffns, const Provenance& provenance,
                       const WriteSpec& spec) {
  const ModelConfig& config = source.config();
  check_output(out, spec.overwrite);
  check_is_decoder(kWriteLlama, "Llama", config);
  check_no_sliding_window(kWriteLlama, "Llama", config);
  if (static_cast<std::int64_t>(ffns.size()) != config.num_layers)
    fail_argument("{}: {} FFNs given; the model has {} layers", kWriteLlama, ffns.size(),
                  config.num_layers);
  for (std::size_t l = 0; l < ffns.size(); ++l) check_ffn(ffns[l], ffns[0], config, l);

  const DType dtype = spec.dtype ? *spec.dtype : dense_write_dtype(config, ffns);
  ModelConfig target = llama_dense_config(config, ffns[0].hidden, dtype);
  target.activation = ffns[0].activation;
  target.mlp_bias = std::any_of(ffns.begin(), ffns.end(), has_bias);
  std::vector<NamedTensor> tensors = backbone_tensors(source, target);
  for (std::size_t l = 0; l < ffns.size(); ++l)
    add_dense_layer(ffns[l], target.mlp_bias, static_cast<std::int64_t>(l), tensors);
  write_model_directory(out, source, {kWriteLlama, target}, tensors, provenance, spec);
}

}  // namespace cleave
