#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "decoder_ways.h"
#include "ffn_setup.h"
#include "goal_table.h"

// Whole models, dense and converted, ours and llama.cpp's, timed in turn: bench_end_to_end's table,
// and of the table of goals the rows about models.
namespace cleave::bench {

struct ModelRun {
  int threads = 2;
  std::int64_t prompt = 512, generate = 64;  ///< tokens
  int rounds = 7;
};

/// One decoder with what was measured of it, a token.
struct ModelWay {
  std::string model, runtime, weights;
  std::unique_ptr<DecoderWay> way;
  Timing prompt{}, generate{};
};

/// A row that compares the generation speeds of two ways.
struct ModelGoal {
  Goal goal;
  const char *our_model, *our_weights;
  const char *other_runtime, *other_weights;  ///< of the dense model
};
/// C7: dense beside llama.cpp; E1: converted beside dense.
std::span<const ModelGoal> model_goals();

/// @param converted  nullptr: none
/// @throws InvalidArgument  the dense one holds experts, or the other is not made of it
void check_models(const Checkpoint& dense, const Checkpoint* converted);

class ModelWays {
 public:
  explicit ModelWays(const ModelRun& run) : run_(run) {}

  /// bf16 and 4-bit; llama.cpp's 4-bit is the file itself, where it is a GGUF of that type.
  void add_dense(const Checkpoint& dense);
  /// @param with_llama  llama.cpp's, too
  void add_converted(const Checkpoint& converted, bool with_llama);

  /// A prompt, then tokens on top of it, each the likeliest: all ways in turn, the first round to
  /// warm up.
  void measure();
  const std::vector<ModelWay>& ways() const { return ways_; }

  /// Generation, of what was added; other rows say what is missing.
  void report(GoalTable& table, const ParallelFor& parallel, const ModelGoal& goal) const;

 private:
  void add(const char* model, const char* runtime, const char* weights,
           std::unique_ptr<DecoderWay> way);
  const ModelWay* find(const std::string& model, const std::string& runtime,
                       const std::string& weights) const;

  ModelRun run_;
  std::int64_t vocab_size_ = 0;
  std::vector<ModelWay> ways_;
};

}  // namespace cleave::bench
