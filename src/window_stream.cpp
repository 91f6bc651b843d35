#include "window_stream.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/dispatch.h"

namespace cleave {
namespace {

std::int64_t longest_context(std::span<const TokenWindows* const> texts) {
  std::int64_t longest = 1;
  for (const TokenWindows* text : texts) longest = std::max(longest, text->context);
  return longest;
}

}  // namespace

WindowStream::WindowStream(Model& model, std::span<const TokenWindows* const> texts)
    : model_(model),
      D_(model.config().hidden_size),
      context_(longest_context(texts)),
      begin_{0},
      cache_(model.config(), context_),
      normed_(context_ * D_) {
  for (const TokenWindows* text : texts)
    for (std::int64_t w = 0; w < text->count(); ++w)
      begin_.push_back(begin_.back() + text->context);
  stream_.resize(static_cast<std::size_t>(tokens() * D_));
  std::int64_t window = 0;
  for (const TokenWindows* text : texts)
    for (std::int64_t w = 0; w < text->count(); ++w)
      model_.embed(text->window(w), residual(window++));
}

WindowStream::WindowStream(Model& model, const TokenWindows& text)
    : WindowStream(model, std::vector<const TokenWindows*>{&text}) {}

MatrixView<const float> WindowStream::attend(std::int64_t layer, std::int64_t window) {
  const MatrixView<float> x = residual(window);
  const MatrixView<float> normed(normed_.data(), x.rows, D_);
  model_.attend(layer, cache_, x, normed);
  return normed;
}

void WindowStream::attend(std::int64_t layer, MatrixView<float> input) {
  for (std::int64_t w = 0; w < num_windows(); ++w) {
    const MatrixView<float> x = residual(w);
    model_.attend(layer, cache_, x, input.slice_rows(begin_[w], x.rows));
  }
}

void WindowStream::add(std::int64_t window, MatrixView<const float> y) {
  const MatrixView<float> x = residual(window);
  for (std::int64_t t = 0; t < y.rows; ++t) isa_kernels().add(y.row(t), x.row(t), D_);
}

void WindowStream::keep_windows(std::int64_t count) {
  begin_.resize(static_cast<std::size_t>(count) + 1);
  stream_.resize(static_cast<std::size_t>(tokens() * D_));
}

std::vector<float> WindowStream::finish() && {
  for (std::int64_t w = 0; w < num_windows(); ++w) model_.finish(residual(w), residual(w));
  return std::move(stream_);
}

}  // namespace cleave
