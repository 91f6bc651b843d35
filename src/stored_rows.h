#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cleave/views.h"
#include "quants.h"

namespace cleave {

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

/// Throws if a weight is not finite. `first`: what the weight's own rows are counted from.
void check_weights(const std::string& what, const StoredRows& weight, std::int64_t first = 0);

/// rows [begin, begin + count) of `weight` into lanes [lane, lane + count) of panel [steps, 32].
void rows_to_lanes(const StoredRows& weight, std::int64_t begin, std::int64_t count,
                   std::int64_t lane, std::vector<float>& panel);

}  // namespace cleave
