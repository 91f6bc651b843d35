#pragma once

#include <cstdint>
#include <memory>

namespace cleave {

/// Uninitialised floats for results that are about to be overwritten; std::vector would write every
/// element once for nothing.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) : data_(size > 0 ? new float[size] : nullptr), size_(size) {}
  float* data() const { return data_.get(); }
  std::int64_t size() const { return size_; }

 private:
  std::unique_ptr<float[]> data_;
  std::int64_t size_ = 0;
};

}  // namespace cleave
