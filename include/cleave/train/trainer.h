#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cleave/text.h"
#include "cleave/train/evaluate.h"
#include "cleave/train/optimizer.h"
#include "cleave/train/recipe.h"
#include "cleave/train/transformer.h"

namespace cleave::train {

/// How to train, whatever the method. How many steps, and what learns in them, is the recipe's.
struct TrainSpec {
  std::int64_t batch = 4;               ///< windows per forward pass
  std::int64_t grad_accumulation = 1;   ///< forward passes per step
  double learning_rate = 3e-4;          ///< the peak
  double min_lr_ratio = 0.1;            ///< floor of the cosine, as a share of the peak
  std::int64_t warmup_steps = 20;       ///< steps; more than the run has: warm-up all the way
  AdamWSpec adamw = {};                 ///< betas, epsilon, weight decay
  double clip_norm = 1.0;               ///< 2-norm over all gradients of a step; 0: off
  std::uint64_t seed = 0;               ///< order of the windows
  int threads = 0;                      ///< LibTorch threads; 0: its own choice
  std::int64_t eval_every = 50;         ///< steps; 0: before the first and after the last only
  std::int64_t eval_tokens = 8192;      ///< held-out tokens per evaluation; 0: all
  std::int64_t log_every = 10;          ///< steps between lines of metrics.jsonl
  std::int64_t checkpoint_every = 100;  ///< steps; 0: at the end and when stopped only
  std::int64_t keep_checkpoints = 2;    ///< the newest so many stay
  at::ScalarType dtype = at::kFloat;    ///< of weights and activations: float32 or bfloat16
  at::Device device = at::kCPU;
};
/// @throws InvalidArgument  names the field
void check(const TrainSpec& spec);

/// One finished step (or, with step = 0, the evaluation before the first).
struct StepReport {
  std::int64_t step = 0;   ///< steps finished
  std::int64_t steps = 0;  ///< steps in all
  std::string phase;
  double loss = 0.0;                                   ///< sum of weight * part
  std::vector<std::pair<std::string, double>> parts;   ///< unweighted, by name: "lm", "pa", ...
  std::vector<std::pair<std::string, double>> values;  ///< other numbers: "load_entropy", ...
  double learning_rate = 0.0;
  double grad_norm = 0.0;     ///< before clipping
  std::int64_t tokens = 0;    ///< trained on since step 0
  double tokens_per_s = 0.0;  ///< of this run, evaluations and checkpoints left out
  double elapsed_s = 0.0;     ///< of this run
  double eta_s = 0.0;         ///< estimate of what is left
  bool logged = false;        ///< this step also goes to metrics.jsonl
  std::optional<HeldOutQuality> held_out;
};

/// What surrounds a run. The library prints nothing: callers show what the callbacks bring.
struct TrainIo {
  /// Receives metrics.jsonl and checkpoints/step-N/; empty: neither is written.
  std::filesystem::path directory = {};
  bool resume = false;     ///< go on from the newest whole checkpoint in `directory`
  bool overwrite = false;  ///< remove an earlier run's checkpoints and metrics instead
  std::function<void(const StepReport&)> progress = {};  ///< after every step
  std::function<void(const std::string&)> notice = {};   ///< one line worth telling
  const std::atomic<bool>* stop = nullptr;  ///< once true: finish the step, save, return
};

struct TrainResult {
  Transformer model{nullptr};  ///< tuned; named_tensors() for write_mixtral
  /// The student's, brought up to date (gate, router "trained"); empty where it had none.
  std::optional<Provenance> provenance;
  std::int64_t step = 0;   ///< steps finished, those before a resume included
  std::int64_t steps = 0;  ///< steps in all
  bool interrupted = false;
  StepReport last;                       ///< of the last step that this run made
  std::optional<HeldOutQuality> before;  ///< held-out quality when this run began
  std::optional<HeldOutQuality> after;   ///< and when it ended; empty when interrupted
};

/// Runs a recipe on a model.
///
/// A step: grad_accumulation forward and backward passes over `batch` windows each, clip, AdamW.
/// The freeze audit compares every tensor that must not learn, bit for bit, at the start and end of
/// each phase, and requires a non-zero gradient of every tensor that must after a phase's first
/// step.
///
/// Checkpoints are whole or absent (temporary folder, fsync, rename) and resume exactly: on the
/// CPU, with the same number of threads, 2n steps equal n steps, stop, resume, n steps bit for bit.
///
/// @param model     trained in place; on spec.device, in spec.dtype
/// @param held_out  may be nullptr; must not overlap `data`
/// @throws InvalidArgument  a setting makes no sense; a resumed run's setting or input differs from
///                          the checkpoint's (names it); a token is outside the vocabulary
/// @throws FileError        disk full, or no usable checkpoint to resume from
/// @throws Error            a loss or gradient is not finite (names the step and the part), or the
///                          freeze audit failed (names the tensor)
TrainResult train(Transformer model, const Recipe& recipe, const TokenWindows& data,
                  const TokenWindows* held_out, const TrainSpec& spec, const TrainIo& io = {});

/// The settings as a JSON object, for cleave.json.
std::string to_json(const TrainSpec& spec);

}  // namespace cleave::train
