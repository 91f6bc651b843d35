#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/model.h"
#include "cleave/text.h"
#include "support/buffer.h"

namespace cleave {

/// All windows of one or several texts between two layers of a model: the residual stream
/// [tokens, D]. Running whole texts through one layer before the next needs only that layer's
/// weights and statistics.
class WindowStream {
 public:
  /// Embeds the texts, one after the other. Model and texts must outlive it.
  WindowStream(Model& model, std::span<const TokenWindows* const> texts);
  WindowStream(Model& model, const TokenWindows& text);

  std::int64_t num_windows() const { return static_cast<std::int64_t>(begin_.size()) - 1; }
  std::int64_t tokens() const { return begin_.back(); }
  /// Of the longest window, in tokens; of one text that of all.
  std::int64_t context() const { return context_; }
  /// The residual stream of all windows, [tokens, D], and of one.
  MatrixView<float> rows() { return {stream_.data(), tokens(), D_}; }
  MatrixView<const float> rows() const { return {stream_.data(), tokens(), D_}; }
  MatrixView<float> residual(std::int64_t window) {
    return rows().slice_rows(begin_[window], begin_[window + 1] - begin_[window]);
  }

  /// Runs one window through a layer's attention. Returns what the layer's FFN reads, [window, D];
  /// valid until the next call.
  MatrixView<const float> attend(std::int64_t layer, std::int64_t window);
  /// All windows; `input` [tokens, D] receives what the FFN reads.
  void attend(std::int64_t layer, MatrixView<float> input);
  /// The window's residual stream += y [window, D].
  void add(std::int64_t window, MatrixView<const float> y);
  /// Forgets all windows but the first `count`.
  void keep_windows(std::int64_t count);
  /// The final norm, in place: the stream becomes the hidden states.
  std::vector<float> finish() &&;

 private:
  Model& model_;
  std::int64_t D_, context_ = 0;
  std::vector<std::int64_t> begin_;  // [windows + 1], rows
  std::vector<float> stream_;        // [tokens, D]
  KvCache cache_;
  Buffer normed_;  // [context, D]
};

}  // namespace cleave
