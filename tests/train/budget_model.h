#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "cleave/convert.h"
#include "cleave/export.h"
#include "cleave/text.h"
#include "cleave/tokenizer.h"
#include "cleave/train/recipes.h"
#include "support/paths.h"

namespace cleave::testing {

using train::TrainIo;
using train::TrainResult;
using train::TrainSpec;
using train::Transformer;
using train::TransformerImpl;
namespace fs = std::filesystem;

/// The bundled model (4 layers, D 128, H 512), converted once: with a shared slice
/// (GraniteMoeShared) and without one (Mixtral).
class BudgetModel : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new TempDir;
    const Checkpoint dense = Checkpoint::open(dense_dir());
    text_ = new TokenWindows(make_windows(
        Tokenizer::from_checkpoint(dense).encode(read_text(demo_llama_dir() / "sample.txt")), 64,
        64 * 220, "sample.txt"));
    BudgetSpec spec{.active_share = 0.5, .threads = 2};
    spec.router.steps = 20;
    spec.router.batch = 256;
    TokenWindows calibration = *text_;
    calibration.tokens.resize(64 * 30);
    const std::string settings = R"({"active_share": 0.5, "refit": "on"})";
    write_conversion(granite_dir(), dense, convert_to_budget(dense, spec, calibration), settings,
                     {});
    spec.shared_share = 0.0;
    write_conversion(mixtral_dir(), dense, convert_to_budget(dense, spec, calibration), settings,
                     {});
  }
  static void TearDownTestSuite() {
    delete text_;
    delete dir_;
  }
  static fs::path dense_dir() { return demo_llama_dir(); }
  static fs::path granite_dir() { return dir_->path() / "granite"; }
  static fs::path mixtral_dir() { return dir_->path() / "mixtral"; }
  static Transformer load(const fs::path& dir) {
    return Transformer(TransformerImpl::load(Checkpoint::open(dir)));
  }
  static TokenWindows windows(std::int64_t first, std::int64_t count) {
    TokenWindows part;
    part.context = text_->context;
    part.tokens.assign(text_->tokens.begin() + first * part.context,
                       text_->tokens.begin() + (first + count) * part.context);
    return part;
  }
  static TrainSpec settings() {
    return {.batch = 4,
            .learning_rate = 5e-4,
            .warmup_steps = 2,
            .adamw = {.weight_decay = 0.0},
            .threads = 2,
            .eval_every = 0,
            .eval_tokens = 0};
  }

  inline static TempDir* dir_ = nullptr;
  inline static TokenWindows* text_ = nullptr;
};

inline std::map<std::string, std::vector<float>> stored(Transformer model) {
  std::map<std::string, std::vector<float>> all;
  for (const auto& tensor : model->named_tensors()) all[tensor.name] = tensor.load();
  return all;
}

}  // namespace cleave::testing
