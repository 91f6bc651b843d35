#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "stored_rows.h"
#include "support/weight_memory.h"

namespace cleave {
namespace {

/// What an expert is packed from.
struct Source {
  StoredRows gate, up;          // [neurons, D]
  StoredRows down;              // [D, neurons], or [neurons, D]
  bool down_transposed = true;  // [neurons, D]
  std::span<const float> gate_bias, up_bias;
  const ReadRows* read_gate = nullptr;  // in place of gate and up
  const ReadRows* read_up = nullptr;
  float down_at(std::int64_t neuron, std::int64_t output) const {
    return down_transposed ? down.at(neuron, output) : down.at(output, neuron);
  }
};

/// Writes expert panels.
class PanelWriter {
 public:
  PanelWriter(WeightType type, bool gated, std::int64_t d_model)
      : layout_(type, gated, d_model), d_model_(d_model) {}

  /// Panel `index` of the `panels` of an expert: `count` neurons, the first of which is `begin`.
  void write(const Source& source, std::int64_t begin, std::int64_t count, std::int64_t panels,
             std::int64_t index, std::byte* expert) {
    write_gate_up(source, begin, count, expert + layout_.scales_at(index),
                  expert + layout_.gate_up_at(panels, index));
    write_down(source, begin, count, expert + layout_.down_scales_at(index),
               expert + layout_.down_at(panels, index, 0), layout_.down_stride(panels));
  }

 private:
  void write_gate_up(const Source& source, std::int64_t begin, std::int64_t count,
                     std::byte* scales_to, std::byte* panel) {
    weights_.assign(static_cast<std::size_t>(d_model_ * kPanelWidth), 0.0f);
    if (source.read_up != nullptr) {
      read_to_lanes("gate", *source.read_gate, begin, count, 0);
      read_to_lanes("up", *source.read_up, begin, count, kPanelWidth / 2);
    } else if (!source.gate.empty()) {
      rows_to_lanes(source.gate, begin, count, 0, weights_);
      rows_to_lanes(source.up, begin, count, kPanelWidth / 2, weights_);
    } else {
      rows_to_lanes(source.up, begin, count, 0, weights_);
    }
    float scales[kMaxScales] = {};
    widen_scales(layout_.format, weights_, scales);
    std::memcpy(scales_to, scales, layout_.scale_bytes);
    encode_panel(layout_.format, weights_, scales, panel);
  }

  void read_to_lanes(const char* name, const ReadRows& read, std::int64_t begin, std::int64_t count,
                     std::int64_t lane) {
    rows_.resize(static_cast<std::size_t>(count * d_model_));
    const MatrixView<float> rows(rows_.data(), count, d_model_);
    read(begin, rows);
    check_weights(name, MatrixView<const float>(rows), begin);
    rows_to_lanes(MatrixView<const float>(rows), 0, count, lane, weights_);
  }

  void write_down(const Source& source, std::int64_t begin, std::int64_t count,
                  std::byte* scales_to, std::byte* panel, std::int64_t stride) {
    const bool step_scales = layout_.format == PanelFormat::kInt8;
    float scales[kMaxScales] = {};
    for (std::int64_t j = 0; j < count && step_scales; ++j)
      for (std::int64_t o = 0; o < d_model_; ++o)
        scales[j] = std::max(scales[j], std::abs(source.down_at(begin + j, o)) / 127.0f);
    for (std::int64_t d = 0; d < layout_.down_panels && !step_scales; ++d) {
      read_down(source, begin, count, d, nullptr);
      widen_scales(layout_.format, weights_, scales);
    }
    std::memcpy(scales_to, scales, layout_.scale_bytes);
    for (std::int64_t d = 0; d < layout_.down_panels; ++d) {
      read_down(source, begin, count, d, step_scales ? scales : nullptr);
      encode_panel(layout_.format, weights_, step_scales ? kUnitScales : scales,
                   panel + d * stride);
    }
  }

