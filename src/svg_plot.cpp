#include "svg_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace cleave {
namespace {

constexpr int kLeft = 56, kTop = 12, kBottom = 40;  // pixels around the data

double position(const PlotAxis& axis, double value) {
  return axis.logarithmic ? std::log(value / axis.from) / std::log(axis.to / axis.from)
                          : (value - axis.from) / (axis.to - axis.from);
}

}  // namespace

std::string escape_markup(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '&')
      result += "&amp;";
    else if (c == '<')
      result += "&lt;";
    else if (c == '>')
      result += "&gt;";
    else if (c == '"')
      result += "&quot;";
    else if (static_cast<unsigned char>(c) >= 0x20)
      result += c;
  }
  return result;
}

std::vector<double> axis_ticks(const PlotAxis& axis) {
  std::vector<double> ticks;
  if (axis.logarithmic) {
    for (double decade = std::pow(10.0, std::floor(std::log10(axis.from))); decade <= axis.to;
         decade *= 10.0)
      for (const double step : {1.0, 2.0, 5.0})
        if (decade * step >= axis.from && decade * step <= axis.to) ticks.push_back(decade * step);
    return ticks;
  }
  const double raw = (axis.to - axis.from) / 6.0;
  const double decade = std::pow(10.0, std::floor(std::log10(raw)));
  double step = 10.0 * decade;
  for (const double factor : {5.0, 2.0, 1.0})
    if (factor * decade >= raw) step = factor * decade;
  if (axis.whole) step = std::max(std::round(step), 1.0);
  for (double i = std::ceil(axis.from / step - 1e-9); i * step <= axis.to + 1e-9 * step; i += 1.0)
    ticks.push_back(i * step + 0.0);  // -0 becomes 0
  return ticks;
}

SvgPlot::SvgPlot(PlotAxis x, PlotAxis y, int width, int height, int right)
    : x_(std::move(x)), y_(std::move(y)), width_(width), height_(height), right_(right) {
  draw_axes();
}

double SvgPlot::x(double value) const {
  return kLeft + position(x_, value) * (width_ - kLeft - right_);
}
double SvgPlot::y(double value) const {
  return height_ - kBottom - position(y_, value) * (height_ - kTop - kBottom);
}

void SvgPlot::draw_axes() {
  for (const double tick : axis_ticks(x_)) {
    body_ +=
        fmt::format(R"(<path class="grid" d="M{:.1f} {}V{}"/>)", x(tick), kTop, height_ - kBottom);
    text(x(tick), height_ - kBottom + 15, fmt::format("{:.6g}", tick), "middle");
  }
  for (const double tick : axis_ticks(y_)) {
    body_ +=
        fmt::format(R"(<path class="grid" d="M{} {:.1f}H{}"/>)", kLeft, y(tick), width_ - right_);
    text(kLeft - 6, y(tick) + 4, fmt::format("{:.6g}", tick), "end");
  }
  text((kLeft + width_ - right_) / 2.0, height_ - 6, x_.label, "middle");
  body_ += fmt::format(
      R"~(<text class="note" transform="translate(13 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>)~",
      (kTop + height_ - kBottom) / 2.0, escape_markup(y_.label));
}

void SvgPlot::line(const std::vector<std::pair<double, double>>& points, const std::string& css) {
  std::string path;
  for (const auto& [px, py] : points)
    path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? 'M' : 'L', x(px), y(py));
  body_ += fmt::format(R"(<path class="line {}" d="{}"/>)", css, path);
}

void SvgPlot::leader(double from_x, double from_y, double to_x, double to_y) {
  body_ += fmt::format(R"(<path class="grid" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>)", from_x, from_y,
                       to_x, to_y);
}

void SvgPlot::point(double x_value, double y_value, const std::string& css,
                    const std::string& tip) {
  body_ += fmt::format(
      R"(<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}</title></circle>)", css,
      x(x_value), y(y_value), escape_markup(tip));
}

void SvgPlot::cell(double left, double top, double width, double height, double opacity,
                   const std::string& tip) {
  body_ += fmt::format(
      R"(<rect class="cell" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" fill-opacity="{:.3f}"><title>{}</title></rect>)",
      left, top, width, height, opacity, escape_markup(tip));
}

void SvgPlot::text(double left, double baseline, const std::string& words, const char* anchor) {
  body_ += fmt::format(R"(<text class="note" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>)",
                       left, baseline, anchor, escape_markup(words));
}

std::string SvgPlot::str() const {
  return fmt::format(R"(<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img">{}</svg>)",
                     width_, height_, width_, height_, body_);
}

}  // namespace cleave
