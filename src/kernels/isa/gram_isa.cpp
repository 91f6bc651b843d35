// Products over tokens and Cholesky for one instruction set, through Eigen (see linear_isa.cpp).

#include "kernels/isa/gram_isa.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>

namespace cleave::CLEAVE_ISA {
namespace {

using GramMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using GramStride = Eigen::OuterStride<>;
using DoubleRows = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using DoubleColumns = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;

void product_tn(ConstMatrix x, ConstMatrix w, MutableMatrix y) {
  const Eigen::Map<const GramMatrix, 0, GramStride> left(x.data, x.rows, x.cols,
                                                         GramStride(x.stride));
  const Eigen::Map<const GramMatrix, 0, GramStride> right(w.data, w.rows, w.cols,
                                                          GramStride(w.stride));
  Eigen::Map<GramMatrix, 0, GramStride> out(y.data, y.rows, y.cols, GramStride(y.stride));
  out.noalias() += left.transpose() * right;
}

bool cholesky(double* a, std::int64_t n) {
  Eigen::Map<DoubleRows> matrix(a, n, n);
  Eigen::LLT<Eigen::Ref<DoubleRows>, Eigen::Lower> factor(matrix);
  return factor.info() == Eigen::Success;
}

void cholesky_solve(const double* factor, std::int64_t n, double* b, std::int64_t rows) {
  const Eigen::Map<const DoubleRows> lower(factor, n, n);
  Eigen::Map<DoubleColumns> columns(b, n, rows);  // a row of b is a column here
  lower.triangularView<Eigen::Lower>().solveInPlace(columns);
  lower.transpose().triangularView<Eigen::Upper>().solveInPlace(columns);
}

constexpr GramKernels kGramKernels = {product_tn, cholesky, cholesky_solve};

}  // namespace

const GramKernels& gram_kernels() { return kGramKernels; }

}  // namespace cleave::CLEAVE_ISA