  /// Down panel d, divided by the scales of its steps if there are any.
  void read_down(const Source& source, std::int64_t begin, std::int64_t count, std::int64_t d,
                 const float* step_scales) {
    weights_.assign(static_cast<std::size_t>(layout_.neurons * kPanelWidth), 0.0f);
    const std::int64_t first = d * kPanelWidth;
    const std::int64_t outputs = std::min(kPanelWidth, d_model_ - first);
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t o = 0; o < outputs; ++o) {
        const float scale = step_scales != nullptr ? step_scales[j] : 1.0f;
        weights_[j * kPanelWidth + o] =
            scale > 0.0f ? source.down_at(begin + j, first + o) / scale : 0.0f;
      }
  }

  ExpertLayout layout_;
  std::int64_t d_model_;
  std::vector<float> weights_, rows_;
};

struct PackTarget {
  WeightType type;
  bool gated;
  std::int64_t d_model;
  const std::vector<std::int64_t>& widths;
  const std::vector<std::int64_t>& panel_begin;
};

std::shared_ptr<std::byte[]> pack_panels(const PackTarget& t, const std::vector<Source>& sources,
                                         const ParallelFor& parallel) {
  const ExpertLayout layout(t.type, t.gated, t.d_model);
  auto data = allocate_weights(t.panel_begin.back() * layout.bytes());
  parallel(t.panel_begin.back(), 1, [&](std::int64_t begin, std::int64_t end) {
    PanelWriter writer(t.type, t.gated, t.d_model);
    auto e = std::upper_bound(t.panel_begin.begin(), t.panel_begin.end(), begin) -
             t.panel_begin.begin() - 1;
    for (std::int64_t p = begin; p < end; ++p) {
      while (t.panel_begin[e + 1] <= p) ++e;
      const std::int64_t index = p - t.panel_begin[e];
      const std::int64_t panels = t.panel_begin[e + 1] - t.panel_begin[e];
      const std::int64_t first = index * layout.neurons;
      std::byte* expert = data.get() + t.panel_begin[e] * layout.bytes();
      writer.write(sources[e], first, std::min(layout.neurons, t.widths[e] - first), panels, index,
                   expert);
      std::fill_n(expert + layout.gap_at(panels, index), layout.gap_bytes(), std::byte{0});
    }
  });
  return data;
}

/// Biases in lane order, panel by panel; empty without any.
std::vector<float> lane_biases(const PackTarget& t, const std::vector<Source>& sources) {
  const auto has_bias = [](const Source& s) { return !s.gate_bias.empty() || !s.up_bias.empty(); };
  if (std::none_of(sources.begin(), sources.end(), has_bias)) return {};
  std::vector<float> lanes(static_cast<std::size_t>(t.panel_begin.back() * kPanelWidth), 0.0f);
  const std::int64_t neurons = t.gated ? kPanelWidth / 2 : kPanelWidth;
  for (std::size_t e = 0; e < sources.size(); ++e)
    for (std::int64_t j = 0; j < t.widths[e]; ++j) {
      float* panel = lanes.data() + (t.panel_begin[e] + j / neurons) * kPanelWidth + j % neurons;
      const Source& source = sources[e];
      if (!source.gate_bias.empty()) panel[0] = source.gate_bias[j];
      if (!source.up_bias.empty()) panel[t.gated ? neurons : 0] = source.up_bias[j];
    }
  return lanes;
}

std::vector<std::int64_t> panel_begins(const std::vector<std::int64_t>& widths,
                                       std::int64_t neurons) {
  std::vector<std::int64_t> begins{0};
  for (const std::int64_t width : widths)
    begins.push_back(begins.back() + (width + neurons - 1) / neurons);
  return begins;
}

}  // namespace

template <typename Source>
void PackedExperts::pack(const std::vector<Source>& sources, const ParallelFor& parallel) {
  panel_begin_ = panel_begins(widths_, panel_neurons());
  panel_bytes_ = ExpertLayout(type_, gated_, d_model_).bytes();
  const PackTarget target{type_, gated_, d_model_, widths_, panel_begin_};
  data_ = pack_panels(target, sources, parallel);
  lane_bias_ = lane_biases(target, sources);
}

