#include <fmt/format.h>

#include <fstream>
#include <iterator>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct TokenizeOptions {
  CommonOptions common;
  std::string model, text, text_file;
  bool special = false;
};

/// Unlike read_text(), takes what is there: white space alone and stray bytes tokenize as well.
std::string read_bytes(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) throw FileError(file + ": cannot be read");
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void run_tokenize(const TokenizeOptions& options) {
  if (options.text.empty() == options.text_file.empty())
    throw InvalidArgument("tokenize: give exactly one of --text and --text-file");
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(Checkpoint::open(options.model));
  const std::string text = options.text.empty() ? read_bytes(options.text_file) : options.text;
  const std::vector<std::int32_t> ids = tokenizer.encode(text, options.special);
  std::string lines;
  if (!options.common.json) {
    for (std::int32_t id : ids)
      lines += fmt::format("{:8}  {}\n", id,
                           Json(tokenizer.decode({&id, 1}, false))
                               .dump(-1, ' ', false, Json::error_handler_t::replace));
  }
  print_result(options.common, {{"count", ids.size()}, {"ids", ids}}, lines);
}

}  // namespace

void add_tokenize_command(CLI::App& app) {
  auto options = std::make_shared<TokenizeOptions>();
  CLI::App* command = app.add_subcommand("tokenize", "Text to token ids, one a line");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_option("--text", options->text, "The text itself");
  command->add_option("--text-file", options->text_file, "A text file, UTF-8");
  command->add_flag("--special", options->special, "Add the model's special tokens (BOS)");
  add_common_options(*command, options->common);
  command->callback([options] { run_tokenize(*options); });
}

}  // namespace cleave::cli
