#pragma once

#include <string>

#include "cleave/report.h"

// What the forms of a report share.
namespace cleave {

std::string share_percent(double share);  ///< "50 %"
std::string short_number(double value);   ///< "0.383", "2494"

/// What kind of row it is, in a word or two.
inline const char* row_kind(const QualityRow& row) {
  if (row.ours) return "this conversion";
  if (!row.deployable) return "oracle";
  if (row.routed) return "routed";
  return row.rho < 1.0 ? "pruning" : "dense";
}

}  // namespace cleave
