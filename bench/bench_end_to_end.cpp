// Tokens per second of a whole model: dense and converted, ours and llama.cpp's.
//
// All ways run in this process, in turn: a prompt, then tokens generated on top of it, one by one,
// the likeliest each time. The table gives medians over the rounds and their quartiles; the goals
// below it are ratios of generation speeds.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "atomic_file.h"
#include "decoder_ways.h"
#include "ffn_setup.h"

namespace {

using namespace cleave;
using namespace cleave::bench;

struct Options {
  std::string dense, converted, json;
  int threads = 2;
  std::int64_t prompt = 512, generate = 64;
  int rounds = 7;
};

/// One decoder with what was measured of it.
struct Entry {
  std::string model, runtime, weights;
  std::unique_ptr<DecoderWay> way;
  Timing prompt{}, generate{};
};

class EndToEnd {
 public:
  explicit EndToEnd(const Options& options) : o_(options) {}

  void run() {
    load();
    measure();
    print();
    goals();
    if (!o_.json.empty()) write_file_atomically(o_.json, to_json().dump(2) + "\n");
  }

 private:
  void add(const char* model, const char* runtime, const char* weights,
           std::unique_ptr<DecoderWay> way) {
    if (way == nullptr) return;
    fmt::print(stderr, "loaded: {}, {}, {}\n", model, runtime, weights);
    entries_.push_back({model, runtime, weights, std::move(way)});
  }

  /// Of a file's own weights; "4-bit" is what the goal compares.
  static const char* file_label(DType dtype) {
    return dtype == DType::kQ4_0 || dtype == DType::kQ4_1 ? "4-bit" : dtype_name(dtype);
  }

  void load() {
    const DecoderSpec spec{o_.threads, o_.prompt + o_.generate};
    const Checkpoint dense = Checkpoint::open(o_.dense);
    if (dense.config().is_moe())
      throw std::runtime_error(o_.dense + ": holds experts; expected the dense model first");
    vocab_ = dense.config().vocab_size;
    add("dense", "cleave", "bf16", cleave_way(dense, WeightType::kBF16, spec));
    add("dense", "llama.cpp", "bf16", llama_bf16_way(dense, spec));
    add("dense", "cleave", "4-bit", cleave_way(dense, WeightType::kInt4, spec));
    if (dense.format() == Checkpoint::Format::kGguf)
      add("dense", "llama.cpp", file_label(dense.config().dtype), llama_file_way(o_.dense, spec));
    if (o_.converted.empty()) return;
    const Checkpoint converted = Checkpoint::open(o_.converted);
    if (!converted.config().is_moe() || converted.config().vocab_size != vocab_)
      throw std::runtime_error(o_.converted + ": expected what cleave convert made of " + o_.dense);
    add("converted", "cleave", "bf16", cleave_way(converted, WeightType::kBF16, spec));
    add("converted", "llama.cpp", "bf16", llama_bf16_way(converted, spec));
  }

  void measure() {
    std::vector<std::int32_t> tokens(o_.prompt);
    std::mt19937_64 rng(0);
    for (std::int32_t& id : tokens) id = static_cast<std::int32_t>(rng() % vocab_);
    std::vector<std::vector<double>> prompt(entries_.size()), generate(entries_.size());
    for (int round = -1; round < o_.rounds; ++round)
      for (std::size_t i = 0; i < entries_.size(); ++i) {
        wait_for_quiet();
        DecoderWay& way = *entries_[i].way;
        const double p = seconds([&] { way.prompt(tokens); });
        const double g = seconds([&] { way.generate(o_.generate); });
        if (round < 0) continue;  // the first one warms up
        prompt[i].push_back(p / static_cast<double>(o_.prompt));
        generate[i].push_back(g / static_cast<double>(o_.generate));
      }
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      entries_[i].prompt = summary(std::move(prompt[i]));
      entries_[i].generate = summary(std::move(generate[i]));
    }
  }

