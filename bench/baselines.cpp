#include "baselines.h"

#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <map>
#include <type_traits>

#include "ffn_setup.h"

#ifdef CLEAVE_HAVE_DNNL
#include <omp.h>

#include <oneapi/dnnl/dnnl.hpp>
#endif

namespace cleave::bench {
namespace {

#ifdef CLEAVE_HAVE_DNNL
using dnnl::memory;

class OneDnn : public DenseBaseline {
 public:
  OneDnn(const BaselineShape& shape, bool bf16)
      : shape_(shape), bf16_(bf16), engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    omp_set_num_threads(shape.threads);
    for (std::int64_t l = 0; l < shape.layers; ++l)
      for (const auto& [rows, cols] : {std::pair{shape.hidden, shape.d_model},
                                       {shape.hidden, shape.d_model},
                                       {shape.d_model, shape.hidden}})
        weights_.push_back(packed(rows, cols, static_cast<unsigned>(l)));
  }
  std::string name() const override { return bf16_ ? "oneDNN bf16" : "oneDNN f32"; }

  void run(std::int64_t layer, std::int64_t T, const float* x, float* y) override {
    const std::int64_t D = shape_.d_model;
    Plan& plan = plan_for(T);
    memory in = plan.in;
    memory user({{T, D}, memory::data_type::f32, memory::format_tag::ab}, engine_,
                const_cast<float*>(x));
    dnnl::reorder(user, in).execute(stream_, user, in);
    const memory& up = weights_[3 * layer + 1];
    plan.up.execute(stream_,
                    {{DNNL_ARG_SRC, in}, {DNNL_ARG_WEIGHTS, up}, {DNNL_ARG_DST, plan.up_out}});
    // The gate's product with swish and the multiplication by up as post-operations: fused.
    plan.gate.execute(stream_, {{DNNL_ARG_SRC, in},
                                {DNNL_ARG_WEIGHTS, weights_[3 * layer]},
                                {DNNL_ARG_ATTR_MULTIPLE_POST_OP(1) | DNNL_ARG_SRC_1, plan.up_out},
                                {DNNL_ARG_DST, plan.hidden}});
    memory out({{T, D}, memory::data_type::f32, memory::format_tag::ab}, engine_, y);
    plan.down.execute(stream_, {{DNNL_ARG_SRC, plan.hidden},
                                {DNNL_ARG_WEIGHTS, weights_[3 * layer + 2]},
                                {DNNL_ARG_DST, out}});
    stream_.wait();
  }

 private:
  struct Plan {
    dnnl::matmul up, gate, down;
    memory in, up_out, hidden;
  };
  memory::data_type type() const {
    return bf16_ ? memory::data_type::bf16 : memory::data_type::f32;
  }
  memory::desc plain(std::int64_t rows, std::int64_t cols, memory::data_type t) const {
    return {{rows, cols}, t, memory::format_tag::ab};
  }
  memory::desc any(std::int64_t rows, std::int64_t cols) const {
    return {{rows, cols}, type(), memory::format_tag::any};
  }
  dnnl::matmul::primitive_desc product(const memory::desc& src, const memory::desc& weights,
                                       const memory::desc& dst, const dnnl::primitive_attr& attr) {
    return {dnnl::matmul::desc(src, weights, dst), attr, engine_};
  }
  // In the order that oneDNN itself asks for, for a middle-sized batch.
  memory packed(std::int64_t rows, std::int64_t cols, unsigned seed) {
    std::vector<float> values = random_values(rows * cols, seed);
    memory user({{cols, rows}, memory::data_type::f32, memory::format_tag::ba}, engine_,
                values.data());
    const auto wanted =
        product(plain(64, cols, type()), any(cols, rows), plain(64, rows, type()), {})
            .weights_desc();
    memory result(wanted, engine_);
    dnnl::reorder(user, result).execute(stream_, user, result);
    stream_.wait();
    return result;
  }
  Plan& plan_for(std::int64_t T) {
    auto [it, fresh] = plans_.try_emplace(T);
    if (!fresh) return it->second;
    Plan& plan = it->second;
    const std::int64_t D = shape_.d_model, H = shape_.hidden;
    plan.in = memory(plain(T, D, type()), engine_);
    plan.up_out = memory(plain(T, H, type()), engine_);
    plan.hidden = memory(plain(T, H, type()), engine_);
    const memory::desc up_weights = weights_[0].get_desc(), down_weights = weights_[2].get_desc();
    plan.up = product(plain(T, D, type()), up_weights, plain(T, H, type()), {});
    dnnl::post_ops ops;
    ops.append_eltwise(1.0f, dnnl::algorithm::eltwise_swish, 1.0f, 0.0f);
    ops.append_binary(dnnl::algorithm::binary_mul, plain(T, H, type()));
    dnnl::primitive_attr attr;
    attr.set_post_ops(ops);
    plan.gate = product(plain(T, D, type()), up_weights, plain(T, H, type()), attr);
    plan.down = product(plain(T, H, type()), down_weights, plain(T, D, memory::data_type::f32), {});
    return plan;
  }

