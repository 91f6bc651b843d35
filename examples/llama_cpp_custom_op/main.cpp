// llama.cpp runs a model - embedding, attention, KV cache, head, all of it its own - with our
// kernels as the FFN nodes of its graph, on its own threads. Are the logits the same, and which is
// faster?
//
//   llama_cpp_custom_op MODEL [--threads N] [--tokens T] [--generate N] [--repeats N]
//
// MODEL is a dense Llama or a Mixtral directory that `cleave convert` wrote (`--experts N --active
// K`; conversions to a budget are GraniteMoeShared, which this example does not handle). Equality
// is judged with float32 weights, the speed is that of bfloat16 ones. Exit code 1 if the logits
// differ by more than rounding explains.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>

#include "gguf_writer.h"
#include "hook.h"
#include "llama_session.h"

namespace {

using Tokens = std::vector<llama_token>;

struct Options {
  std::string model;
  int threads = 2;
  std::int64_t tokens = 128;
  std::int64_t generate = 64;
  std::int64_t repeats = 5;
};

/// A session whose graphs are built with `hook`'s FFNs; llama.cpp's own with nullptr.
class Runner {
 public:
  Runner(const LlamaModel& model, const LlamaSession::Spec& spec, FfnHook* hook)
      : hook_(activate(hook)), session_(model, spec) {}

  void clear() { session_.clear(); }
  void decode(std::span<const llama_token> tokens, bool all = false) {
    activate(hook_);
    session_.decode(tokens, all);
  }
  /// Logits [T, V] of all tokens: of one batch, or of one token at a time.
  std::vector<float> logits(const Tokens& tokens, bool one_by_one = false) {
    clear();
    std::vector<float> all;
    const auto append = [&](std::int64_t i) {
      const auto row = session_.logits(i);
      all.insert(all.end(), row.begin(), row.end());
    };
    if (!one_by_one) decode(tokens, true);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (one_by_one) decode({&tokens[i], 1});
      append(one_by_one ? -1 : static_cast<std::int64_t>(i));
    }
    return all;
  }
  llama_token best() const {
    const auto row = session_.logits();
    return static_cast<llama_token>(std::max_element(row.begin(), row.end()) - row.begin());
  }

 private:
  static FfnHook* activate(FfnHook* hook) { return active_hook = hook; }
  FfnHook* hook_;
  LlamaSession session_;
};

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - b[i]);
    if (!(difference <= largest)) largest = difference;  // a NaN stays
  }
  return largest;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Median over tokens of the root mean square difference of their logits: an expert that is chosen
/// or not by the last digit moves one token, not the median.
double typical_difference(const std::vector<float>& a, const std::vector<float>& b,
                          std::size_t vocab) {
  std::vector<double> of_token;
  for (std::size_t t = 0; t < a.size(); t += vocab) {
    double sum = 0.0;
    for (std::size_t i = t; i < t + vocab; ++i)
      sum += std::pow(static_cast<double>(a[i]) - b[i], 2);
    of_token.push_back(std::sqrt(sum / static_cast<double>(vocab)));
  }
  return median(of_token);
}

/// All layers' FFNs, packed for our kernels.
std::vector<FfnOp> pack(const std::vector<cleave::ExpertBank>& banks, std::int64_t active,
                        cleave::WeightType type, FfnOp::Shared& shared) {
  std::vector<FfnOp> ops;
  ops.reserve(banks.size());
  for (const cleave::ExpertBank& bank : banks) ops.emplace_back(bank, active, type, shared);
  return ops;
}

bool report(const char* what, double value, double allowed, const char* allowed_is) {
  const bool good = value <= allowed;
  std::printf("%-44s %9.2e   allowed %.2e (%s)%s\n", what, value, allowed, allowed_is,
              good ? "" : "   FAILED");
  return good;
}

class Comparison {
 public:
  explicit Comparison(const Options& options)
      : o_(options), model_(cleave::Checkpoint::open(options.model)) {
    const cleave::ModelConfig& c = model_.config();
    for (std::int64_t l = 0; l < c.num_layers; ++l) banks_.push_back(read_experts(model_, l));
    active_ = c.is_moe() ? c.experts_per_token : 1;
    shared_.threads = o_.threads;
    // As many tokens as timing needs; what they are matters only for the choice of experts.
    for (std::int64_t t = 0; t < o_.tokens; ++t)
      tokens_.push_back(static_cast<llama_token>((t * 7919 + 13) % c.vocab_size));
    std::printf("%s: %lld layers, D %lld, ", o_.model.c_str(), static_cast<long long>(c.num_layers),
                static_cast<long long>(c.hidden_size));
    if (c.is_moe())
      std::printf("%lld of %lld experts of %lld", static_cast<long long>(active_),
                  static_cast<long long>(c.num_experts),
                  static_cast<long long>(c.intermediate_size));
    else
      std::printf("dense FFN of %lld", static_cast<long long>(c.intermediate_size));
    std::printf("; %d threads of ggml, %s\n", o_.threads, cleave::isa_name());
  }

  /// @return whether all is equal
  bool run() {
    const bool equal = float32();
    return bfloat16() && equal;
  }

 private:
  LlamaSession::Spec spec(bool exact_attention) const {
    return {o_.threads, o_.tokens + o_.generate, exact_attention};
  }

