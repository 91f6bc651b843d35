#pragma once

#include <string>
#include <vector>

#include "cleave/report.h"

// What the forms of a report share.
namespace cleave {

std::string share_percent(double share);  ///< "50 %"
std::string short_number(double value);   ///< "0.0044", "0.383", "2494"

std::string capitalised(std::string text);  ///< its first letter

/// What the figures of a row are: how the text was cut, and by which measure rows are compared.
std::string quality_convention(bool has_head);

/// A figure that every row of a table has.
struct QualityColumn {
  const char* heading;
  double Quality::*value;
  bool decides;  ///< it is Quality::divergence(), by which rows are compared
  std::string (*text)(double);
};
std::vector<QualityColumn> quality_columns(bool has_head);

/// What kind of row it is, in a word or two.
inline const char* row_kind(const QualityRow& row) {
  if (row.ours) return "this conversion";
  if (!row.stock) return "no stock class";
  if (!row.deployable) return "oracle";
  if (row.routed) return "routed";
  return row.rho < 1.0 ? "pruning" : "dense";
}

/// What its router costs; an oracle could not be run at any price.
inline std::string router_cost(const QualityRow& row) {
  return row.router_share > 0.0 ? share_percent(row.router_share) : "-";
}

/// The rows whose routers were measured. That happened on the calibration text, so any text's rows
/// tell the same.
inline std::vector<const QualityRow*> router_rows(const ConversionReport& report) {
  std::vector<const QualityRow*> rows;
  if (report.texts.empty()) return rows;
  for (const QualityRow& row : report.texts.front().rows)
    if (row.router) rows.push_back(&row);
  return rows;
}

}  // namespace cleave
