#include "cleave/export.h"
#include "export_directory.h"
#include "export_moe.h"
#include "fail.h"
#include "target_config.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

constexpr MoeTarget kMixtralTensors{"mixtral_tensors", "Mixtral"};

void check_mixtral_source(const ModelConfig& source, const char* function) {
  check_is_decoder(function, "Mixtral", source);
  if (source.attention_bias || source.mlp_bias)
    fail_argument("{}: the model has {} biases, which Mixtral cannot hold", function,
                  source.attention_bias ? "attention" : "FFN");
}

void add_mixtral_layer(const MoeLayer& layer, std::int64_t index, std::vector<NamedTensor>& out) {
  const ExpertBank& bank = layer.experts;
  const std::int64_t D = bank.d_model;
  out.push_back({MixtralNames::router(index), {bank.num_experts(), D}, [&layer] {
                   return stored_router(layer);
                 }});
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    const std::int64_t begin = bank.begin[e];
    const std::int64_t width = bank.width(e);
    const auto rows_of = [begin, width, D](const std::vector<float>& matrix) {
      return [&matrix, begin, width, D] {
        std::vector<float> rows;
        append_rows(matrix, begin, width, D, rows);
        return rows;
      };
    };
    out.push_back({MixtralNames::gate(index, e), {width, D}, rows_of(bank.gate)});
    out.push_back({MixtralNames::up(index, e), {width, D}, rows_of(bank.up)});
    out.push_back({MixtralNames::down(index, e), {D, width}, [&layer, begin, width] {
                     std::vector<float> down;
                     append_down(layer.experts, begin, width,
                                 static_cast<float>(folded_scale(layer)), down);
                     return down;
                   }});
  }
}

}  // namespace

std::vector<NamedTensor> mixtral_tensors(const Checkpoint& source,
                                         std::span<const MoeLayer> layers) {
  const ModelConfig& config = source.config();
  check_mixtral_source(config, kMixtralTensors.function);
  check_moe_layers(kMixtralTensors, config, layers);
  for (std::size_t l = 0; l < layers.size(); ++l)
    if (layers[l].shared.rows() > 0)
      fail_argument(
          "mixtral_tensors: layer {} has shared experts, which Mixtral cannot hold; "
          "GraniteMoeShared can (granite_moe_shared_tensors)",
          l);
  const ExpertBank& bank = layers[0].experts;
  const MixtralShape shape{bank.num_experts(), layers[0].experts_per_token, bank.width(0)};
  std::vector<NamedTensor> tensors =
      backbone_tensors(source, mixtral_config(config, shape, DType::kF32));
  for (std::size_t l = 0; l < layers.size(); ++l)
    add_mixtral_layer(layers[l], static_cast<std::int64_t>(l), tensors);
  return tensors;
}

void write_mixtral(const fs::path& out, const Checkpoint& source, const MixtralShape& shape,
                   std::span<const NamedTensor> tensors, const Provenance& provenance,
                   const WriteSpec& spec) {
  check_output(out, spec.overwrite);
  check_mixtral_source(source.config(), "write_mixtral");
  check_experts_per_token("write_mixtral", shape.experts_per_token, shape.num_experts);
  const DType dtype =
      spec.dtype.value_or(default_write_dtype(source.config(), provenance.folded_scale));
  write_model_directory(out, source,
                        {"write_mixtral", mixtral_config(source.config(), shape, dtype)}, tensors,
                        provenance, spec);
}

}  // namespace cleave
