// Tokens per second of a whole model: dense and converted, ours and llama.cpp's.
//
// All ways run in this process, in turn: a prompt, then tokens generated on top of it, one by one,
// the likeliest each time. The table gives medians over the rounds and their quartiles; the goals
// below it are ratios of generation speeds.
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>

#include "atomic_file.h"
#include "model_ways.h"
#include "program.h"
#include "support/thread_pool.h"

namespace {

using namespace cleave;
using namespace cleave::bench;

struct Options {
  std::string dense, converted, json;
  ModelRun run;
};

class EndToEnd {
 public:
  explicit EndToEnd(Options options)
      : pool_(options.run.threads), o_(resolved(std::move(options))), ways_(o_.run) {}

  void run() {
    const Checkpoint dense = Checkpoint::open(o_.dense);
    std::optional<Checkpoint> converted;
    if (!o_.converted.empty()) converted = Checkpoint::open(o_.converted);
    check_models(dense, converted ? &*converted : nullptr);
    ways_.add_dense(dense);
    if (converted) ways_.add_converted(*converted, true);
    ways_.measure();
    print();
    fmt::print("\n");
    GoalTable::print_heading();
    for (const ModelGoal& goal : model_goals()) ways_.report(goals_, pool_.parallel_for(), goal);
    if (!o_.json.empty()) write_file_atomically(o_.json, to_json().dump(2) + "\n");
  }

 private:
  Options resolved(Options options) const {
    options.run.threads = pool_.threads();
    return options;
  }
  void print() const {
    fmt::print("{} prompt tokens, {} generated; {} threads, {}, median of {} (quartiles)\n",
               o_.run.prompt, o_.run.generate, o_.run.threads, isa_name(), o_.run.rounds);
    fmt::print("{:<11}{:<11}{:<8}{:>8}{:>26}{:>26}\n", "model", "runtime", "weights", "MB",
               "prompt tokens/s", "generated tokens/s");
    for (const ModelWay& e : ways_.ways())
      fmt::print("{:<11}{:<11}{:<8}{:>8.1f}{:>26}{:>26}\n", e.model, e.runtime, e.weights,
                 static_cast<double>(e.way->weight_bytes()) / 1e6, rates(e.prompt),
                 rates(e.generate));
  }
  static std::string rates(const Timing& t) {
    return fmt::format("{:.1f} ({:.1f}-{:.1f})", 1 / t.median_s, 1 / t.high_s, 1 / t.low_s);
  }

  nlohmann::ordered_json to_json() const {
    nlohmann::ordered_json json = provenance(pool_.threads());
    json["llama_cpp"] = llama_cpp_version();
    json["dense"] = o_.dense;
    json["converted"] = o_.converted;
    json["prompt_tokens"] = o_.run.prompt;
    json["generated_tokens"] = o_.run.generate;
    json["rounds"] = o_.run.rounds;
    json["ways"] = nlohmann::ordered_json::array();
    json["goals"] = goals_.rows();
    for (const ModelWay& e : ways_.ways())
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

  ThreadPool pool_;
  Options o_;
  ModelWays ways_;
  GoalTable goals_;
};

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"Tokens per second of whole models, ours and llama.cpp's"};
  app.add_option("DENSE", o.dense, "Model directory or GGUF file")->required();
  app.add_option("CONVERTED", o.converted, "What cleave convert made of it");
  app.add_option("--threads", o.run.threads, "Threads; 0: as many as the machine has cores")
      ->capture_default_str();
  app.add_option("--prompt", o.run.prompt, "Tokens of the prompt")
      ->capture_default_str()
      ->check(kCount);
  app.add_option("--generate", o.run.generate, "Tokens to generate")
      ->capture_default_str()
      ->check(kCount);
  app.add_option("--rounds", o.run.rounds, "Runs of each; medians are shown")
      ->capture_default_str()
      ->check(kCount);
  app.add_option("--json", o.json, "Write the result to this file, too")->check(kFileToWrite);
  return run_program(app, argc, argv, [&] { EndToEnd(o).run(); });
}
