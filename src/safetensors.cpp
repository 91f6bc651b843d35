#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cleave/checkpoint.h"
#include "fail.h"
#include "json.h"
#include "mapped_file.h"
#include "quants.h"

// A safetensors file: u64 little-endian length n; n bytes of JSON, an object that maps a name to
// {"dtype", "shape", "data_offsets": [begin, end)} and may hold "__metadata__" (string to string);
// then the data, to which the offsets are relative. The tensors tile the data: no hole, no overlap.

namespace cleave {
namespace {

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the reference implementation's limit

std::optional<DType> dtype_of_name(const std::string& name) {
  for (const auto dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64, DType::kI8,
                           DType::kU8, DType::kI16, DType::kI32, DType::kI64, DType::kBool})
    if (name == dtype_name(dtype)) return dtype;
  return std::nullopt;
}

/// The JSON text; leaves `data` at the first byte behind it.
std::string_view header_text(const MappedFile& file, std::span<const std::byte>& data) {
  const auto bytes = file.bytes();
  const std::string name = file.path().string();
  if (bytes.size() < 8)
    fail_file("{}: is truncated: {} bytes, not even the 8 of the header length", name,
              bytes.size());
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > kLongestHeader)
    fail_file("{}: claims a header of {} bytes; at most {} are allowed. Is it a safetensors file?",
              name, length, kLongestHeader);
  if (length > bytes.size() - 8)
    fail_file("{}: is truncated: a header of {} bytes, but only {} are left", name, length,
              bytes.size() - 8);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, length);
  if (text.empty() || text.front() != '{')
    fail_file("{}: is not a safetensors file: its header does not start with '{{'", name);
  data = bytes.subspan(8 + length);
  return text;
}

std::vector<std::int64_t> read_shape(const JsonReader& entry) {
  const nlohmann::json* value = entry.find("shape");
  if (value == nullptr) fail_file("{}: has no shape", entry.origin());
  if (!value->is_array()) entry.fail_type("shape", "a list of extents");
  std::vector<std::int64_t> shape;
  for (const auto& extent : *value) {
    if (!extent.is_number_unsigned() ||
        extent.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max())
      entry.fail_type("shape", "a list of extents, none negative");
    shape.push_back(extent.get<std::int64_t>());
  }
  return shape;
}

/// Bytes a shape needs, or -1 where the product does not fit.
std::int64_t bytes_of(DType dtype, const std::vector<std::int64_t>& shape) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 8;  // 8 bytes of an F64
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) {
    if (extent != 0 && count > kMost / extent) return -1;
    count *= extent;
  }
  return dtype_bytes(dtype, count);
}

struct Entry {
  TensorInfo info;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

Entry read_entry(const std::string& name, const nlohmann::json& value, const std::string& file,
                 std::uint64_t data_bytes) {
  const std::string origin = fmt::format("{}: tensor '{}'", file, name);
  if (!value.is_object()) fail_file("{}: is not described by an object", origin);
  const JsonReader json(value, origin);
  Entry entry;
  entry.info.name = name;
  const auto dtype = json.string("dtype");
  if (!dtype) fail_file("{}: has no dtype", origin);
  const auto known = dtype_of_name(*dtype);
  if (!known) json.fail_type("dtype", "F32, F16, BF16, F64, I8, U8, I16, I32, I64 or BOOL");
  entry.info.dtype = *known;
  entry.info.shape = read_shape(json);

  const nlohmann::json* offsets = json.find("data_offsets");
  if (offsets == nullptr) fail_file("{}: has no data_offsets", origin);
  if (!offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned())
    json.fail_type("data_offsets", "two byte positions");
  entry.begin = (*offsets)[0].get<std::uint64_t>();
  entry.end = (*offsets)[1].get<std::uint64_t>();
  if (entry.begin > entry.end || entry.end > data_bytes)
    fail_file(
        "{}: data_offsets [{}, {}) lie outside the {} bytes of data; the file is truncated or "
        "damaged",
        origin, entry.begin, entry.end, data_bytes);
  const std::int64_t needed = bytes_of(entry.info.dtype, entry.info.shape);
  if (needed < 0) fail_file("{}: the product of its shape overflows", origin);
  if (static_cast<std::uint64_t>(needed) != entry.end - entry.begin)
    fail_file("{}: its shape needs {} bytes of {}, its data_offsets span {}", origin, needed,
              *dtype, entry.end - entry.begin);
  return entry;
}

void check_metadata(const nlohmann::json& metadata, const std::string& file) {
  if (!metadata.is_object()) fail_file("{}: __metadata__ is not an object", file);
  for (const auto& [key, value] : metadata.items())
    if (!value.is_string())
      fail_file("{}: __metadata__ key '{}' does not hold a string", file, key);
}

/// Sorted by position, every tensor must begin where the one before it ended.
void check_tiling(std::vector<Entry>& entries, const std::string& file, std::uint64_t data_bytes) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected)
      fail_file("{}: tensor '{}' begins at byte {} of the data; expected {} ({})", file,
                entry.info.name, entry.begin, expected,
                entry.begin < expected ? "tensors overlap" : "there is a hole before it");
    expected = entry.end;
  }
  if (expected != data_bytes)
    fail_file("{}: the tensors end at byte {} of the data, but the file holds {}", file, expected,
              data_bytes);
}

}  // namespace

