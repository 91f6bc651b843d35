#include "window_stream.h"

#include <utility>

#include "kernels/dispatch.h"

namespace cleave {

WindowStream::WindowStream(Model& model, const TokenWindows& text)
    : model_(model),
      text_(text),
      D_(model.config().hidden_size),
      cache_(model.config(), text.context),
      stream_(static_cast<std::size_t>(text.count() * text.context * D_)),
      normed_(text.context * D_) {
  for (std::int64_t w = 0; w < num_windows(); ++w) model_.embed(text_.window(w), residual(w));
}

MatrixView<const float> WindowStream::attend(std::int64_t layer, std::int64_t window) {
  const MatrixView<float> normed(normed_.data(), context(), D_);
  model_.attend(layer, cache_, residual(window), normed);
  return normed;
}

void WindowStream::add(std::int64_t window, MatrixView<const float> y) {
  const MatrixView<float> x = residual(window);
  for (std::int64_t t = 0; t < y.rows; ++t) isa_kernels().add(y.row(t), x.row(t), D_);
}

std::vector<float> WindowStream::finish() && {
  for (std::int64_t w = 0; w < num_windows(); ++w) model_.finish(residual(w), residual(w));
  return std::move(stream_);
}

}  // namespace cleave