PackedExperts::PackedExperts(const ExpertBank& bank, WeightType type, const ParallelFor& parallel)
    : d_model_(bank.d_model),
      gated_(!bank.gate.empty()),
      activation_(bank.activation),
      type_(type),
      down_bias_(bank.down_bias) {
  const std::int64_t rows = bank.rows();
  if (gated_) check_weights("gate", MatrixView(bank.gate.data(), rows, d_model_));
  check_weights("up", MatrixView(bank.up.data(), rows, d_model_));
  check_weights("down_t", MatrixView(bank.down_t.data(), rows, d_model_));
  std::vector<Source> sources;
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    widths_.push_back(bank.width(e));
    const ExpertView view = bank.expert(e);
    sources.push_back({view.gate, view.up, view.down_t, true, view.gate_bias, view.up_bias});
  }
  pack(sources, parallel);
}

PackedExperts::PackedExperts(const FfnView& ffn, WeightType type, const ParallelFor& parallel)
    : d_model_(ffn.up.cols),
      gated_(!ffn.gate.empty()),
      activation_(ffn.activation),
      type_(type),
      widths_{ffn.up.rows},
      down_bias_(ffn.down_bias.begin(), ffn.down_bias.end()) {
  if (gated_) check_weights("gate", ffn.gate);
  check_weights("up", ffn.up);
  check_weights("down", ffn.down);
  const std::vector<Source> sources{
      {ffn.gate, ffn.up, ffn.down, false, ffn.gate_bias, ffn.up_bias}};
  pack(sources, parallel);
}

PackedExperts::PackedExperts(const FfnRows& ffn, WeightType type, const ParallelFor& parallel)
    : d_model_(ffn.down.rows),
      activation_(ffn.activation),
      type_(type),
      widths_{ffn.down.cols},
      down_bias_(ffn.down_bias.begin(), ffn.down_bias.end()) {
  if (!ffn.gate || !ffn.up)
    fail_argument(
        "pack: FfnRows::{} is empty; expected a function for each of gate and up; pack an FFN "
        "without a gate from an FfnView",
        ffn.up ? "gate" : "up");
  check_weights("down", ffn.down);
  Source source;
  source.down = ffn.down;
  source.down_transposed = false;
  source.gate_bias = ffn.gate_bias;
  source.up_bias = ffn.up_bias;
  source.read_gate = &ffn.gate;
  source.read_up = &ffn.up;
  pack(std::vector<Source>{source}, parallel);
}

PackedExperts::PackedExperts(const StackedExperts& stack, WeightType type,
                             const ParallelFor& parallel)
    : d_model_(stack.d_model), gated_(stack.gated), activation_(stack.activation), type_(type) {
  if (stack.num_experts < 1 || stack.width < 1 || d_model_ < 1)
    fail_argument("pack: {} experts of {} neurons, {} wide; expected at least one of each",
                  stack.num_experts, stack.width, d_model_);
  if (stack.dtype != DType::kF32 && stack.dtype != DType::kBF16 && stack.dtype != DType::kF16)
    fail_argument("pack: stacked experts of {}; expected F32, BF16 or F16",
                  dtype_name(stack.dtype));
  const std::int64_t E = stack.num_experts, I = stack.width, rows = gated_ ? 2 * I : I;
  const StoredRows w13(stack.w13, stack.dtype, E * rows, d_model_);
  const StoredRows w2(stack.w2, stack.dtype, E * d_model_, I);
  std::vector<Source> sources;
  for (std::int64_t e = 0; e < E; ++e) {
    Source source;
    if (gated_) source.gate = w13.slice(e * rows, I);
    source.up = w13.slice(e * rows + rows - I, I);
    source.down = w2.slice(e * d_model_, d_model_);
    source.down_transposed = false;
    check_weights(fmt::format("w13 of expert {}", e), w13.slice(e * rows, rows));
    check_weights(fmt::format("w2 of expert {}", e), source.down);
    if (stack.w13_bias != nullptr) {
      const std::span<const float> bias(stack.w13_bias + e * rows, rows);
      if (gated_) source.gate_bias = bias.first(I);
      source.up_bias = bias.last(I);
    }
    sources.push_back(source);
  }
  widths_.assign(E, I);
  pack(sources, parallel);
}

