#pragma once

#include <cstdint>
#include <vector>

#include "cleave/model.h"
#include "cleave/text.h"
#include "support/buffer.h"

namespace cleave {

/// All windows of a text between two layers of a model: the residual stream [tokens, D]. Running a
/// whole text through one layer before the next needs only that layer's weights and statistics.
class WindowStream {
 public:
  /// Embeds the text. Both must outlive it.
  WindowStream(Model& model, const TokenWindows& text);

  std::int64_t num_windows() const { return text_.count(); }
  std::int64_t context() const { return text_.context; }
  /// Runs one window through a layer's attention. Returns what the layer's FFN reads, [context, D];
  /// valid until the next call.
  MatrixView<const float> attend(std::int64_t layer, std::int64_t window);
  /// The window's residual stream += y [context, D].
  void add(std::int64_t window, MatrixView<const float> y);
  /// The final norm, in place: the stream becomes the hidden states.
  std::vector<float> finish() &&;

 private:
  MatrixView<float> residual(std::int64_t window) {
    return {stream_.data() + window * context() * D_, context(), D_};
  }
  Model& model_;
  const TokenWindows& text_;
  std::int64_t D_;
  KvCache cache_;
  std::vector<float> stream_;  // [tokens, D]
  Buffer normed_;              // [context, D]
};

}  // namespace cleave
