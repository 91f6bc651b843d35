#include "program.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <ctime>
#include <filesystem>
#include <fstream>
#include <new>

#include "bench_commit.h"
#include "cleave/error.h"
#include "cleave/kernels.h"
#include "cleave/version.h"

namespace cleave::bench {
namespace {

constexpr int kFailure = 1;
constexpr int kUsageError = 2;

/// As Linux names it; "unknown" where it does not.
std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (const std::size_t colon = line.find(": ");
        line.starts_with("model name") && colon != std::string::npos)
      return line.substr(colon + 2);
  return "unknown";
}

}  // namespace

int run_program(CLI::App& app, int argc, char** argv, const std::function<void()>& work) {
  const std::string name = std::filesystem::path(argv[0]).filename().string();
  const auto fail = [&](int code, const std::string& message) {
    fmt::print(stderr, "{}: {}\n", name, message);
    return code;
  };
  app.footer("Exit codes: 0 success, 1 failure, 2 usage error.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    return app.exit(success);  // --help
  } catch (const CLI::ParseError& error) {
    return fail(kUsageError, fmt::format("{} (try --help)", error.what()));
  }
  try {
    work();
  } catch (const InvalidArgument& error) {
    return fail(kUsageError, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kFailure, "out of memory");
  } catch (const std::exception& error) {
    return fail(kFailure, error.what());
  }
  return 0;
}

const CLI::Validator kCount = CLI::Range(1, 1 << 24).description("");

const CLI::Validator kFileToWrite(
    [](std::string& file) -> std::string {
      const std::filesystem::path folder = std::filesystem::path(file).parent_path();
      if (folder.empty() || std::filesystem::is_directory(folder)) return {};
      return fmt::format("no such directory: {}", folder.string());
    },
    "FILE");

nlohmann::ordered_json provenance(int threads) {
  return {{"date", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))},
          {"cleave", kVersion},
          {"commit", CLEAVE_BENCH_COMMIT},
          {"compiler", CLEAVE_BENCH_COMPILER},
          {"flags", CLEAVE_BENCH_FLAGS},
          {"processor", processor_name()},
          {"instruction_set", isa_name()},
          {"threads", threads}};
}

}  // namespace cleave::bench
