#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <utility>

namespace cleave::cli {

/// TOML settings for `--config`. Keys are option names without dashes. A key under a table named
/// after a subcommand belongs to it; a key outside any table belongs to the subcommand that runs,
/// so a file for one job needs no table. Unknown keys are errors.
class ConfigFile : public CLI::ConfigTOML {
 public:
  explicit ConfigFile(std::string running_subcommand) : running_(std::move(running_subcommand)) {}

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    std::vector<CLI::ConfigItem> items = CLI::ConfigTOML::from_config(input);
    for (CLI::ConfigItem& item : items) {
      const bool marker = item.name == "++" || item.name == "--";  // CLI11's begin/end of a table
      if (item.parents.empty() && !marker && !running_.empty()) item.parents = {running_};
    }
    return items;
  }

 private:
  std::string running_;
};

}  // namespace cleave::cli
