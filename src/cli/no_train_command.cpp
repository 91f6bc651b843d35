#include "cli/cli.h"

namespace cleave::cli {

// Built instead of train_command.cpp where LibTorch is absent: the subcommand stays in the help, so
// that nobody wonders, and says how to get it.
void add_train_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("train", "Tune a converted model (not in this build)");
  command->allow_extras();
  command->callback([] {
    throw Error(
        "train: this cleave was built without LibTorch (CLEAVE_TRAIN=OFF). Install it (pip install "
        "torch==2.13.0) and configure with -DCLEAVE_TRAIN=ON; everything else works as it is");
  });
}

}  // namespace cleave::cli
