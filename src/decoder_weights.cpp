#include "decoder_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <string>

#include "cleave/error.h"
#include "cleave/export.h"
#include "decoder_tensors.h"
#include "packed_cache.h"
#include "support/weight_memory.h"

namespace cleave {

DecoderPacker::DecoderPacker(const Checkpoint& checkpoint, WeightType type,
                             const ParallelFor& parallel)
    : source_(checkpoint), c_(checkpoint.config()), names_(c_), type_(type), parallel_(parallel) {
  check_decoder_tensors(c_, source_.tensors(), source_.path().string());
}

DecoderWeights DecoderPacker::all() const {
  DecoderWeights weights;
  weights.embedding = embedding();
  weights.positions = positions();
  for (std::int64_t l = 0; l < c_.num_layers; ++l) weights.layers.push_back(layer(l));
  weights.final_norm = final_norm();
  if (c_.has_head) weights.head = c_.tie_word_embeddings ? weights.embedding : head();
  trim_weights();
  return weights;
}

std::vector<float> DecoderPacker::floats(const std::string& name) const {
  std::vector<float> values = source_.read(name);
  source_.release(name);
  return values;
}

NormWeights DecoderPacker::norm(const std::string& name) const {
  return {floats(name + ".weight"), c_.layer_norm ? floats(name + ".bias") : std::vector<float>()};
}

std::vector<float> DecoderPacker::positions() const {
  if (c_.rotary) return {};
  std::vector<float> rows = floats(names_.positions + ".weight");
  if (c_.type_vocab_size == 0) return rows;
  const std::int64_t D = c_.hidden_size;
  std::vector<float> type(static_cast<std::size_t>(D));
  source_.read_rows(names_.token_types + ".weight", 0, {type.data(), 1, D});
  for (std::int64_t p = 0; p < c_.max_position_embeddings; ++p)
    for (std::int64_t d = 0; d < D; ++d) rows[p * D + d] += type[d];
  return rows;
}

PackedLinear DecoderPacker::linear(const std::string& name, WeightType type) const {
  const auto& shape = source_.info(name).shape;
  PackedLinear packed(
      shape[0], shape[1], type,
      [&](std::int64_t first, MatrixView<float> out) { source_.read_rows(name, first, out); },
      parallel_);
  source_.release(name);
  return packed;
}

/// Matrices of one input, on top of each other.
PackedLinear DecoderPacker::stacked(const std::vector<std::string>& names) const {
  std::vector<std::int64_t> begin{0};
  for (const std::string& name : names) begin.push_back(begin.back() + source_.info(name).shape[0]);
  const auto read = [&](std::int64_t first, MatrixView<float> out) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      const std::int64_t from = std::max(first, begin[i]);
      const std::int64_t to = std::min(first + out.rows, begin[i + 1]);
      if (from < to)
        source_.read_rows(names[i], from - begin[i], out.slice_rows(from - first, to - from));
    }
  };
  PackedLinear packed(begin.back(), c_.hidden_size, type_, read, parallel_);
  for (const std::string& name : names) source_.release(name);
  return packed;
}

LayerWeights DecoderPacker::layer(std::int64_t l) const {
  const LayerNames names(c_, l);
  LayerWeights w;
  w.input_norm = norm(names.input_norm);
  w.post_norm = norm(names.post_norm);
  // One matrix: q, k and v are products of the same input.
  std::vector<std::string> matrices;
  for (const std::string& name : {names.q, names.k, names.v}) {
    matrices.push_back(name + ".weight");
    if (c_.attention_bias) append(name + ".bias", w.qkv_bias);
  }
  w.qkv = stacked(matrices);
  w.output = linear(names.output + ".weight", type_);
  if (c_.attention_bias) w.output_bias = floats(names.output + ".bias");
  if (!c_.is_moe())
    w.ffn = c_.gated_ffn ? dense_ffn(names) : dense_ffn_without_gate(names);
  else if (!c_.gated_ffn)
    w.ffn = pack(bert_moe_layer(l), type_, parallel_);
  else
    w.ffn =
        pack(has_fused_experts(c_.family) ? fused_moe_layer(l) : moe_layer(l), type_, parallel_);
  release_all();
  return w;
}

// With a page that is touched, a system maps some of its neighbours: after some layers, megabytes
// of tensors that were given back before.
void DecoderPacker::release_all() const {
  for (const TensorInfo& tensor : source_.tensors()) source_.release(tensor.name);
}

