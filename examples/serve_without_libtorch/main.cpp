// Loads a model, dense or converted, and continues prompts: one from the command line, or one from
// each line of standard input. Links cleave::core alone.
//
//   serve_without_libtorch MODEL [PROMPT]
#include <cleave/cleave.h>

#include <cstdio>
#include <iostream>
#include <string>

namespace {

void serve(cleave::Model& model, const cleave::Tokenizer& tokenizer, const std::string& prompt) {
  const auto ids = tokenizer.encode(prompt, /*add_special_tokens=*/true);
  cleave::TextStream stream(tokenizer, ids);
  std::cout << prompt << std::flush;
  cleave::generate(model, ids, {.max_tokens = 48}, [&](std::int32_t id) {
    std::cout << stream.push(id) << std::flush;
    return true;  // false stops
  });
  std::cout << stream.flush() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s MODEL [PROMPT]   (MODEL: a directory or a GGUF file)\n",
                 argv[0]);
    return 2;
  }
  try {
    // The checkpoint is mapped, not read; the model packs each weight once, as 2 bytes here.
    const auto checkpoint = cleave::Checkpoint::open(argv[1]);
    const auto tokenizer = cleave::Tokenizer::from_checkpoint(checkpoint);
    auto model = cleave::Model::load(checkpoint, {.weights = cleave::WeightType::kBF16});
    std::fprintf(
        stderr, "%d layers, %lld experts in the first, %.1f MB of weights, %d threads, %s\n",
        static_cast<int>(model.config().num_layers), static_cast<long long>(model.num_experts(0)),
        static_cast<double>(model.weight_bytes()) / 1e6, model.threads(), cleave::isa_name());

    if (argc == 3) {
      serve(model, tokenizer, argv[2]);
      return 0;
    }
    for (std::string line; std::getline(std::cin, line);)
      if (!line.empty()) serve(model, tokenizer, line);
    return 0;
  } catch (const cleave::InvalidArgument& error) {  // what was asked for cannot be
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  } catch (const cleave::Error& error) {  // the model's files are at fault
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
