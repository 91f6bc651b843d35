#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/evaluate.h"
#include "cleave/export.h"
#include "cleave/model.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"

namespace cleave::testing {

/// The bundled model: 4 layers, D 128, H 512; calibration and evaluation on different parts of its
/// sample text.
class BudgetTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kContext = 256;
  BudgetTest() : source_(Checkpoint::open(demo_llama_dir())) {
    const auto file = demo_llama_dir() / "sample.txt";
    const TokenWindows all = make_windows(
        Tokenizer::from_checkpoint(source_).encode(read_text(file)), kContext, 0, "sample.txt");
    calibration_ = part(all, 0, 12);
    held_out_ = part(all, all.count() - 3, all.count());
  }
  static TokenWindows part(const TokenWindows& all, std::int64_t first, std::int64_t last) {
    TokenWindows windows;
    windows.context = all.context;
    windows.tokens.assign(all.tokens.begin() + first * kContext,
                          all.tokens.begin() + last * kContext);
    return windows;
  }
  static BudgetSpec budget(double share) {
    BudgetSpec spec;
    spec.active_share = share;
    spec.router.steps = 30;
    spec.router.batch = 512;
    return spec;
  }
  /// Written, re-read, and compared with the dense model.
  EvalResult evaluate_written(const Conversion& conversion) {
    write_conversion(dir_.path() / "out", source_, conversion, "{}", {.overwrite = true});
    Model dense = Model::load(source_), model = Model::load(Checkpoint::open(dir_.path() / "out"));
    return evaluate(model, held_out_, &dense);
  }
  double kl(const BudgetSpec& spec) {
    return evaluate_written(convert_to_budget(source_, spec, calibration_)).kl;
  }
  /// The conversion throws InvalidArgument with `part` in its message.
  void expect_refused(const BudgetSpec& spec, const std::string& part) {
    try {
      convert_to_budget(source_, spec, calibration_);
      ADD_FAILURE() << "not refused: " << part;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }

  TempDir dir_;
  Checkpoint source_;
  TokenWindows calibration_, held_out_;
};

}  // namespace cleave::testing
