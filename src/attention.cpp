#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>

#include "kernels/dispatch.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

// Rows of queries that go through the keys together: enough for a block of keys to be worth its way
// from memory, few enough for them and the block to stay in a second-level cache.
constexpr std::int64_t kStackedRows = 192;
// Below so many multiply-adds a share is not worth another thread.
constexpr std::int64_t kShareMacs = 32 * 1024;
// Keys of one head that are worth a share of their own.
constexpr std::int64_t kShareKeys = 64;
constexpr std::int64_t kKeyBlock = KvLayout::kKeyBlock;
static_assert(kKeyBlock == kTileSteps);  // the keys of a block are the steps of a value panel

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

// The query heads of one key/value head, for queries [first, first + count) and keys
// [key_begin, key_end): the heads meet the same keys, so their rows are stacked. Row r belongs to
// query first + r / group and head kv_head * group + r % group.
struct Item {
  std::int64_t kv_head;
  std::int64_t first;
  std::int64_t count;
  std::int64_t key_begin;
  std::int64_t key_end;
};

class Attention {
 public:
  Attention(const AttentionShape& shape, MatrixView<const float> q, const KvLayout& layout,
            const float* cache, std::int64_t tokens, MatrixView<float> out)
      : shape_(shape), q_(q), layout_(layout), cache_(cache), tokens_(tokens), out_(out) {
    group_ = shape.num_heads / shape.num_kv_heads;
    past_ = tokens - q.rows;
    queries_ = std::min(q.rows, std::max<std::int64_t>(1, kStackedRows / group_));
    blocks_ = (q.rows + queries_ - 1) / queries_;
    rows_ = queries_ * group_;
    width_ = layout.value_panels() * kPanelWidth;
  }