PackedExperts DecoderPacker::dense_ffn(const LayerNames& names) const {
  const auto bias = [&](const std::string& name) {
    return c_.mlp_bias ? floats(name + ".bias") : std::vector<float>();
  };
  const std::string gate = names.gate + ".weight", up = names.up + ".weight";
  const std::vector<float> down = floats(names.down + ".weight");
  const std::vector<float> gate_bias = bias(names.gate), up_bias = bias(names.up);
  const std::vector<float> down_bias = bias(names.down);
  FfnRows rows;
  rows.gate = [&](std::int64_t first, MatrixView<float> out) {
    source_.read_rows(gate, first, out);
  };
  rows.up = [&](std::int64_t first, MatrixView<float> out) { source_.read_rows(up, first, out); };
  rows.down = {down.data(), c_.hidden_size, c_.intermediate_size};
  rows.gate_bias = gate_bias;
  rows.up_bias = up_bias;
  rows.down_bias = down_bias;
  rows.activation = c_.activation;
  PackedExperts packed(rows, type_, parallel_);
  source_.release(gate);
  source_.release(up);
  return packed;
}

PackedExperts DecoderPacker::dense_ffn_without_gate(const LayerNames& names) const {
  const auto bias = [&](const std::string& name) {
    return c_.mlp_bias ? floats(name + ".bias") : std::vector<float>();
  };
  const std::int64_t H = c_.intermediate_size, D = c_.hidden_size;
  const std::vector<float> up = floats(names.up + ".weight"), down = floats(names.down + ".weight");
  const std::vector<float> up_bias = bias(names.up), down_bias = bias(names.down);
  FfnView ffn;
  ffn.up = {up.data(), H, D};
  ffn.down = {down.data(), D, H};
  ffn.up_bias = up_bias;
  ffn.down_bias = down_bias;
  ffn.activation = c_.activation;
  return PackedExperts(ffn, type_, parallel_);
}

namespace {

/// A bank of E experts of I neurons, matrices still to be filled. The checkpoint does not tell
/// which dense neuron a row came from (cleave.json may): the order of its own rows is the dense
/// order of what it says.
ExpertBank empty_bank(std::int64_t E, std::int64_t I, std::int64_t D, Activation activation) {
  ExpertBank bank;
  bank.d_model = D;
  bank.dense_hidden = E * I;
  bank.activation = activation;
  bank.neuron_order.resize(E * I);
  std::iota(bank.neuron_order.begin(), bank.neuron_order.end(), 0);
  for (std::int64_t e = 0; e <= E; ++e) bank.begin.push_back(e * I);
  bank.down_t.resize(E * I * D);
  return bank;
}

/// The first `kept` columns of [D, I] of a checkpoint to rows [kept, D].
void transpose_down(const float* down, std::int64_t D, std::int64_t I, std::int64_t kept,
                    float* rows) {
  for (std::int64_t c = 0; c < D; ++c)
    for (std::int64_t j = 0; j < kept; ++j) rows[j * D + c] = down[c * I + j];
}

}  // namespace

MoeLayer DecoderPacker::moe_layer(std::int64_t l) const {
  const std::int64_t E = c_.num_experts, I = c_.intermediate_size, D = c_.hidden_size;
  MoeLayer layer;
  ExpertBank& bank = layer.experts;
  bank = empty_bank(E, I, D, c_.activation);
  for (std::int64_t e = 0; e < E; ++e) {
    append(MixtralNames::gate(l, e), bank.gate);
    append(MixtralNames::up(l, e), bank.up);
    const std::vector<float> down = floats(MixtralNames::down(l, e));
    transpose_down(down.data(), D, I, I, bank.down_t.data() + e * I * D);
  }
  layer.router = {E, D, floats(MixtralNames::router(l))};
  layer.experts_per_token = c_.experts_per_token;
  return layer;
}

MoeLayer DecoderPacker::fused_moe_layer(std::int64_t l) const {
  const std::int64_t E = c_.num_experts;
  MoeLayer layer;
  layer.experts =
      fused_bank(GraniteMoeNames::input(l), GraniteMoeNames::output(l), E, c_.intermediate_size);
  if (c_.shared_width(l) > 0)
    layer.shared = fused_bank(GraniteMoeNames::shared_input(l), GraniteMoeNames::shared_output(l),
                              1, c_.shared_width(l));
  layer.router = {E, c_.hidden_size, floats(GraniteMoeNames::router(l))};
  layer.experts_per_token = c_.experts_per_token;
  return layer;
}

