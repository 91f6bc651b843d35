#include "converted_model.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <optional>
#include <string>
#include <system_error>

namespace cleave::bench {
namespace {

std::filesystem::path make_temporary_folder() {
  std::string name = (std::filesystem::temp_directory_path() / "cleave-bench-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr)
    throw FileError(fmt::format("{}: {}; set TMPDIR to a folder with room for a model", name,
                                std::generic_category().message(errno)));
  return name;
}

void write_converted(const Checkpoint& dense, const std::filesystem::path& text, int threads,
                     const std::filesystem::path& out) {
  constexpr std::int64_t kContext = 512, kTokens = 8192;
  ConvertSpec spec;
  spec.partition.method = PartitionMethod::kKMeans;
  spec.partition.num_experts = 8;
  spec.experts_per_token = 2;
  spec.threads = threads;
  std::optional<TokenWindows> windows;
  if (!text.empty())
    windows = model_windows(dense.config(), Tokenizer::from_checkpoint(dense), read_text(text),
                            kContext, kTokens, text.string());
  const Conversion conversion = convert(dense, spec, windows ? &*windows : nullptr);
  write_conversion(out, dense, conversion, "{}", {.dtype = DType::kBF16});
}

}  // namespace

ConvertedModel::ConvertedModel(const Checkpoint& dense, const std::filesystem::path& text,
                               int threads)
    : folder_(make_temporary_folder()), path_(folder_ / "model") {
  try {
    write_converted(dense, text, threads, path_);
  } catch (...) {
    std::filesystem::remove_all(folder_);
    throw;
  }
}

ConvertedModel::~ConvertedModel() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

}  // namespace cleave::bench
