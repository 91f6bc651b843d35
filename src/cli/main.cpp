#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <new>

#include "cli/cli.h"
#include "cli/config_file.h"

namespace {

constexpr int kFailure = 1;
constexpr int kUsageError = 2;

int fail(int code, const std::string& message) {
  fmt::print(stderr, "cleave: {}\n", message);
  return code;
}

std::string first_subcommand(const CLI::App& app, int argc, char** argv) {
  const auto commands = app.get_subcommands([](const CLI::App*) { return true; });
  for (int i = 1; i < argc; ++i)
    for (const CLI::App* command : commands)
      if (command->check_name(argv[i])) return command->get_name();
  return {};
}

/// CLI11 calls every configuration file INI and an unknown key unparsable.
std::string config_problem(const std::string& what) {
  const std::string unknown = "INI was not able to parse ";
  if (!what.starts_with(unknown)) return what;
  return fmt::format("no option is named '{}' (as TABLE.KEY; try --help)",
                     what.substr(unknown.size()));
}

int run(int argc, char** argv) {
  CLI::App app{"cleave: split the dense FFNs of a transformer into a Mixture of Experts."};
  app.set_version_flag("--version", std::string("cleave ") + cleave::kVersion);
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted.\n"
      "Every option can also stand in a TOML file: --config FILE.toml (see docs/cli.md).");

  app.fallthrough();  // inherited by the subcommands: --config may stand behind them
  cleave::cli::add_inspect_command(app);
  cleave::cli::add_calibrate_command(app);
  cleave::cli::add_convert_command(app);
  cleave::cli::add_train_command(app);
  cleave::cli::add_eval_command(app);
  cleave::cli::add_report_command(app);
  cleave::cli::add_run_command(app);
  cleave::cli::add_bench_command(app);
  cleave::cli::add_tokenize_command(app);
  cleave::cli::add_logits_command(app);
  app.set_config("--config", "", "Read options from a TOML file; the command line wins");
  app.config_formatter(
      std::make_shared<cleave::cli::ConfigFile>(first_subcommand(app, argc, argv)));
  app.allow_config_extras(CLI::config_extras_mode::error);

  if (argc > 1 && argv[1][0] != '-' && first_subcommand(app, 2, argv).empty())
    return fail(kUsageError, fmt::format("unknown command '{}' (try --help)", argv[1]));
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    return app.exit(success);  // --help, --version
  } catch (const CLI::RuntimeError& stopped) {
    return stopped.get_exit_code();  // a command that ended early and has said why
  } catch (const CLI::ConfigError& error) {
    return fail(kUsageError, "config file: " + config_problem(error.what()));
  } catch (const CLI::ParseError& error) {
    return fail(kUsageError, fmt::format("{} (try --help)", error.what()));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // A limit on file sizes then shows as a write error, which is reported and cleaned up after.
  std::signal(SIGXFSZ, SIG_IGN);
  try {
    return run(argc, argv);
  } catch (const cleave::InvalidArgument& error) {
    return fail(kUsageError, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kFailure, "out of memory");
  } catch (const std::exception& error) {
    return fail(kFailure, error.what());
  }
}
