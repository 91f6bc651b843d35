#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace cleave {

/// Uninitialised floats for results that are about to be overwritten; std::vector would write every
/// element once for nothing. Aligned to a cache line: vector code treats the elements before the
/// first aligned one apart, so the last bits of a result would depend on where malloc put it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size)
      : data_(size > 0 ? static_cast<float*>(::operator new[](size * sizeof(float), kAlignment))
                       : nullptr) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete[](data, kAlignment); }
  };
  std::unique_ptr<float[], Delete> data_;
};

}  // namespace cleave
