// The arithmetic of core for one instruction set: matrix products and the elementwise operations
// between them, through Eigen. Built once per set in namespace cleave::CLEAVE_ISA, with Eigen's own
// namespace renamed (cmake/isa.cmake); definitions: the *_reference.cpp files one folder up.

#include "kernels/isa/linear_isa.h"

#include <Eigen/Core>
#include <cmath>

namespace cleave::CLEAVE_ISA {
namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Stride = Eigen::OuterStride<>;
using ConstMap = Eigen::Map<const RowMajor, 0, Stride>;
using MutableMap = Eigen::Map<RowMajor, 0, Stride>;
using ConstVector = Eigen::Map<const Eigen::VectorXf>;
using MutableVector = Eigen::Map<Eigen::VectorXf>;
using ConstArray = Eigen::Map<const Eigen::ArrayXf>;
using MutableArray = Eigen::Map<Eigen::ArrayXf>;

// Below so many rows of x, repacking the weight for a GEMM costs more than the GEMM saves: a
// matrix-vector product per row, over weight blocks that stay in a 256 kB cache between the rows.
constexpr std::int64_t kGemmRows = 6;
constexpr std::int64_t kBlockElements = 32 * 1024;

ConstMap map(ConstMatrix m) { return {m.data, m.rows, m.cols, Stride(m.stride)}; }
MutableMap map(MutableMatrix m) { return {m.data, m.rows, m.cols, Stride(m.stride)}; }

void clear(MutableMatrix y) {
  for (std::int64_t r = 0; r < y.rows; ++r) MutableVector(y.data + r * y.stride, y.cols).setZero();
}

void few_rows_nt(ConstMatrix x, ConstMatrix w, MutableMatrix y) {
  const std::int64_t block = x.cols > 0 ? 8 + kBlockElements / x.cols / 8 * 8 : w.rows;
  for (std::int64_t n = 0; n < w.rows; n += block) {
    const std::int64_t count = n + block < w.rows ? block : w.rows - n;
    const ConstMap part(w.data + n * w.stride, count, w.cols, Stride(w.stride));
    for (std::int64_t t = 0; t < x.rows; ++t)
      MutableVector(y.data + t * y.stride + n, count).noalias() +=
          part * ConstVector(x.data + t * x.stride, x.cols);
  }
}

void few_rows_nn(ConstMatrix x, ConstMatrix w, MutableMatrix y) {
  const std::int64_t block = w.cols > 0 ? 8 + kBlockElements / w.cols / 8 * 8 : w.rows;
  for (std::int64_t k = 0; k < w.rows; k += block) {
    const std::int64_t count = k + block < w.rows ? block : w.rows - k;
    const ConstMap part(w.data + k * w.stride, count, w.cols, Stride(w.stride));
    for (std::int64_t t = 0; t < x.rows; ++t)
      MutableVector(y.data + t * y.stride, y.cols).noalias() +=
          part.transpose() * ConstVector(x.data + t * x.stride + k, count);
  }
}

void product_nt(ConstMatrix x, ConstMatrix w, MutableMatrix y, Store store) {
  if (store == Store::kOverwrite) clear(y);
  if (x.rows < kGemmRows)
    few_rows_nt(x, w, y);
  else
    map(y).noalias() += map(x) * map(w).transpose();
}

void product_nn(ConstMatrix x, ConstMatrix w, MutableMatrix y, Store store) {
  if (store == Store::kOverwrite) clear(y);
  if (x.rows < kGemmRows)
    few_rows_nn(x, w, y);
  else
    map(y).noalias() += map(x) * map(w);
}

// Eigen evaluates exp and tanh in packets; erf it has only as a scalar. Models with the exact GELU
// (BERT) run on packed weights, whose kernels have one of their own (panel_activation.h).
void activate_in_place(Activation activation, MutableArray h) {
  switch (activation) {
    case Activation::kSilu:
      h = h / (1.0f + (-h).exp());
      return;
    case Activation::kGelu:
      for (std::int64_t i = 0; i < h.size(); ++i)
        h[i] = 0.5f * h[i] * (1.0f + ::erff(h[i] * 0.70710678f));
      return;
    case Activation::kGeluTanh:
      h = 0.5f * h * (1.0f + (0.79788456f * (h + 0.044715f * h.cube())).tanh());
      return;
    case Activation::kRelu:
      h = h.max(0.0f);
      return;
    case Activation::kRelu2:
      h = h.max(0.0f).square();
      return;
    case Activation::kIdentity:
      return;
  }
}

void activate(Activation activation, const float* gate, const float* up, float* h, std::int64_t n) {
  // In pieces that stay in the first-level cache between the passes.
  constexpr std::int64_t kPiece = 1024;
  alignas(64) float piece[kPiece];
  for (std::int64_t begin = 0; begin < n; begin += kPiece) {
    const std::int64_t count = begin + kPiece < n ? kPiece : n - begin;
    MutableArray act(piece, count);
    act = ConstArray((gate != nullptr ? gate : up) + begin, count);
    activate_in_place(activation, act);
    if (gate != nullptr) act *= ConstArray(up + begin, count);
    MutableArray(h + begin, count) = act;
  }
}

void softmax(float* row, std::int64_t n) {
  MutableArray values(row, n);
  values = (values - values.maxCoeff()).exp();
  values *= 1.0f / values.sum();
}

void rms_norm(const float* x, const float* weight, float eps, float* y, std::int64_t n) {
  const ConstArray in(x, n);
  const float mean = in.square().sum() / static_cast<float>(n);
  MutableArray(y, n) = in * (1.0f / ::sqrtf(mean + eps)) * ConstArray(weight, n);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* y,
                std::int64_t n) {
  // The variance in a second pass: a mean square less the squared mean cancels.
  const ConstArray in(x, n);
  const float mean = in.sum() / static_cast<float>(n);
  const float variance = (in - mean).square().sum() / static_cast<float>(n);
  MutableArray(y, n) =
      (in - mean) * (1.0f / ::sqrtf(variance + eps)) * ConstArray(weight, n) + ConstArray(bias, n);
}

void add(const float* x, float* y, std::int64_t n) { MutableArray(y, n) += ConstArray(x, n); }
void scale(float a, float* x, std::int64_t n) { MutableArray(x, n) *= a; }

double log_sum_exp(const float* row, std::int64_t n) {
  const ConstArray values(row, n);
  const double largest = values.maxCoeff();
  return largest + ::log((values.cast<double>() - largest).exp().sum());
}

std::int64_t first_largest(const float* row, std::int64_t n) {
  const float largest = ConstArray(row, n).maxCoeff();
  std::int64_t i = 0;
  while (i + 1 < n && row[i] != largest) ++i;
  return i;
}

Comparison compare(const float* reference_logits, const float* model_logits, std::int64_t n) {
  const double reference_norm = log_sum_exp(reference_logits, n);
  const double model_norm = log_sum_exp(model_logits, n);
  const auto p = ConstArray(reference_logits, n).cast<double>() - reference_norm;
  const auto q = ConstArray(model_logits, n).cast<double>() - model_norm;
  return {(p.exp() * (p - q)).sum(), first_largest(reference_logits, n),
          first_largest(model_logits, n)};
}

constexpr IsaKernels kKernels = {product_nt, product_nn, activate, softmax,     rms_norm,
                                 layer_norm, add,        scale,    log_sum_exp, compare};

}  // namespace

const IsaKernels& kernels() { return kKernels; }

}  // namespace cleave::CLEAVE_ISA