  void run(Workspace& workspace, const ParallelFor& parallel) {
    const std::int64_t parts = std::max(1, parallel.threads);
    choose_splits(parts);
    const std::int64_t items = shape_.num_kv_heads * blocks_ * splits_;
    const std::int64_t macs = shape_.num_heads * q_.rows * tokens_ * shape_.head_dim * 2;
    const std::int64_t shares = std::clamp<std::int64_t>(macs / kShareMacs, 1, parts);
    const std::int64_t results = splits_ > 1 ? items : shares;
    const std::int64_t floats = results * result_size() + shares * scratch_size();
    auto* memory =
        reinterpret_cast<float*>(workspace.get(static_cast<std::size_t>(floats) * sizeof(float) +
                                               static_cast<std::size_t>(splits_) * sizeof(Result)));
    parallel(shares, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t share = begin; share < end; ++share) {
        float* scratch = memory + results * result_size() + share * scratch_size();
        for (std::int64_t i = items * share / shares; i < items * (share + 1) / shares; ++i) {
          const Result result = result_at(memory, splits_ > 1 ? i : share);
          run_item(item(i), scratch, result);
          if (splits_ == 1) write(item(i), {&result, 1});
        }
      }
    });
    if (splits_ == 1) return;
    const std::span pieces(reinterpret_cast<Result*>(memory + floats),
                           static_cast<std::size_t>(splits_));
    for (std::int64_t i = 0; i < items; i += splits_) {
      for (std::int64_t s = 0; s < splits_; ++s) pieces[s] = result_at(memory, i + s);
      write(item(i), pieces);
    }
  }

 private:
  // Of an item, per row: sum over keys of exp(score - largest) * value.
  struct Result {
    float* context;        // [rows, width]
    SoftmaxState* states;  // [rows]
  };

  // With few items, keys are cut as well, so that every thread gets as many.
  void choose_splits(std::int64_t parts) {
    const std::int64_t items = shape_.num_kv_heads * blocks_;
    splits_ = 1;
    if (items % parts == 0 || items >= 4 * parts) return;
    const std::int64_t even = parts / std::gcd(items, parts);
    splits_ = std::clamp<std::int64_t>(visible_keys(0, q_.rows) / kShareKeys, 1, even);
  }

  std::int64_t num_tiles() const { return TiledRows::num_tiles(rows_); }
  std::int64_t result_size() const { return rounded(rows_ * (width_ + 2)); }
  Result result_at(float* memory, std::int64_t i) const {
    float* context = memory + i * result_size();
    return {context, reinterpret_cast<SoftmaxState*>(context + rows_ * width_)};
  }
  // Queries in tiles, the scores of one tile, and room for rows that only fill the last tile.
  std::int64_t scratch_size() const {
    return rounded(TiledRows::size(rows_, shape_.head_dim) + kTileRows * kTileStride + width_);
  }
  static std::int64_t rounded(std::int64_t floats) { return (floats + 15) / 16 * 16; }

  // First key that the query at `position` sees.
  std::int64_t first_key(std::int64_t position) const {
    return shape_.sliding_window > 0
               ? std::max<std::int64_t>(0, position - shape_.sliding_window + 1)
               : 0;
  }
  // One after the last.
  std::int64_t end_key(std::int64_t position) const {
    return shape_.causal ? position + 1 : tokens_;
  }
  std::int64_t position(std::int64_t query) const { return past_ + query; }
  std::int64_t visible_keys(std::int64_t first, std::int64_t count) const {
    return end_key(position(first + count - 1)) - first_key(position(first));
  }

  // Later queries see more keys. Blocks from the two ends in turn: any range of them costs about
  // the same. Cuts between keys are at whole panels.
  Item item(std::int64_t i) const {
    const std::int64_t split = i % splits_, in_head = i / splits_ % blocks_;
    const std::int64_t b = in_head % 2 == 0 ? in_head / 2 : blocks_ - 1 - in_head / 2;
    Item item{i / splits_ / blocks_, b * queries_, std::min(queries_, q_.rows - b * queries_), 0,
              0};
    const std::int64_t from = first_key(position(item.first)) / kPanelWidth;
    const std::int64_t end = end_key(position(item.first + item.count - 1));
    const std::int64_t to = (end + kPanelWidth - 1) / kPanelWidth;
    item.key_begin = (from + (to - from) * split / splits_) * kPanelWidth;
    item.key_end = std::min(end, (from + (to - from) * (split + 1) / splits_) * kPanelWidth);
    return item;
  }

  void run_item(const Item& item, float* scratch, const Result& result) const {
    const std::int64_t rows = item.count * group_;
    const TiledRows queries(scratch, shape_.head_dim);
    float* scores = scratch + TiledRows::size(rows_, shape_.head_dim);
    set_queries(item, queries);
    std::fill_n(result.context, rows * width_, 0.0f);
    std::fill_n(result.states, rows, SoftmaxState{-std::numeric_limits<float>::infinity(), 0.0f});
    for (std::int64_t key = item.key_begin; key < item.key_end;) {
      const std::int64_t end = std::min(item.key_end, (key / kKeyBlock + 1) * kKeyBlock);
      for (std::int64_t t = 0; t < TiledRows::num_tiles(rows); ++t)
        run_tile(item, t, key, end, queries, scores, result);
      key = end;
    }
  }

  void set_queries(const Item& item, const TiledRows& queries) const {
    const std::int64_t d = shape_.head_dim, rows = item.count * group_;
    for (std::int64_t r = 0; r < rows; ++r)
      queries.set_row(r, q_.row(item.first + r / group_) + (item.kv_head * group_ + r % group_) * d,
                      d);
    // The tile kernels run on whole groups of rows, and what is not there might be slow to
    // multiply.
    for (std::int64_t r = rows; r % 4 != 0; ++r)
      for (std::int64_t b = 0; b < queries.blocks(); ++b)
        std::fill_n(queries.block(r / kTileRows, b) + r % kTileRows * kTileStride, kTileSteps,
                    0.0f);
  }

  // Keys [key, key_end), all of one block, for the rows of one tile.
  void run_tile(const Item& item, std::int64_t tile, std::int64_t key, std::int64_t key_end,
                const TiledRows& queries, float* scores, const Result& result) const {
    const std::int64_t row = tile * kTileRows, all = item.count * group_;
    const std::int64_t rows = std::min<std::int64_t>(kTileRows, all - row);
    const std::int64_t last = position(item.first + (row + rows - 1) / group_);
    const std::int64_t from = first_key(position(item.first + row / group_));
    key_end = std::min(key_end, end_key(last));
    if (key >= key_end || from >= key_end) return;
    const float* block =
        cache_ + item.kv_head * layout_.head_size() + key / kKeyBlock * layout_.block_size();
    const std::int64_t first = key % kKeyBlock, count = key_end - key;
    score(block + first * shape_.head_dim, count, queries, tile, all, scores);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = position(item.first + (row + r) / group_);
      mask(first_key(at) - key, end_key(at) - key, count, scores + r * kTileStride);
      const float factor =
          rows_isa_.softmax_block(scores + r * kTileStride, count, result.states + row + r);
      if (factor != 1.0f) isa_.scale(factor, result.context + (row + r) * width_, width_);
    }
    Rows sums;
    for (std::int64_t r = 0; r < kTileRows; ++r)
      sums[r] = r < rows ? result.context + (row + r) * width_ : scores + kTileRows * kTileStride;
    multiply({block + kKeyBlock * shape_.head_dim + first * kPanelWidth, count,
              layout_.value_panels(), kKeyBlock * kPanelWidth, scores, true},
             all, tile, sums);
  }

  using Rows = float* [kTileRows];

  /// y[r][32 i + lane] (+)= sum over s < steps of x[r * kTileStride + s] * panel_i[s][lane].
  struct Product {
    const float* panel;
    std::int64_t steps;
    std::int64_t panels;
    std::int64_t panel_size;  // floats between two panels
    const float* x;
    bool add;
  };

  // For the rows of one tile, of `all` rows. Few rows wait for memory, so they take the kernel that
  // fetches ahead; it may write up to the next power of two, the tile kernel up to the next 4.
  void multiply(const Product& p, std::int64_t all, std::int64_t tile, const Rows& y) const {
    if (all <= kMaxPanelRows) {
      const float* x[kMaxPanelRows];
      for (int r = 0; r < kMaxPanelRows; ++r)
        x[r] = p.x + std::min<std::int64_t>(r, all - 1) * kTileStride;
      return kernels_.multiply[static_cast<int>(PanelFormat::kF32)][panel_rows_index(all)](
          {p.panel, nullptr, p.steps, p.panels, p.panel_size * 4, x, nullptr, y, p.add,
           reinterpret_cast<const char*>(p.panel) + kPrefetchBytes});
    }
    const auto kernel = tile_kernel(kernels_, all, tile);
    if (p.panels == 1 || p.panel_size == p.steps * kPanelWidth)
      return kernel({p.panel, p.steps, p.panels, p.x, y, p.add, nullptr});
    for (std::int64_t i = 0; i < p.panels; ++i) {
      Rows column;
      for (std::int64_t r = 0; r < kTileRows; ++r) column[r] = y[r] + i * kPanelWidth;
      kernel({p.panel + i * p.panel_size, p.steps, 1, p.x, column, p.add, nullptr});
    }
  }

  // scores [rows, kTileStride] = queries times keys, whole panels of them.
  void score(const float* keys, std::int64_t count, const TiledRows& queries, std::int64_t tile,
             std::int64_t all, float* scores) const {
    const std::int64_t d = shape_.head_dim, panels = (count + kPanelWidth - 1) / kPanelWidth;
    Rows y;
    for (std::int64_t r = 0; r < kTileRows; ++r) y[r] = scores + r * kTileStride;
    for (std::int64_t b = 0; b < queries.blocks(); ++b)
      multiply({keys + b * kTileSteps * kPanelWidth, std::min(kTileSteps, d - b * kTileSteps),
                panels, d * kPanelWidth, queries.block(tile, b), b > 0},
               all, tile, y);
  }

  static void mask(std::int64_t from, std::int64_t to, std::int64_t count, float* row) {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    if (from > 0) std::fill(row, row + std::min(from, count), kNever);
    if (to < count) std::fill(row + std::max<std::int64_t>(to, 0), row + count, kNever);
  }

  // Joins what the pieces of an item's keys gave.
  void write(const Item& item, std::span<const Result> pieces) const {
    const std::int64_t d = shape_.head_dim;
    for (std::int64_t r = 0; r < item.count * group_; ++r) {
      float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
      for (const Result& piece : pieces) largest = std::max(largest, piece.states[r].largest);
      const auto weight = [&](const Result& piece) {
        return pieces.size() == 1 ? 1.0f : std::exp(piece.states[r].largest - largest);
      };
      for (const Result& piece : pieces) sum += weight(piece) * piece.states[r].sum;
      float* out = out_.row(item.first + r / group_) + (item.kv_head * group_ + r % group_) * d;
      std::fill_n(out, d, 0.0f);
      for (const Result& piece : pieces)
        rows_isa_.add_scaled(weight(piece) / sum, piece.context + r * width_, out, d);
    }
  }

  AttentionShape shape_;
  MatrixView<const float> q_;
  KvLayout layout_;
  const float* cache_;
  std::int64_t tokens_;
  MatrixView<float> out_;
  std::int64_t group_ = 1;    // query heads per key/value head
  std::int64_t past_ = 0;     // tokens before the first query
  std::int64_t queries_ = 1;  // per block
  std::int64_t blocks_ = 0;   // per key/value head
  std::int64_t rows_ = 1;     // stacked, of a block
  std::int64_t width_ = 0;    // of a row of context: whole panels
  std::int64_t splits_ = 1;   // pieces of a block's keys
  const PanelKernels& kernels_ = panel_kernels();
  const RowKernels& rows_isa_ = row_kernels();
  const IsaKernels& isa_ = isa_kernels();
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