  BaselineShape shape_;
  bool bf16_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<memory> weights_;
  std::map<std::int64_t, Plan> plans_;
};
#endif

/// Loaded at run time with names of its own: LibTorch brings MKL, whose functions have the same
/// ones, and linked together the two would call each other.
struct OpenBlasLibrary {
  // cblas.h, with its enumerations as the numbers that they are.
  using Sgemm = void(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                     const float* a, int lda, const float* b, int ldb, float beta, float* c,
                     int ldc);
  static constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
  Sgemm* sgemm = nullptr;
  void (*set_num_threads)(int) = nullptr;
  char* (*get_config)() = nullptr;

  OpenBlasLibrary() {
    void* library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    if (library == nullptr) return;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    if (!find(set_num_threads, "openblas_set_num_threads") ||
        !find(get_config, "openblas_get_config") || !find(sgemm, "cblas_sgemm"))
      sgemm = nullptr;
  }
  static const OpenBlasLibrary& get() {
    static const OpenBlasLibrary library;
    return library;
  }
};

class OpenBlas : public DenseBaseline {
 public:
  explicit OpenBlas(const BaselineShape& shape) : shape_(shape) {
    OpenBlasLibrary::get().set_num_threads(shape.threads);
    for (std::int64_t l = 0; l < shape.layers; ++l)
      for (int matrix = 0; matrix < 3; ++matrix)
        weights_.push_back(random_values(shape.hidden * shape.d_model, static_cast<unsigned>(l)));
  }
  std::string name() const override { return "OpenBLAS f32"; }
  void run(std::int64_t layer, std::int64_t T, const float* x, float* y) override {
    const std::int64_t D = shape_.d_model, H = shape_.hidden;
    gate_.resize(T * H);
    up_.resize(T * H);
    product(T, H, D, x, weights_[3 * layer], gate_.data());
    product(T, H, D, x, weights_[3 * layer + 1], up_.data());
    for (std::int64_t i = 0; i < T * H; ++i)
      gate_[i] = gate_[i] / (1.0f + std::exp(-gate_[i])) * up_[i];
    product(T, D, H, gate_.data(), weights_[3 * layer + 2], y);
  }

 private:
  static void product(std::int64_t M, std::int64_t N, std::int64_t K, const float* a,
                      const std::vector<float>& b, float* c) {
    using Library = OpenBlasLibrary;
    Library::get().sgemm(Library::kRowMajor, Library::kNoTrans, Library::kTrans,
                         static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), 1.0f, a,
                         static_cast<int>(K), b.data(), static_cast<int>(K), 0.0f, c,
                         static_cast<int>(N));
  }
  BaselineShape shape_;
  std::vector<std::vector<float>> weights_;
  std::vector<float> gate_, up_;
};

}  // namespace

std::string onednn_version() {
#ifdef CLEAVE_HAVE_DNNL
  const dnnl_version_t* v = dnnl_version();
  return std::to_string(v->major) + '.' + std::to_string(v->minor) + '.' + std::to_string(v->patch);
#else
  return {};
#endif
}

std::unique_ptr<DenseBaseline> onednn_baseline([[maybe_unused]] const BaselineShape& shape,
                                               [[maybe_unused]] bool bf16) {
#ifdef CLEAVE_HAVE_DNNL
  try {
    return std::make_unique<OneDnn>(shape, bf16);
  } catch (const dnnl::error& error) {
    if (error.status != dnnl_unimplemented) throw;  // bfloat16 on a processor without AVX-512
  }
#endif
  return nullptr;
}

std::string openblas_version() {
  const OpenBlasLibrary& library = OpenBlasLibrary::get();
  return library.sgemm == nullptr ? std::string() : library.get_config();
}

std::unique_ptr<DenseBaseline> openblas_baseline(const BaselineShape& shape) {
  if (OpenBlasLibrary::get().sgemm == nullptr) return nullptr;
  return std::make_unique<OpenBlas>(shape);
}

#ifndef CLEAVE_HAVE_TORCH  // else torch_experts.cpp
std::string torch_version() { return {}; }
std::unique_ptr<SparseBaseline> torch_baseline(const BaselineShape&, std::int64_t, bool) {
  return nullptr;
}
#endif

}  // namespace cleave::bench
