#include "cleave/checkpoint.h"

#include <algorithm>
#include <bit>
#include <map>

#include "cleave/export.h"
#include "decoder_tensors.h"
#include "fail.h"
#include "gguf_tokenizer.h"
#include "hash64.h"
#include "mapped_file.h"
#include "model_files.h"
#include "quants.h"
#include "safetensors.h"
#include "sha256.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

/// Files a written model carries along, in this order, where the source has them.
constexpr const char* kCompanionFiles[] = {"tokenizer_config.json",
                                           "special_tokens_map.json",
                                           "added_tokens.json",
                                           "vocab.json",
                                           "merges.txt",
                                           "tokenizer.model",
                                           "chat_template.jinja",
                                           "chat_template.json",
                                           "generation_config.json",
                                           "vocab.txt",
                                           "modules.json",
                                           "sentence_bert_config.json",
                                           "config_sentence_transformers.json",
                                           "1_Pooling/config.json",
                                           "LICENSE",
                                           "LICENSE.txt",
                                           "LICENSE.md",
                                           "NOTICE",
                                           "NOTICE.txt",
                                           "USE_POLICY.md"};

/// The weights inside a model directory. A single file wins over an index, as in Transformers.
fs::path find_weights(const fs::path& directory) {
  for (const char* name : {"model.safetensors", "model.safetensors.index.json"})
    if (fs::exists(directory / name)) return directory / name;
  std::string hint;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().extension() == ".gguf")
      hint = "; for its GGUF model name the file itself: " + entry.path().string();
    if (entry.path().extension() == ".bin" && hint.empty())
      hint = "; pickled weights (.bin) are not read, convert them to safetensors";
  }
  fail_file("{}: holds neither model.safetensors nor model.safetensors.index.json{}",
            directory.string(), hint);
}

bool ends_with(const fs::path& path, std::string_view suffix) {
  return std::string_view(path.native()).ends_with(suffix);
}

ModelFiles open_files(const fs::path& path) {
  if (!fs::exists(path)) fail_file("{}: no such file or directory", path.string());
  const fs::path weights = fs::is_directory(path) ? find_weights(path) : path;
  if (ends_with(weights, ".safetensors") || ends_with(weights, ".safetensors.index.json"))
    return open_safetensors_model(weights);
  if (ends_with(weights, ".gguf")) return open_gguf_model(weights);
  fail_file(
      "{}: is no model; expected a HuggingFace directory, a .safetensors file in one, a "
      ".safetensors.index.json or a .gguf file",
      path.string());
}