  bool float32() {
    std::printf("\nfloat32 weights, %zu tokens\n", tokens_.size());
    const TemporaryGguf file(model_, GGML_TYPE_F32);
    const LlamaModel model(file.path());
    vocab_ = static_cast<std::size_t>(model.vocab_size());
    std::vector<FfnOp> ops = pack(banks_, active_, cleave::WeightType::kF32, shared_);
    FfnHook beside{FfnHook::Mode::kCompare, &ops, &banks_, 0, {}};
    FfnHook ours{FfnHook::Mode::kCleave, &ops, nullptr, 0, {}};

    // A batch and single tokens: two ways through our kernels. Few: the definition is slow.
    Runner compared(model, spec(true), &beside);
    const std::size_t batch = std::min<std::size_t>(16, tokens_.size());
    compared.decode({tokens_.data(), batch});
    compared.decode({tokens_.data(), 1});
    std::printf("%lld FFN outputs, largest difference %.2e\n",
                static_cast<long long>(beside.worst.outputs), beside.worst.difference);
    bool good = report("the same, of what rounding allows", beside.worst.share, 1.0,
                       "eps x terms x sum of |terms|");
    if (beside.worst.outputs == 0) throw std::runtime_error("no FFN went through the hook");

    Runner llama(model, spec(true), nullptr), cleave(model, spec(true), &ours);
    exact_ = llama.logits(tokens_);
    const double noise = largest_difference(exact_, llama.logits(tokens_, /*one_by_one=*/true));
    constexpr const char* kWhy = "4 x llama.cpp, batch to single";
    good &= report("logits of a batch, largest difference",
                   largest_difference(exact_, cleave.logits(tokens_)), 4.0 * noise, kWhy);
    good &= report("logits of single tokens, largest difference",
                   largest_difference(exact_, cleave.logits(tokens_, true)), 4.0 * noise, kWhy);
    return good;
  }

  bool bfloat16() {
    std::printf("\nbfloat16 weights\n");
    const TemporaryGguf file(model_, GGML_TYPE_BF16);
    const LlamaModel model(file.path());
    std::vector<FfnOp> ops = pack(banks_, active_, cleave::WeightType::kBF16, shared_);
    FfnHook ours{FfnHook::Mode::kCleave, &ops, nullptr, 0, {}};
    Runner llama(model, spec(false), nullptr), cleave(model, spec(false), &ours);
    // ggml rounds the inputs of its products to bfloat16 as well, we do so only in prompts and with
    // AVX512-BF16: so not "equal to llama.cpp" is asked, but "as near to float32 as llama.cpp is".
    const double own = typical_difference(llama.logits(tokens_), exact_, vocab_);
    const bool good = report("logits, typical difference from float32",
                             typical_difference(cleave.logits(tokens_), exact_, vocab_), 1.5 * own,
                             "1.5 x llama.cpp's");
    speeds(llama, cleave);
    return good;
  }

  void speeds(Runner& llama, Runner& cleave) {
    Runner* const runners[] = {&llama, &cleave};
    std::vector<double> prompt[2], token[2];
    for (std::int64_t round = -1; round < o_.repeats; ++round)
      for (int i = 0; i < 2; ++i) {
        runners[i]->clear();
        const double p = seconds([&] { runners[i]->decode(tokens_); });
        const double g = seconds([&] {
          for (std::int64_t n = 0; n < o_.generate; ++n) {
            const llama_token next = runners[i]->best();
            runners[i]->decode({&next, 1});
          }
        });
        if (round < 0) continue;  // the first one warms up
        prompt[i].push_back(p / static_cast<double>(o_.tokens));
        token[i].push_back(g / static_cast<double>(o_.generate));
      }
    std::printf("%-24s %14s %14s\n", "ms per token, median", "llama.cpp", "with our FFNs");
    print_row("T = " + std::to_string(o_.tokens), median(prompt[0]), median(prompt[1]));
    print_row("T = 1", median(token[0]), median(token[1]));
  }

  static void print_row(const std::string& what, double own, double ours) {
    std::printf("%-24s %14.3f %14.3f   %.2fx\n", what.c_str(), 1e3 * own, 1e3 * ours, own / ours);
  }
  static double seconds(const std::function<void()>& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  Options o_;
  cleave::Checkpoint model_;
  std::vector<cleave::ExpertBank> banks_;
  std::int64_t active_ = 1;
  FfnOp::Shared shared_;
  Tokens tokens_;
  std::vector<float> exact_;  // logits [T, V] of llama.cpp's own graph with float32 weights
  std::size_t vocab_ = 0;
};

constexpr const char* kUsage =
    "usage: llama_cpp_custom_op MODEL [--threads N] [--tokens T] [--generate N] [--repeats N]\n"
    "MODEL: a dense Llama (directory or GGUF), or a Mixtral directory that cleave convert wrote\n"
    "       (--experts N --active K; GraniteMoeShared, from --active-share, is not handled here)\n";

bool parse(int argc, char** argv, Options& o) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      if (!o.model.empty()) return false;
      o.model = name;
      continue;
    }
    char* end = nullptr;
    const long value = i + 1 < argc ? std::strtol(argv[++i], &end, 10) : 0;
    if (value < 1 || value > 100'000 || *end != '\0') return false;
    if (name == "--threads")
      o.threads = static_cast<int>(value);
    else if (name == "--tokens")
      o.tokens = value;
    else if (name == "--generate")
      o.generate = value;
    else if (name == "--repeats")
      o.repeats = value;
    else
      return false;
  }
  return !o.model.empty();
}

}  // namespace

int main(int argc, char** argv) try {
  Options options;
  if (!parse(argc, argv, options)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  return Comparison(options).run() ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "llama_cpp_custom_op: %s\n", error.what());
  return 1;
}