void store_keys_and_values(const KvLayout& layout, MatrixView<const float> keys,
                           MatrixView<const float> values, std::int64_t position, float* cache) {
  const std::int64_t d = layout.head_dim;
  for (std::int64_t h = 0; h < layout.num_kv_heads; ++h)
    for (std::int64_t row = 0; row < keys.rows;) {
      const std::int64_t token = position + row, in_block = token % kKeyBlock;
      const std::int64_t lane = token % kPanelWidth;
      const std::int64_t count = std::min(keys.rows - row, kPanelWidth - lane);
      float* block = cache + h * layout.head_size() + token / kKeyBlock * layout.block_size();
      float* panel = block + in_block / kPanelWidth * kPanelWidth * d + lane;
      for (std::int64_t c = 0; c < d; ++c)
        for (std::int64_t t = 0; t < count; ++t)
          panel[c * kPanelWidth + t] = keys(row + t, h * d + c);
      float* value = block + kKeyBlock * d + in_block * kPanelWidth;
      for (std::int64_t c = 0; c < d; c += kPanelWidth, value += kKeyBlock * kPanelWidth)
        for (std::int64_t t = 0; t < count; ++t)
          std::copy_n(values.row(row + t) + h * d + c, std::min(kPanelWidth, d - c),
                      value + t * kPanelWidth);
      row += count;
    }
}

void attention(const AttentionShape& shape, MatrixView<const float> q, const KvLayout& layout,
               const float* cache, std::int64_t tokens, MatrixView<float> out, Workspace& workspace,
               const ParallelFor& parallel) {
  if (q.rows == 0) return;
  Attention(shape, q, layout, cache, tokens, out).run(workspace, parallel);
}

}  // namespace cleave