  static double seconds(const std::function<void()>& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  void print() const {
    fmt::print("{} prompt tokens, {} generated; {} threads, {}, median of {} (quartiles)\n",
               o_.prompt, o_.generate, o_.threads, isa_name(), o_.rounds);
    fmt::print("{:<11}{:<11}{:<8}{:>8}{:>26}{:>26}\n", "model", "runtime", "weights", "MB",
               "prompt tokens/s", "generated tokens/s");
    for (const Entry& e : entries_)
      fmt::print("{:<11}{:<11}{:<8}{:>8.1f}{:>26}{:>26}\n", e.model, e.runtime, e.weights,
                 static_cast<double>(e.way->weight_bytes()) / 1e6, rates(e.prompt),
                 rates(e.generate));
  }
  static std::string rates(const Timing& t) {
    return fmt::format("{:.1f} ({:.1f}-{:.1f})", 1 / t.median_s, 1 / t.high_s, 1 / t.low_s);
  }

  const Entry* find(const char* model, const char* runtime, const char* weights) const {
    for (const Entry& e : entries_)
      if (e.model == model && e.runtime == runtime && e.weights == weights) return &e;
    return nullptr;
  }

  void goals() {
    const Entry* dense = find("dense", "cleave", "bf16");
    const Entry* llama = find("dense", "llama.cpp", "bf16");
    const Entry* moe = find("converted", "cleave", "bf16");
    fmt::print("\n{:<5}{:<50}{:>9}{:>10}{:>8}\n", "row", "generation", "ours", "at least", "aim");
    goal("C7", "dense, bf16: times llama.cpp", dense, llama, 1.3, 1.6);
    goal("C7", "dense, 4-bit: times llama.cpp", find("dense", "cleave", "4-bit"),
         find("dense", "llama.cpp", "4-bit"), 1.3, 1.6);
    goal("E1", "converted, bf16: times our dense", moe, dense, 1.5, 1.75);
    goal("E1", "converted, bf16: times llama.cpp's dense", moe, llama, 2.0, 2.8);
  }
  void goal(const char* row, const char* what, const Entry* ours, const Entry* theirs, double least,
            double aim) {
    if (ours == nullptr || theirs == nullptr) {
      fmt::print("{:<5}{:<50}{:>9}\n", row, what, "-");
      return;
    }
    const double ratio = paired_ratio(theirs->generate, ours->generate);
    goals_.push_back(
        {{"row", row}, {"what", what}, {"ours", ratio}, {"at_least", least}, {"aim", aim}});
    fmt::print("{:<5}{:<50}{:>9.3f}{:>10.2f}{:>8.2f}{}\n", row, what, ratio, least, aim,
               ratio < least ? "  below" : "");
  }

  nlohmann::ordered_json to_json() const {
    nlohmann::ordered_json json{{"dense", o_.dense},
                                {"converted", o_.converted},
                                {"threads", o_.threads},
                                {"instruction_set", isa_name()},
                                {"prompt_tokens", o_.prompt},
                                {"generated_tokens", o_.generate},
                                {"rounds", o_.rounds},
                                {"ways", nlohmann::ordered_json::array()},
                                {"goals", goals_}};
    for (const Entry& e : entries_)
      json["ways"].push_back(
          {{"model", e.model},
           {"runtime", e.runtime},
           {"weights", e.weights},
           {"weight_bytes", e.way->weight_bytes()},
           {"prompt_tokens_per_s", 1 / e.prompt.median_s},
           {"prompt_quartiles", {1 / e.prompt.high_s, 1 / e.prompt.low_s}},
           {"generated_tokens_per_s", 1 / e.generate.median_s},
           {"generated_quartiles", {1 / e.generate.high_s, 1 / e.generate.low_s}}});
    return json;
  }

  Options o_;
  std::int64_t vocab_ = 0;
  std::vector<Entry> entries_;
  nlohmann::ordered_json goals_ = nlohmann::ordered_json::array();
};

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"Tokens per second of whole models, ours and llama.cpp's"};
  app.add_option("DENSE", o.dense, "Model directory or GGUF file")->required();
  app.add_option("CONVERTED", o.converted, "What cleave convert made of it");
  app.add_option("--threads", o.threads, "Threads")->capture_default_str();
  app.add_option("--prompt", o.prompt, "Tokens of the prompt")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--generate", o.generate, "Tokens to generate")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--rounds", o.rounds, "Runs of each; medians are shown")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--json", o.json, "Write the result to this file, too");
  CLI11_PARSE(app, argc, argv);
  try {
    EndToEnd(o).run();
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_end_to_end: {}\n", error.what());
    return 1;
  }
  return 0;
}
