#include "cleave/packed.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "quants.h"
#include "stored_rows.h"
#include "support/weight_memory.h"

namespace cleave {

namespace {

/// By the kernels themselves, a block of steps at a time: what they make of scale and minimum in
/// one rounding or two depends on the instruction set.
void unpack_int4_row(const std::byte* panel, std::int64_t cols, const float* units,
                     std::int64_t lane, float* out) {
  float block[kInt4Block * kPanelWidth];
  for (std::int64_t begin = 0; begin < cols; begin += kInt4Block) {
    const std::int64_t steps = std::min(kInt4Block, cols - begin);
    panel_kernels().unpack[static_cast<int>(PanelFormat::kInt4)](panel, steps, units, block);
    for (std::int64_t s = 0; s < steps; ++s) out[begin + s] = block[s * kPanelWidth + lane];
    panel += panel_bytes(PanelFormat::kInt4, steps);
  }
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
  const PanelFormat format = panel_format(type_);
  const std::byte* panel = data_.get() + n / kPanelWidth * panel_bytes_;
  const std::int64_t lane = n % kPanelWidth;
  const auto* scales = reinterpret_cast<const float*>(panel);
  panel += scale_bytes(format);
  const auto half_at = [&](std::int64_t index) {
    std::uint16_t bits;
    std::memcpy(&bits, panel + 2 * index, sizeof bits);
    return bits;
  };
  switch (format) {
    case PanelFormat::kF32:
      for (std::int64_t s = 0; s < cols_; ++s)
        std::memcpy(out + s, panel + 4 * (s * kPanelWidth + lane), sizeof *out);
      return;
    case PanelFormat::kBF16:
      for (std::int64_t s = 0; s < cols_; ++s)
        out[s] = bf16_to_float(half_at((s / 2 * kPanelWidth + lane) * 2 + s % 2));
      return;
    case PanelFormat::kF16:
      for (std::int64_t s = 0; s < cols_; ++s)
        out[s] = half_to_float(half_at(s * kPanelWidth + lane));
      return;
    case PanelFormat::kInt8:
      for (std::int64_t s = 0; s < cols_; ++s)
        out[s] = scales[lane] *
                 static_cast<float>(std::to_integer<std::int8_t>(panel[s * kPanelWidth + lane]));
      return;
    case PanelFormat::kInt4:
      return unpack_int4_row(panel, cols_, scales, lane, out);
  }
}

}  // namespace cleave
