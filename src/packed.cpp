#include "cleave/packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <string>

#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "quants.h"
#include "support/weight_memory.h"

namespace cleave {
namespace {

/// Rows of weights as somebody keeps them: F32, BF16 or F16.
class StoredRows {
 public:
  StoredRows() = default;
  StoredRows(MatrixView<const float> m)  // NOLINT(google-explicit-constructor)
      : StoredRows(m.data, DType::kF32, m.rows, m.cols) {
    row_stride_ = m.row_stride;
  }
  StoredRows(const void* data, DType dtype, std::int64_t rows, std::int64_t cols)
      : data_(static_cast<const std::byte*>(data)),
        dtype_(dtype),
        rows_(rows),
        cols_(cols),
        row_stride_(cols) {}

  bool empty() const { return data_ == nullptr || rows_ == 0 || cols_ == 0; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  StoredRows slice(std::int64_t begin, std::int64_t count) const {
    StoredRows part = *this;
    part.data_ += begin * row_stride_ * element_bytes();
    part.rows_ = count;
    return part;
  }
  /// Row r, where it is or, if it is not float32, decoded into `room`.
  const float* row(std::int64_t r, std::vector<float>& room) const {
    const std::byte* at = data_ + r * row_stride_ * element_bytes();
    if (dtype_ == DType::kF32) return reinterpret_cast<const float*>(at);
    room.resize(static_cast<std::size_t>(cols_));
    decode(dtype_, {at, static_cast<std::size_t>(cols_ * element_bytes())}, room);
    return room.data();
  }
  float at(std::int64_t r, std::int64_t c) const {
    const std::byte* at = data_ + (r * row_stride_ + c) * element_bytes();
    if (dtype_ == DType::kF32) return *reinterpret_cast<const float*>(at);
    std::uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return dtype_ == DType::kBF16 ? bf16_to_float(bits) : half_to_float(bits);
  }

 private:
  std::int64_t element_bytes() const { return dtype_ == DType::kF32 ? 4 : 2; }
  const std::byte* data_ = nullptr;
  DType dtype_ = DType::kF32;
  std::int64_t rows_ = 0, cols_ = 0, row_stride_ = 0;
};

/// `first`: what the weight's own rows are counted from.
void check_weights(const std::string& what, const StoredRows& weight, std::int64_t first = 0) {
  std::vector<float> room;
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    const float* row = weight.row(r, room);
    for (std::int64_t c = 0; c < weight.cols(); ++c)
      if (!std::isfinite(row[c]))
        fail_argument("pack: {}[{}, {}] is {}; weights must be finite", what, first + r, c, row[c]);
  }
}

/// rows [begin, begin + count) of `weight` into lanes [lane, lane + count) of panel [steps, 32].
void rows_to_lanes(const StoredRows& weight, std::int64_t begin, std::int64_t count,
                   std::int64_t lane, std::vector<float>& panel) {
  std::vector<float> room;
  for (std::int64_t i = 0; i < count; ++i) {
    const float* row = weight.row(begin + i, room);
    for (std::int64_t s = 0; s < weight.cols(); ++s) panel[s * kPanelWidth + lane + i] = row[s];
  }
}

/// What an expert is packed from.
struct Source {
  StoredRows gate, up;          // [neurons, D]
  StoredRows down;              // [D, neurons], or [neurons, D]
  bool down_transposed = true;  // [neurons, D]
  std::span<const float> gate_bias, up_bias;
  float down_at(std::int64_t neuron, std::int64_t output) const {
    return down_transposed ? down.at(neuron, output) : down.at(output, neuron);
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
    if (!source.gate.empty()) {
      rows_to_lanes(source.gate, begin, count, 0, weights_);
      rows_to_lanes(source.up, begin, count, kPanelWidth / 2, weights_);
    } else {
      rows_to_lanes(source.up, begin, count, 0, weights_);
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

Workspace::Workspace(std::span<std::byte> memory) : view_(memory.data()), size_(memory.size()) {
  if (reinterpret_cast<std::uintptr_t>(view_) % kAlignment != 0)
    fail_argument("workspace: {} is not aligned; expected a multiple of {} bytes",
                  static_cast<const void*>(view_), kAlignment);
}

std::byte* Workspace::get(std::size_t bytes) {
  if (bytes > size_ && view_ != nullptr)
    fail_argument("workspace: {} bytes are needed, it has {}; ask the op's *_workspace_size()",
                  bytes, size_);
  if (bytes > size_) {
    memory_.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
    size_ = bytes;
  }
  return view_ != nullptr ? view_ : memory_.get();
}

PackedLinear::PackedLinear(std::int64_t rows, std::int64_t cols, WeightType type,
                           std::shared_ptr<const std::byte[]> data)
    : rows_(rows),
      cols_(cols),
      panel_bytes_(scale_bytes(panel_format(type)) + cleave::panel_bytes(panel_format(type), cols)),
      bytes_((rows + kPanelWidth - 1) / kPanelWidth * panel_bytes_),
      type_(type),
      data_(std::move(data)) {}

PackedLinear::PackedLinear(MatrixView<const float> weight, WeightType type,
                           const ParallelFor& parallel)
    : PackedLinear(
          weight.rows, weight.cols, type,
          [&](std::int64_t first, MatrixView<float> out) {
            for (std::int64_t r = 0; r < out.rows; ++r)
              std::copy_n(weight.row(first + r), weight.cols, out.row(r));
          },
          parallel) {}

PackedLinear::PackedLinear(std::int64_t rows, std::int64_t cols, WeightType type,
                           const ReadRows& read, const ParallelFor& parallel)
    : PackedLinear(rows, cols, type, std::shared_ptr<const std::byte[]>()) {
  const PanelFormat format = panel_format(type);
  auto data = allocate_weights(bytes_);
  parallel(bytes_ / std::max<std::int64_t>(1, panel_bytes_), 1,
           [&](std::int64_t begin, std::int64_t end) {
             std::vector<float> block(static_cast<std::size_t>(cols_ * kPanelWidth)), w;
             for (std::int64_t p = begin; p < end; ++p) {
               w.assign(static_cast<std::size_t>(cols_ * kPanelWidth), 0.0f);
               const std::int64_t first = p * kPanelWidth;
               const MatrixView<float> some(block.data(), std::min(kPanelWidth, rows_ - first),
                                            cols_);
               read(first, some);
               check_weights("weight", MatrixView<const float>(some), first);
               rows_to_lanes(MatrixView<const float>(some), 0, some.rows, 0, w);
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
  if (gated_) check_weights("gate", MatrixView(bank.gate.data(), rows, d_model_));
  check_weights("up", MatrixView(bank.up.data(), rows, d_model_));
  check_weights("down_t", MatrixView(bank.down_t.data(), rows, d_model_));
  std::vector<Source> sources;
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    widths_.push_back(bank.width(e));
    const ExpertView view = bank.expert(e);
    sources.push_back({view.gate, view.up, view.down_t, true, view.gate_bias, view.up_bias});
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
  if (gated_) check_weights("gate", ffn.gate);
  check_weights("up", ffn.up);
  check_weights("down", ffn.down);
  const std::vector<Source> sources{
      {ffn.gate, ffn.up, ffn.down, false, ffn.gate_bias, ffn.up_bias}};
  panel_begin_ = panel_begins(widths_, panel_neurons());
  panel_bytes_ = ExpertPanelLayout(type, gated_, d_model_).bytes();
  const PackTarget target{type, gated_, d_model_, widths_, panel_begin_};
  data_ = pack_panels(target, sources, parallel);
  lane_bias_ = lane_biases(target, sources);
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
  panel_begin_ = panel_begins(widths_, panel_neurons());
  panel_bytes_ = ExpertPanelLayout(type, gated_, d_model_).bytes();
  const PackTarget target{type, gated_, d_model_, widths_, panel_begin_};
  data_ = pack_panels(target, sources, parallel);
  lane_bias_ = lane_biases(target, sources);
}

PackedExperts::PackedExperts(PackedExpertsParts parts)
    : d_model_(parts.d_model),
      panel_bytes_(ExpertPanelLayout(parts.type, parts.gated, parts.d_model).bytes()),
      gated_(parts.gated),
      activation_(parts.activation),
      type_(parts.type),
      widths_(std::move(parts.widths)),
      panel_begin_(panel_begins(widths_, panel_neurons())),
      lane_bias_(std::move(parts.lane_bias)),
      down_bias_(std::move(parts.down_bias)),
      data_(std::move(parts.panels)) {}

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