/// The type that most matrix elements are stored in, embedding and head aside.
DType matrix_dtype(const std::vector<TensorInfo>& infos, DType otherwise) {
  std::map<DType, std::int64_t> elements;
  for (const TensorInfo& info : infos)
    if (info.shape.size() >= 2 &&
        (info.name.starts_with("model.layers.") || info.name.starts_with("encoder.layer.")))
      elements[info.dtype] += info.num_elements();
  const auto most =
      std::max_element(elements.begin(), elements.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  return most == elements.end() ? otherwise : most->first;
}

/// `first`: the tensor's element that values[0] is.
void check_finite(std::span<const float> values, const std::string& name, std::int64_t first,
                  const fs::path& path) {
  // An exponent of all ones is infinity or NaN. Without a branch inside the loop it is vectorised.
  constexpr std::uint32_t kExponent = 0x7f800000u;
  std::uint32_t any = 0;
  for (const float value : values)
    any |= (std::bit_cast<std::uint32_t>(value) & kExponent) == kExponent ? 1u : 0u;
  if (any == 0) return;
  const auto bad = std::find_if(values.begin(), values.end(), [](float value) {
    return (std::bit_cast<std::uint32_t>(value) & kExponent) == kExponent;
  });
  fail_file("{}: tensor '{}' holds {} at element {}; expected finite weights", path.string(), name,
            *bad, first + (bad - values.begin()));
}

/// Where row r is stored if the rows of each head are interleaved: stored row 2j of a head is its
/// row j, stored row 2j + 1 its row j + half.
std::int64_t stored_row(std::int64_t r, std::int64_t rows, std::int64_t heads) {
  const std::int64_t head_rows = rows / heads, half = head_rows / 2, in_head = r % head_rows;
  return r - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

/// Hashes of 64 evenly spread blocks of a file, the first and the last among them.
std::vector<std::uint64_t> hash_pieces(std::span<const std::byte> bytes) {
  constexpr std::size_t kPieces = 64, kBlock = 4096;
  std::vector<std::uint64_t> hashes;
  for (std::size_t i = 0; i < kPieces; ++i) {
    const std::size_t size = std::min(kBlock, bytes.size());
    hashes.push_back(hash64(bytes.subspan((bytes.size() - size) / (kPieces - 1) * i, size)));
  }
  return hashes;
}

bool is_zero(std::span<const std::byte> bytes, DType dtype) {
  std::vector<float> values(bytes.size() / static_cast<std::size_t>(dtype_bytes(dtype, 1)));
  decode(dtype, bytes, values);
  return std::all_of(values.begin(), values.end(), [](float value) { return value == 0.0f; });
}

/// Rows of a shared slice up to the last one whose gate and up weights are not all zero. The others
/// add exactly nothing, whatever `down` holds: act(0) * 0. `width` where the tensor is not what it
/// should be; who loads it says so.
std::int64_t unpadded_width(const ModelFiles& files, std::int64_t layer, std::int64_t width) {
  const auto found = find_tensor(files.infos, GraniteMoeNames::shared_input(layer));
  if (!found) return width;
  const TensorInfo& info = files.infos[*found];
  const bool plain =
      info.dtype == DType::kF32 || info.dtype == DType::kF16 || info.dtype == DType::kBF16;
  const std::vector<std::int64_t> shape{2 * width, files.config.hidden_size};
  if (!plain || info.shape != shape) return width;
  const auto bytes = static_cast<std::size_t>(dtype_bytes(info.dtype, shape[1]));
  const auto row = [&](std::int64_t r) {
    return files.stored[*found].bytes.subspan(static_cast<std::size_t>(r) * bytes, bytes);
  };
  while (width > 0 && is_zero(row(width - 1), info.dtype) &&
         is_zero(row(shape[0] / 2 + width - 1), info.dtype))
    --width;
  return width;
}

/// ModelConfig::shared_widths.
std::vector<std::int64_t> find_shared_widths(const ModelFiles& files) {
  const ModelConfig& c = files.config;
  if (!has_fused_experts(c.family) || c.shared_intermediate_size == 0) return c.shared_widths;
  std::vector<std::int64_t> widths;
  for (std::int64_t l = 0; l < c.num_layers; ++l)
    widths.push_back(unpadded_width(files, l, c.shared_intermediate_size));
  const auto whole = std::count(widths.begin(), widths.end(), c.shared_intermediate_size);
  return whole == c.num_layers ? std::vector<std::int64_t>() : widths;
}

}  // namespace

struct Checkpoint::Impl {
  fs::path path;
  ModelFiles files;
  std::size_t index(std::string_view name) const {
    const auto found = find_tensor(files.infos, name);
    if (!found) fail_file("{}: has no tensor '{}'", path.string(), name);
    return *found;
  }
};

Checkpoint Checkpoint::open(const fs::path& path) {
  try {
    auto impl = std::make_unique<Impl>(Impl{path, open_files(path)});
    impl->files.config.dtype = matrix_dtype(impl->files.infos, impl->files.config.dtype);
    impl->files.config.shared_widths = find_shared_widths(impl->files);
    return Checkpoint(std::move(impl));
  } catch (const fs::filesystem_error& error) {  // a folder that may not be entered
    fail_file("{}: {}", path.string(), error.code().message());
  }
}

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint::Format Checkpoint::format() const { return impl_->files.format; }
const fs::path& Checkpoint::path() const { return impl_->path; }
const fs::path& Checkpoint::directory() const { return impl_->files.directory; }
const ModelConfig& Checkpoint::config() const { return impl_->files.config; }
const std::vector<TensorInfo>& Checkpoint::tensors() const { return impl_->files.infos; }

bool Checkpoint::contains(std::string_view name) const {
  return find_tensor(impl_->files.infos, name).has_value();
}

const TensorInfo& Checkpoint::info(std::string_view name) const {
  return impl_->files.infos[impl_->index(name)];
}

std::span<const std::byte> Checkpoint::raw(std::string_view name) const {
  return impl_->files.stored[impl_->index(name)].bytes;
}

void Checkpoint::read(std::string_view name, std::span<float> out) const {
  const std::size_t index = impl_->index(name);
  const TensorInfo& info = impl_->files.infos[index];
  const StoredTensor& stored = impl_->files.stored[index];
  if (static_cast<std::int64_t>(out.size()) != info.num_elements())
    fail_argument("Checkpoint::read: '{}' has {} elements, the output {}", name,
                  info.num_elements(), out.size());
  if (stored.interleaved_heads > 0)
    return read_rows(name, 0,
                     {out.data(), info.shape.front(), info.num_elements() / info.shape.front()});
  decode(info.dtype, stored.bytes, out);
  check_finite(out, info.name, 0, impl_->path);
}

void Checkpoint::read_rows(std::string_view name, std::int64_t first, MatrixView<float> out) const {
  const std::size_t index = impl_->index(name);
  const TensorInfo& info = impl_->files.infos[index];
  const StoredTensor& stored = impl_->files.stored[index];
  const std::int64_t rows = info.shape.empty() ? 0 : info.shape.front();
  if (rows < 1 || info.num_elements() != rows * out.cols || first < 0 || out.rows > rows - first)
    fail_argument(
        "Checkpoint::read_rows: '{}' has shape {}; it holds no {} rows of {} from row {} on", name,
        shape_text(info.shape), out.rows, out.cols, first);
  // Blocks of quantised types do not reach over the end of a row: readers check that.
  const auto row_bytes = stored.bytes.size() / static_cast<std::size_t>(rows);
  for (std::int64_t r = 0; r < out.rows; ++r) {
    const std::int64_t from = stored.interleaved_heads > 0
                                  ? stored_row(first + r, rows, stored.interleaved_heads)
                                  : first + r;
    const std::span<float> row(out.row(r), static_cast<std::size_t>(out.cols));
    decode(info.dtype, stored.bytes.subspan(static_cast<std::size_t>(from) * row_bytes, row_bytes),
           row);
    check_finite(row, info.name, (first + r) * out.cols, impl_->path);
  }
}

void Checkpoint::release(std::string_view name) const { release_pages(raw(name)); }

std::vector<float> Checkpoint::read(std::string_view name) const {
  std::vector<float> values(static_cast<std::size_t>(info(name).num_elements()));
  read(name, values);
  return values;
}

std::vector<float> Checkpoint::read(std::string_view name,
                                    std::initializer_list<std::int64_t> shape) const {
  const TensorInfo& stored = info(name);
  if (!std::equal(shape.begin(), shape.end(), stored.shape.begin(), stored.shape.end()))
    fail_file("{}: tensor '{}' has shape {}; expected {}", impl_->path.string(), name,
              shape_text(stored.shape), shape_text(shape));
  return read(name);
}

bool Checkpoint::has_tokenizer() const {
  if (format() == Format::kGguf) return impl_->files.gguf->has("tokenizer.ggml.tokens");
  return fs::exists(directory() / "tokenizer.json");
}

std::string Checkpoint::tokenizer_json() const {
  if (!has_tokenizer())
    fail_file("{}: has no tokenizer; expected a tokenizer.json", impl_->path.string());
  if (format() == Format::kSafetensors) return read_text_file(directory() / "tokenizer.json");
  return gguf_tokenizer_files(*impl_->files.gguf).tokenizer_json;
}

std::vector<std::pair<std::string, std::string>> Checkpoint::companion_files() const {
  std::vector<std::pair<std::string, std::string>> files;
  if (format() == Format::kSafetensors) {
    for (const char* name : kCompanionFiles)
      if (fs::is_regular_file(directory() / name))
        files.emplace_back(name, read_text_file(directory() / name));
    return files;
  }
  if (!has_tokenizer()) return files;
  const GgufTokenizerFiles made = gguf_tokenizer_files(*impl_->files.gguf);
  const auto add = [&](const char* name, const std::string& text) {
    if (!text.empty()) files.emplace_back(name, text);
  };
  add("tokenizer_config.json", made.tokenizer_config_json);
  add("special_tokens_map.json", made.special_tokens_map_json);
  add("chat_template.jinja", made.chat_template);
  add("generation_config.json", made.generation_config_json);
  return files;
}

std::string Checkpoint::config_json() const {
  if (format() == Format::kGguf) return {};
  return read_text_file(directory() / "config.json");
}

std::string Checkpoint::sha256() const { return sha256_of_files(impl_->files.weight_files); }

std::string Checkpoint::fingerprint() const {
  std::string text = config_json();
  for (const fs::path& path : impl_->files.weight_files) {
    std::error_code error;
    const auto changed = fs::last_write_time(path, error).time_since_epoch().count();
    const MappedFile file = MappedFile::open(path);
    text += fmt::format("\n{} {} {}", path.filename().string(), file.bytes().size(), changed);
    for (const std::uint64_t hash : hash_pieces(file.bytes())) text += fmt::format(" {:x}", hash);
  }
  return fmt::format("{:016x}", hash64(std::as_bytes(std::span(text))));
}

}  // namespace cleave
