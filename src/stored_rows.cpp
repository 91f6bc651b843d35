#include "stored_rows.h"

#include <cmath>

#include "fail.h"
#include "kernels/isa/panel_isa.h"

namespace cleave {

void check_weights(const std::string& what, const StoredRows& weight, std::int64_t first) {
  std::vector<float> room;
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    const float* row = weight.row(r, room);
    for (std::int64_t c = 0; c < weight.cols(); ++c)
      if (!std::isfinite(row[c]))
        fail_argument("pack: {}[{}, {}] is {}; weights must be finite", what, first + r, c, row[c]);
  }
}

void rows_to_lanes(const StoredRows& weight, std::int64_t begin, std::int64_t count,
                   std::int64_t lane, std::vector<float>& panel) {
  std::vector<float> room;
  for (std::int64_t i = 0; i < count; ++i) {
    const float* row = weight.row(begin + i, room);
    for (std::int64_t s = 0; s < weight.cols(); ++s) panel[s * kPanelWidth + lane + i] = row[s];
  }
}

}  // namespace cleave