PackedExperts::PackedExperts(PackedExpertsParts parts)
    : d_model_(parts.d_model),
      panel_bytes_(ExpertLayout(parts.type, parts.gated, parts.d_model).bytes()),
      gated_(parts.gated),
      activation_(parts.activation),
      type_(parts.type),
      widths_(std::move(parts.widths)),
      panel_begin_(panel_begins(widths_, panel_neurons())),
      lane_bias_(std::move(parts.lane_bias)),
      down_bias_(std::move(parts.down_bias)),
      data_(std::move(parts.panels)) {}

ExpertBank PackedExperts::unpack() const {
  const ExpertLayout layout(type_, gated_, d_model_);
  const PanelKernels& kernels = panel_kernels();
  ExpertBank bank;
  bank.d_model = d_model_;
  bank.activation = activation_;
  bank.down_bias = down_bias_;
  bank.begin.push_back(0);
  for (const std::int64_t width : widths_) bank.begin.push_back(bank.begin.back() + width);
  const std::int64_t rows = bank.rows(), D = d_model_;
  bank.dense_hidden = rows;
  bank.neuron_order.resize(rows);
  std::iota(bank.neuron_order.begin(), bank.neuron_order.end(), 0);
  if (gated_) bank.gate.resize(rows * D);
  bank.up.resize(rows * D);
  bank.down_t.resize(rows * D);
  if (!lane_bias_.empty()) {
    if (gated_) bank.gate_bias.resize(rows);
    bank.up_bias.resize(rows);
  }
  std::vector<float> w(static_cast<std::size_t>(std::max(D, layout.neurons) * kPanelWidth));
  for (std::int64_t e = 0; e < num_experts(); ++e)
    for (std::int64_t first = 0; first < widths_[e]; first += layout.neurons) {
      const std::int64_t p = panel_begin_[e] + first / layout.neurons;
      const std::int64_t panels = panel_begin_[e + 1] - panel_begin_[e];
      const std::int64_t index = p - panel_begin_[e];
      const std::byte* expert = this->expert(e);
      const std::int64_t count = std::min(layout.neurons, widths_[e] - first);
      const std::int64_t row = bank.begin[e] + first;
      const std::int64_t up_lane = gated_ ? kPanelWidth / 2 : 0;
      const auto* scales = reinterpret_cast<const float*>(expert + layout.scales_at(index));
      const float* down_scales = scales + layout.scale_bytes / 4;
      const bool step_scales = layout.format == PanelFormat::kInt8;
      const auto unpack_panel = kernels.unpack[static_cast<int>(layout.format)];
      unpack_panel(expert + layout.gate_up_at(panels, index), D, scales, w.data());
      for (std::int64_t j = 0; j < count; ++j)
        for (std::int64_t s = 0; s < D; ++s) {
          if (gated_) bank.gate[(row + j) * D + s] = w[s * kPanelWidth + j];
          bank.up[(row + j) * D + s] = w[s * kPanelWidth + up_lane + j];
        }
      for (std::int64_t j = 0; j < count && !lane_bias_.empty(); ++j) {
        if (gated_) bank.gate_bias[row + j] = lane_bias_[p * kPanelWidth + j];
        bank.up_bias[row + j] = lane_bias_[p * kPanelWidth + up_lane + j];
      }
      for (std::int64_t d = 0; d < layout.down_panels; ++d) {
        unpack_panel(expert + layout.down_at(panels, index, d), layout.neurons,
                     step_scales ? kUnitScales : down_scales, w.data());
        for (std::int64_t j = 0; j < count; ++j)
          for (std::int64_t o = d * kPanelWidth; o < std::min(D, (d + 1) * kPanelWidth); ++o)
            bank.down_t[(row + j) * D + o] =
                w[j * kPanelWidth + o - d * kPanelWidth] * (step_scales ? down_scales[j] : 1.0f);
      }
    }
  return bank;
}

}  // namespace cleave
