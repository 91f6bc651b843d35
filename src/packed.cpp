#include "cleave/packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "support/weight_memory.h"

namespace cleave {
namespace {

void check_finite(const char* what, MatrixView<const float> weight) {
  for (std::int64_t r = 0; r < weight.rows; ++r)
    for (std::int64_t c = 0; c < weight.cols; ++c)
      if (!std::isfinite(weight(r, c)))
        fail_argument("pack: {}[{}, {}] is {}; weights must be finite", what, r, c, weight(r, c));
}

/// rows [begin, begin + count) of `weight` into lanes [lane, lane + count) of panel [steps, 32].
void rows_to_lanes(MatrixView<const float> weight, std::int64_t begin, std::int64_t count,
                   std::int64_t lane, std::vector<float>& panel) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float* row = weight.row(begin + i);
    for (std::int64_t s = 0; s < weight.cols; ++s) panel[s * kPanelWidth + lane + i] = row[s];
  }
}

struct Source {
  ExpertView expert;
  const float* down = nullptr;
  std::int64_t neuron_stride = 0, output_stride = 1;
  float down_at(std::int64_t neuron, std::int64_t output) const {
    return down[neuron * neuron_stride + output * output_stride];
  }
};

/// One expert panel: neurons [begin, begin + count) of an expert.
class PanelWriter {
 public:
  PanelWriter(WeightType type, bool gated, std::int64_t d_model)
      : layout_(type, gated, d_model), d_model_(d_model) {}

  void write(const Source& source, std::int64_t begin, std::int64_t count, std::byte* panel) {
    write_gate_up(source, begin, count, panel);
    write_down(source, begin, count, panel);
  }

 private:
  void write_gate_up(const Source& source, std::int64_t begin, std::int64_t count,
                     std::byte* panel) {
    weights_.assign(static_cast<std::size_t>(d_model_ * kPanelWidth), 0.0f);
    if (!source.expert.gate.empty()) {
      rows_to_lanes(source.expert.gate, begin, count, 0, weights_);
      rows_to_lanes(source.expert.up, begin, count, kPanelWidth / 2, weights_);
    } else {
      rows_to_lanes(source.expert.up, begin, count, 0, weights_);
    }
    float scales[kMaxScales] = {};
    widen_scales(layout_.format, weights_, scales);
    std::memcpy(panel, scales, layout_.scale_bytes);
    encode_panel(layout_.format, weights_, scales, panel + layout_.gate_up_offset());
  }