std::int64_t TensorInfo::num_elements() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

struct SafetensorsFile::Impl {
  MappedFile file;
  std::vector<TensorInfo> infos;                 // sorted by name
  std::vector<std::span<const std::byte>> data;  // [infos]
  nlohmann::json metadata;
  std::size_t index(std::string_view name) const;
};

std::size_t SafetensorsFile::Impl::index(std::string_view name) const {
  const auto found = find_tensor(infos, name);
  if (!found) fail_file("{}: has no tensor '{}'", file.path().string(), name);
  return *found;
}

std::optional<std::size_t> find_tensor(const std::vector<TensorInfo>& sorted,
                                       std::string_view name) {
  const auto found = std::lower_bound(
      sorted.begin(), sorted.end(), name,
      [](const TensorInfo& info, std::string_view key) { return info.name < key; });
  if (found == sorted.end() || found->name != name) return std::nullopt;
  return static_cast<std::size_t>(found - sorted.begin());
}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  MappedFile mapped = MappedFile::open(path);
  std::span<const std::byte> data;
  const std::string_view text = header_text(mapped, data);
  const nlohmann::json header = parse_json_object(text, path.string() + ": header");

  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__")
      check_metadata(value, path.string());
    else
      entries.push_back(read_entry(name, value, path.string(), data.size()));
  }
  check_tiling(entries, path.string(), data.size());
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.info.name < b.info.name; });

  auto impl = std::make_unique<Impl>(Impl{std::move(mapped), {}, {}, nlohmann::json::object()});
  if (const auto found = header.find("__metadata__"); found != header.end())
    impl->metadata = *found;
  for (Entry& entry : entries) {
    impl->infos.push_back(std::move(entry.info));
    impl->data.push_back(data.subspan(entry.begin, entry.end - entry.begin));
  }
  return SafetensorsFile(std::move(impl));
}

SafetensorsFile::SafetensorsFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;
SafetensorsFile::~SafetensorsFile() = default;

const std::vector<TensorInfo>& SafetensorsFile::tensors() const { return impl_->infos; }

bool SafetensorsFile::contains(std::string_view name) const {
  return find_tensor(impl_->infos, name).has_value();
}

const TensorInfo& SafetensorsFile::info(std::string_view name) const {
  return impl_->infos[impl_->index(name)];
}

std::span<const std::byte> SafetensorsFile::raw(std::string_view name) const {
  return impl_->data[impl_->index(name)];
}

std::string SafetensorsFile::metadata(const std::string& key) const {
  const auto found = impl_->metadata.find(key);
  return found != impl_->metadata.end() ? found->get<std::string>() : std::string();
}

std::vector<float> SafetensorsFile::read(std::string_view name) const {
  const std::size_t index = impl_->index(name);
  const TensorInfo& info = impl_->infos[index];
  std::vector<float> values(static_cast<std::size_t>(info.num_elements()));
  decode(info.dtype, impl_->data[index], values);
  return values;
}

}  // namespace cleave