MoeLayer DecoderPacker::bert_moe_layer(std::int64_t l) const {
  const std::int64_t D = c_.hidden_size;
  const auto bank = [&](std::int64_t E, std::int64_t I, const std::string& up,
                        const std::string& up_bias, const std::string& down_name) {
    ExpertBank made = empty_bank(E, I, D, c_.activation);
    made.up = floats(up);
    made.up_bias = floats(up_bias);
    const std::vector<float> down = floats(down_name);
    for (std::int64_t e = 0; e < E; ++e)
      transpose_down(down.data() + e * D * I, D, I, I, made.down_t.data() + e * I * D);
    return made;
  };
  MoeLayer layer;
  layer.experts = bank(c_.num_experts, c_.intermediate_size, BertMoeNames::input(l),
                       BertMoeNames::input_bias(l), BertMoeNames::output(l));
  layer.experts.down_bias = floats(BertMoeNames::output_bias(l));
  if (c_.shared_width(l) > 0)
    layer.shared = bank(1, c_.shared_width(l), BertMoeNames::shared_input(l),
                        BertMoeNames::shared_input_bias(l), BertMoeNames::shared_output(l));
  layer.router = {c_.num_experts, D, floats(BertMoeNames::router(l))};
  layer.experts_per_token = c_.experts_per_token;
  return layer;
}

/// Experts out of [E, 2I, D], gate rows before up rows, and [E, D, I]; without the first axis one.
/// Of each the first `width` of its I neurons: the others are padding.
ExpertBank DecoderPacker::fused_bank(const std::string& input, const std::string& output,
                                     std::int64_t num_experts, std::int64_t width) const {
  const std::int64_t D = c_.hidden_size, I = source_.info(output).shape.back();
  ExpertBank bank = empty_bank(num_experts, width, D, c_.activation);
  {
    const std::vector<float> gate_up = floats(input);
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const auto gate = gate_up.begin() + e * 2 * I * D, up = gate + I * D;
      bank.gate.insert(bank.gate.end(), gate, gate + width * D);
      bank.up.insert(bank.up.end(), up, up + width * D);
    }
  }
  const std::vector<float> down = floats(output);
  for (std::int64_t e = 0; e < num_experts; ++e)
    transpose_down(down.data() + e * D * I, D, I, width, bank.down_t.data() + e * width * D);
  return bank;
}

void DecoderPacker::append(const std::string& name, std::vector<float>& to) const {
  const std::size_t before = to.size();
  to.resize(before + source_.info(name).num_elements());
  source_.read(name, std::span(to).subspan(before));
  source_.release(name);
}

PackedMoe pack(const MoeLayer& layer, WeightType type, const ParallelFor& parallel) {
  return {PackedExperts(layer.experts, type, parallel),
          PackedLinear(layer.router.view(), router_weight_type(type), parallel),
          layer.experts_per_token,
          layer.gate,
          layer.scale,
          layer.shared.rows() > 0 ? PackedExperts(layer.shared, type, parallel) : PackedExperts()};
}

LoadedDecoder load_decoder(const Checkpoint& checkpoint, WeightType type, const CacheSpec& cache,
                           const std::function<void(const std::string&)>& notice,
                           const ParallelFor& parallel) {
  const auto tell = [&](const std::string& line) {
    if (notice) notice(line);
  };
  const DecoderPacker packer(checkpoint, type, parallel);
  if (cache.file.empty()) return {packer.all(), false};
  const std::string file = cache.file.string();
  std::error_code ignored;
  const bool exists = std::filesystem::exists(cache.file, ignored);
  if (exists) try {
      return {read_packed_cache(cache.file, checkpoint, type, parallel), true};
    } catch (const FileError& error) {
      tell(fmt::format("{}; {}", error.what(),
                       cache.write ? "it is made again" : "the model is packed without it"));
    }
  if (!cache.write) return {packer.all(), false};
  try {
    write_packed_cache(cache.file, checkpoint, type, packer);
    tell(fmt::format("{}: holds the packed weights now", file));
    return {read_packed_cache(cache.file, checkpoint, type, parallel), true};
  } catch (const FileError& error) {
    tell(fmt::format("{}; the packed weights stay in memory", error.what()));
  }
  return {packer.all(), false};
}

}  // namespace cleave