  void write_down(const Source& source, std::int64_t begin, std::int64_t count, std::byte* panel) {
    const bool step_scales = layout_.format == PanelFormat::kInt8;
    float scales[kMaxScales] = {};
    for (std::int64_t j = 0; j < count && step_scales; ++j)
      for (std::int64_t o = 0; o < d_model_; ++o)
        scales[j] = std::max(scales[j], std::abs(source.down_at(begin + j, o)) / 127.0f);
    for (std::int64_t d = 0; d < layout_.down_panels && !step_scales; ++d) {
      read_down(source, begin, count, d, nullptr);
      widen_scales(layout_.format, weights_, scales);
    }
    std::memcpy(panel + layout_.scale_bytes, scales, layout_.scale_bytes);
    for (std::int64_t d = 0; d < layout_.down_panels; ++d) {
      read_down(source, begin, count, d, step_scales ? scales : nullptr);
      encode_panel(layout_.format, weights_, step_scales ? kUnitScales : scales,
                   panel + layout_.down_offset() + d * layout_.down_panel_bytes);
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

  ExpertPanelLayout layout_;
  std::int64_t d_model_;
  std::vector<float> weights_;
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
  const ExpertPanelLayout layout(t.type, t.gated, t.d_model);
  auto data = allocate_weights(t.panel_begin.back() * layout.bytes());
  parallel(t.panel_begin.back(), 1, [&](std::int64_t begin, std::int64_t end) {
    PanelWriter writer(t.type, t.gated, t.d_model);
    auto e = std::upper_bound(t.panel_begin.begin(), t.panel_begin.end(), begin) -
             t.panel_begin.begin() - 1;
    for (std::int64_t p = begin; p < end; ++p) {
      while (t.panel_begin[e + 1] <= p) ++e;
      const std::int64_t first = (p - t.panel_begin[e]) * layout.neurons;
      writer.write(sources[e], first, std::min(layout.neurons, t.widths[e] - first),
                   data.get() + p * layout.bytes());
    }
  });
  return data;
}

/// Biases in lane order, panel by panel; empty without any.
std::vector<float> lane_biases(const PackTarget& t, const std::vector<Source>& sources) {
  const auto has_bias = [](const Source& s) {
    return !s.expert.gate_bias.empty() || !s.expert.up_bias.empty();
  };
  if (std::none_of(sources.begin(), sources.end(), has_bias)) return {};
  std::vector<float> lanes(static_cast<std::size_t>(t.panel_begin.back() * kPanelWidth), 0.0f);
  const std::int64_t neurons = t.gated ? kPanelWidth / 2 : kPanelWidth;
  for (std::size_t e = 0; e < sources.size(); ++e)
    for (std::int64_t j = 0; j < t.widths[e]; ++j) {
      float* panel = lanes.data() + (t.panel_begin[e] + j / neurons) * kPanelWidth + j % neurons;
      const ExpertView& view = sources[e].expert;
      if (!view.gate_bias.empty()) panel[0] = view.gate_bias[j];
      if (!view.up_bias.empty()) panel[t.gated ? neurons : 0] = view.up_bias[j];
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

const char* weight_type_name(WeightType type) {
  switch (type) {
    case WeightType::kF32:
      return "f32";
    case WeightType::kBF16:
      return "bf16";
    case WeightType::kF16:
      return "f16";
    case WeightType::kInt8:
      return "int8";
    case WeightType::kInt4:
      return "int4";
  }
  return "unknown";
}

std::optional<WeightType> parse_weight_type(std::string_view name) {
  for (const auto type : {WeightType::kF32, WeightType::kBF16, WeightType::kF16, WeightType::kInt8,
                          WeightType::kInt4})
    if (name == weight_type_name(type)) return type;
  return std::nullopt;
}

void Workspace::Free::operator()(std::byte* memory) const {
  ::operator delete[](memory, std::align_val_t{64});
}

std::byte* Workspace::get(std::size_t bytes) {
  if (bytes > size_) {
    memory_.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
    size_ = bytes;
  }
  return memory_.get();
}

PackedLinear::PackedLinear(MatrixView<const float> weight, WeightType type,
                           const ParallelFor& parallel)
    : rows_(weight.rows), cols_(weight.cols), type_(type) {
  check_finite("weight", weight);
  const PanelFormat format = panel_format(type);
  panel_bytes_ = scale_bytes(format) + cleave::panel_bytes(format, cols_);
  const std::int64_t panels = (rows_ + kPanelWidth - 1) / kPanelWidth;
  bytes_ = panels * panel_bytes_;
  auto data = allocate_weights(bytes_);
  parallel(panels, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> w;
    for (std::int64_t p = begin; p < end; ++p) {
      w.assign(static_cast<std::size_t>(cols_ * kPanelWidth), 0.0f);
      const std::int64_t first = p * kPanelWidth;
      rows_to_lanes(weight, first, std::min(kPanelWidth, rows_ - first), 0, w);
      float scales[kMaxScales] = {};
      widen_scales(format, w, scales);
      std::byte* panel = data.get() + p * panel_bytes_;
      std::memcpy(panel, scales, scale_bytes(format));
      encode_panel(format, w, scales, panel + scale_bytes(format));
    }
  });
  data_ = std::move(data);
}

void PackedLinear::unpack_row(std::int64_t n, float* out) const {
  std::vector<float> panel(static_cast<std::size_t>(cols_ * kPanelWidth));
  const PanelFormat format = panel_format(type_);
  const std::byte* packed = data_.get() + n / kPanelWidth * panel_bytes_;
  panel_kernels().unpack[static_cast<int>(format)](
      packed + scale_bytes(format), cols_, reinterpret_cast<const float*>(packed), panel.data());
  for (std::int64_t s = 0; s < cols_; ++s) out[s] = panel[s * kPanelWidth + n % kPanelWidth];
}

PackedExperts::PackedExperts(const ExpertBank& bank, WeightType type, const ParallelFor& parallel)
    : d_model_(bank.d_model),
      gated_(!bank.gate.empty()),
      activation_(bank.activation),
      type_(type),
      down_bias_(bank.down_bias) {
  const std::int64_t rows = bank.rows();
  if (gated_) check_finite("gate", {bank.gate.data(), rows, d_model_});
  check_finite("up", {bank.up.data(), rows, d_model_});
  check_finite("down_t", {bank.down_t.data(), rows, d_model_});
  std::vector<Source> sources;
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    widths_.push_back(bank.width(e));
    sources.push_back({bank.expert(e), bank.down_t.data() + bank.begin[e] * d_model_, d_model_, 1});
  }
  panel_begin_ = panel_begins(widths_, panel_neurons());
  panel_bytes_ = ExpertPanelLayout(type, gated_, d_model_).bytes();
  const PackTarget target{type, gated_, d_model_, widths_, panel_begin_};
  data_ = pack_panels(target, sources, parallel);
  lane_bias_ = lane_biases(target, sources);
}

PackedExperts::PackedExperts(const FfnView& ffn, WeightType type, const ParallelFor& parallel)
    : d_model_(ffn.up.cols),
      gated_(!ffn.gate.empty()),
      activation_(ffn.activation),
      type_(type),
      widths_{ffn.up.rows},
      down_bias_(ffn.down_bias.begin(), ffn.down_bias.end()) {
  if (gated_) check_finite("gate", ffn.gate);
  check_finite("up", ffn.up);
  check_finite("down", ffn.down);
  ExpertView view;
  view.gate = ffn.gate;
  view.up = ffn.up;
  view.gate_bias = ffn.gate_bias;
  view.up_bias = ffn.up_bias;
  const std::vector<Source> sources{{view, ffn.down.data, 1, ffn.down.row_stride}};
  panel_begin_ = panel_begins(widths_, panel_neurons());
  panel_bytes_ = ExpertPanelLayout(type, gated_, d_model_).bytes();
  const PackTarget target{type, gated_, d_model_, widths_, panel_begin_};
  data_ = pack_panels(target, sources, parallel);
  lane_bias_ = lane_biases(target, sources);
}

ExpertBank PackedExperts::unpack() const {
  const ExpertPanelLayout layout(type_, gated_, d_model_);
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
      const std::int64_t count = std::min(layout.neurons, widths_[e] - first);
      const std::int64_t row = bank.begin[e] + first;
      const std::int64_t up_lane = gated_ ? kPanelWidth / 2 : 0;
      const auto* scales = reinterpret_cast<const float*>(panel(p));
      const float* down_scales = scales + layout.scale_bytes / 4;
      const bool step_scales = layout.format == PanelFormat::kInt8;
      const auto unpack_panel = kernels.unpack[static_cast<int>(layout.format)];
      unpack_panel(panel(p) + layout.gate_up_offset(), D, scales, w.data());
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
        unpack_panel(panel(p) + layout.down_offset() + d * layout.down_panel_bytes, layout.neurons,
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
