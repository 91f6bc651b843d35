// FactorLLM's whole procedure (arXiv:2408.11855) through the C++ API: split every FFN of a trained
// model into eight experts of which four run, teach the routers what the dense FFNs would choose,
// tune routers and experts together, and write a stock Mixtral directory.
//
//   factorize_and_finetune [DENSE [TEXT [OUT]]]
//
// Without arguments it takes the bundled model, examples/models/demo-llama, from the current
// folder.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>

#include "cleave/cleave.h"
#include "cleave/train/data.h"
#include "cleave/train/recipes.h"

using namespace cleave;

namespace {

constexpr std::int64_t kContext = 128;  // tokens per window
const WriteSpec kReplace{.dtype = {}, .overwrite = true};

/// Held-out quality of a model directory, by the inference engine (no LibTorch).
void report(const char* name, const Checkpoint& checkpoint, Model* dense,
            const TokenWindows& text) {
  Model model = Model::load(checkpoint);
  const EvalResult quality = evaluate(model, text, dense);
  std::printf("%-10s perplexity %7.3f   KL %.4f\n", name, quality.perplexity, quality.kl);
}

void run(const std::filesystem::path& dense_path, const std::filesystem::path& text_path,
         const std::filesystem::path& out) {
  // 1. Read the model and the text; keep the text's last windows for the final word.
  const Checkpoint dense = Checkpoint::open(dense_path);
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(dense);
  const TokenWindows all =
      make_windows(tokenizer.encode(read_text(text_path)), kContext, 0, text_path.string());
  const auto [text, held_out] = train::hold_out(all, all.count() / 20 + 1);

  // 2. Split: balanced k-means on the gate rows, routers fitted on some of the text.
  ConvertSpec split{.partition = {.num_experts = 8}, .experts_per_token = 4};
  TokenWindows calibration = text;
  calibration.tokens.resize(std::min<std::size_t>(text.tokens.size(), 64 * kContext));
  const Conversion conversion = convert(dense, split, &calibration);
  write_conversion(out / "converted", dense, conversion, "{}", kReplace);

  // 3. Tune: first the routers alone against the frozen experts, then both. The teacher of the
  //    prior-approximate loss is the dense FFN, put together again from the fresh experts.
  const Checkpoint converted = Checkpoint::open(out / "converted");
  train::FactorLlmSpec method;
  method.phases = {{train::Trainable::kRouter, 20}, {train::Trainable::kJoint, 60}};
  const train::TrainSpec spec{.batch = 4, .learning_rate = 1e-3, .warmup_steps = 10};
  train::TrainIo io;
  io.progress = [](const train::StepReport& step) {
    if (step.logged && step.step > 0)
      std::printf("step %3ld of %ld  %-6s loss %.4f  %.0f tokens/s\n", static_cast<long>(step.step),
                  static_cast<long>(step.steps), step.phase.c_str(), step.loss, step.tokens_per_s);
  };
  train::TrainResult tuned =
      train::train_factorllm(converted, nullptr, text, &held_out, method, spec, io);

  // 4. Write what Transformers, vLLM and we ourselves open as Mixtral.
  const ModelConfig& config = converted.config();
  write_mixtral(out / "tuned", converted,
                {config.num_experts, config.experts_per_token, config.intermediate_size},
                tuned.model->named_tensors(), *tuned.provenance, kReplace);

  // 5. Compare on text that none of them was tuned on.
  Model reference = Model::load(dense);
  report("dense", dense, nullptr, held_out);
  report("converted", converted, &reference, held_out);
  report("tuned", Checkpoint::open(out / "tuned"), &reference, held_out);
}

}  // namespace

int main(int argc, char** argv) {
  const std::filesystem::path model = argc > 1 ? argv[1] : "examples/models/demo-llama";
  const std::filesystem::path text = argc > 2 ? argv[2] : "examples/models/demo-llama/sample.txt";
  const std::filesystem::path out =
      argc > 3 ? std::filesystem::path(argv[3])
               : std::filesystem::temp_directory_path() / "factorize_and_finetune";
  try {
    std::filesystem::create_directories(out);
    run(model, text, out);
    std::printf("written to %s\n", (out / "tuned").c_str());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "factorize_and_finetune: %s\n", error.what());
    return 1;
  }
}
