#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

// What the benchmark programs have in common.
namespace cleave::bench {

/// Parses the arguments, then runs `work`. @returns the exit code: 0 success, 1 failure, 2 usage
/// error, as `cleave` does; errors go to stderr in one line
int run_program(CLI::App& app, int argc, char** argv, const std::function<void()>& work);

/// For numbers of tokens, runs, experts.
extern const CLI::Validator kCount;
/// For a file to be written at the end of a long run: its folder must be there at the start.
extern const CLI::Validator kFileToWrite;

/// When, on what and with which build figures were taken: date (UTC), version, commit ("-dirty"
/// with changes), compiler and flags, processor, instruction set and threads.
nlohmann::ordered_json provenance(int threads);

}  // namespace cleave::bench
