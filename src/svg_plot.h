#pragma once

#include <string>
#include <utility>
#include <vector>

namespace cleave {

/// Text inside markup or an attribute: & < > " are replaced, control characters dropped.
std::string escape_markup(const std::string& text);

struct PlotAxis {
  std::string label;
  double from = 0.0, to = 1.0;  ///< to > from; both > 0 with `logarithmic`
  bool logarithmic = false;
  bool whole = false;  ///< ticks at whole numbers only
};

/// One plot as an <svg> element. Colours are CSS classes of the page (see report_html.cpp):
/// `grid`, `note` for what surrounds the data, and whatever the caller names.
class SvgPlot {
 public:
  /// @param right  pixels beside the data; more than usual leaves room for words
  SvgPlot(PlotAxis x, PlotAxis y, int width, int height, int right = 16);

  /// Pixel coordinates of a value.
  double x(double value) const;
  double y(double value) const;
  void line(const std::vector<std::pair<double, double>>& points, const std::string& css);
  /// A thin line between two places in pixels.
  void leader(double from_x, double from_y, double to_x, double to_y);
  /// @param tip  shown while the pointer is over it
  void point(double x_value, double y_value, const std::string& css, const std::string& tip);
  /// A rectangle in pixels.
  void cell(double left, double top, double width, double height, double opacity,
            const std::string& tip);
  /// anchor: "start", "middle" or "end"
  void text(double left, double baseline, const std::string& words, const char* anchor);
  std::string str() const;

 private:
  void draw_axes();
  PlotAxis x_, y_;
  int width_, height_, right_;
  std::string body_;
};

/// Round values inside an axis, in ascending order.
std::vector<double> axis_ticks(const PlotAxis& axis);

}  // namespace cleave
