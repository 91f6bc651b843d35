#include "attention.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/dispatch.h"
#include "support/buffer.h"

namespace cleave {
namespace {

// Rows of one score block: enough for a product to be worth its repacking, few enough for a block
// of 1024 keys to stay in a second-level cache.
constexpr std::int64_t kScoreRows = 192;

// Llama 3.1's stretching: long wavelengths are divided by `factor`, short ones kept, and between
// the two thresholds the share moves linearly (as in Transformers' "llama3" rope type).
double llama3_frequency(const RopeConfig& rope, double frequency) {
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  const auto original = static_cast<double>(rope.original_max_position_embeddings);
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

// The query heads of one key/value head, for queries [first, first + count): they meet the same
// keys, so their rows are stacked into one product.
struct Block {
  std::int64_t kv_head;
  std::int64_t first;
  std::int64_t count;
};

class Attention {
 public:
  Attention(const AttentionShape& shape, MatrixView<const float> q, MatrixView<const float> keys,
            MatrixView<const float> values, MatrixView<float> out)
      : shape_(shape), q_(q), keys_(keys), values_(values), out_(out) {
    group_ = shape.num_heads / shape.num_kv_heads;
    past_ = keys.rows - q.rows;
    rows_ = std::min(q.rows, std::max<std::int64_t>(1, kScoreRows / group_));
    blocks_ = (q.rows + rows_ - 1) / rows_;
  }

  void run(const ParallelFor& parallel) const {
    parallel(shape_.num_kv_heads * blocks_, 1, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t stacked = rows_ * group_;
      Buffer q(stacked * shape_.head_dim), out(stacked * shape_.head_dim);
      Buffer scores(stacked * keys_.rows);
      for (std::int64_t i = begin; i < end; ++i) run_block(block(i), q, scores, out);
    });
  }

 private:
  // Later queries see more keys. Blocks from the two ends in turn: any range of them costs about
  // the same.
  Block block(std::int64_t i) const {
    const std::int64_t in_head = i % blocks_;
    const std::int64_t b = in_head % 2 == 0 ? in_head / 2 : blocks_ - 1 - in_head / 2;
    return {i / blocks_, b * rows_, std::min(rows_, q_.rows - b * rows_)};
  }

  // First key that the query at `position` sees.
  std::int64_t first_key(std::int64_t position) const {
    return shape_.sliding_window > 0
               ? std::max<std::int64_t>(0, position - shape_.sliding_window + 1)
               : 0;
  }

  // Stacked row r belongs to query first + r / group and head kv_head * group + r % group, whose
  // components lie `group` heads side by side: a stacked block is group * head_dim wide rows.
  void copy_heads(const Block& b, MatrixView<const float> from, float* stacked) const {
    const std::int64_t width = group_ * shape_.head_dim;
    for (std::int64_t t = 0; t < b.count; ++t)
      std::copy_n(from.row(b.first + t) + b.kv_head * width, width, stacked + t * width);
  }

  void mask_and_softmax(const Block& b, std::int64_t key_begin, MatrixView<float> scores) const {
    for (std::int64_t r = 0; r < scores.rows; ++r) {
      const std::int64_t position = past_ + b.first + r / group_;
      const std::int64_t from = first_key(position) - key_begin, to = position + 1 - key_begin;
      float* row = scores.row(r);
      std::fill(row, row + from, 0.0f);
      isa_kernels().softmax(row + from, to - from);
      std::fill(row + to, row + scores.cols, 0.0f);
    }
  }

  void run_block(const Block& b, const Buffer& q, const Buffer& scores_room,
                 const Buffer& out) const {
    const IsaKernels& isa = isa_kernels();
    const std::int64_t d = shape_.head_dim, rows = b.count * group_;
    const std::int64_t key_begin = first_key(past_ + b.first);
    const std::int64_t num_keys = past_ + b.first + b.count - key_begin;
    const ConstMatrix k{keys_.row(key_begin) + b.kv_head * d, num_keys, d, keys_.row_stride};
    const ConstMatrix v{values_.row(key_begin) + b.kv_head * d, num_keys, d, values_.row_stride};
    const MatrixView<float> scores(scores_room.data(), rows, num_keys);
    copy_heads(b, q_, q.data());
    isa.product_nt({q.data(), rows, d, d}, k, plain(scores), Store::kOverwrite);
    mask_and_softmax(b, key_begin, scores);
    isa.product_nn(plain(MatrixView<const float>(scores)), v, {out.data(), rows, d, d},
                   Store::kOverwrite);
    const std::int64_t width = group_ * d;
    for (std::int64_t t = 0; t < b.count; ++t)
      std::copy_n(out.data() + t * width, width, out_.row(b.first + t) + b.kv_head * width);
  }

  AttentionShape shape_;
  MatrixView<const float> q_, keys_, values_;
  MatrixView<float> out_;
  std::int64_t group_ = 1;   // query heads per key/value head
  std::int64_t past_ = 0;    // tokens before the first query
  std::int64_t rows_ = 1;    // queries per block
  std::int64_t blocks_ = 0;  // per key/value head
};

}  // namespace

Rope::Rope(const RopeConfig& config, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < head_dim / 2; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(head_dim);
    double frequency = 1.0f / static_cast<float>(std::pow(config.theta, exponent));
    if (config.type == RopeConfig::Type::kLinear) frequency /= config.factor;
    if (config.type == RopeConfig::Type::kLlama3) frequency = llama3_frequency(config, frequency);
    inverse_frequencies_.push_back(static_cast<float>(frequency));
  }
}

void Rope::angles(std::int64_t position, float* cosine, float* sine) const {
  for (std::size_t i = 0; i < inverse_frequencies_.size(); ++i) {
    const float angle = static_cast<float>(position) * inverse_frequencies_[i];
    cosine[i] = std::cos(angle);
    sine[i] = std::sin(angle);
  }
}

void Rope::rotate(const float* cosine, const float* sine, float factor, std::int64_t head_dim,
                  float* head) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = factor * (a * cosine[i] - b * sine[i]);
    head[i + half] = factor * (b * cosine[i] + a * sine[i]);
  }
}

void attention(const AttentionShape& shape, MatrixView<const float> q, MatrixView<const float> keys,
               MatrixView<const float> values, MatrixView<float> out, const ParallelFor& parallel) {
  if (q.rows == 0) return;
  Attention(shape, q, keys, values, out).run(parallel);
}

}  // namespace cleave
