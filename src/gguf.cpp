#include "gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "fail.h"

// Layout of GGUF v3, little-endian:
//   "GGUF"  u32 version  u64 tensor count  u64 key count
//   keys:     string name, u32 type, value          string = u64 length + bytes
//   tensors:  string name, u32 rank, u64 extents (innermost first), u32 type, u64 offset
//   padding to `general.alignment` (32 unless the key says otherwise), then the tensors' data

namespace cleave {
namespace {

/// Type codes of metadata values.
enum class ValueType : std::uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};
constexpr std::uint32_t kNumValueTypes = 13;

/// Fewest bytes one value of a type takes; keeps a forged count from reserving memory.
std::size_t least_bytes(ValueType type) {
  constexpr std::size_t kBytes[kNumValueTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  return kBytes[static_cast<std::uint32_t>(type)];
}

/// ggml's names of tensor types, for messages; those we read are in `readable_type`.
const char* ggml_type_name(std::uint32_t code) {
  constexpr const char* kNames[] = {
      "F32",     "F16",    "Q4_0",    "Q4_1",  "Q4_2",   "Q4_3",  "Q5_0",  "Q5_1",
      "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
      "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
      "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", "BF16"};
  return code < std::size(kNames) ? kNames[code] : "unknown";
}

std::optional<DType> readable_type(std::uint32_t code) {
  switch (code) {
    case 0:
      return DType::kF32;
    case 1:
      return DType::kF16;
    case 2:
      return DType::kQ4_0;
    case 3:
      return DType::kQ4_1;
    case 8:
      return DType::kQ8_0;
    case 30:
      return DType::kBF16;
    default:
      return std::nullopt;
  }
}

constexpr std::int64_t kQuantBlock = 32;
bool is_quantised(DType dtype) {
  return dtype == DType::kQ8_0 || dtype == DType::kQ4_0 || dtype == DType::kQ4_1;
}

/// A bounds-checked read position in the mapped file.
class Cursor {
 public:
  explicit Cursor(const MappedFile& file, std::size_t position = 0)
      : file_(file), position_(position) {}

  std::size_t position() const { return position_; }
  std::size_t remaining() const { return file_.bytes().size() - position_; }
  std::string name() const { return file_.path().string(); }

  template <typename T>
  T take(const std::string& what) {
    need(sizeof(T), what);
    T value;
    std::memcpy(&value, file_.bytes().data() + position_, sizeof value);
    position_ += sizeof value;
    return value;
  }

  /// Of the mapped file.
  std::string_view take_string(const std::string& what) {
    const auto length = take<std::uint64_t>(what);
    need(length, what);
    const std::string_view text(reinterpret_cast<const char*>(file_.bytes().data()) + position_,
                                length);
    position_ += length;
    return text;
  }

  void need(std::uint64_t bytes, const std::string& what) const {
    if (bytes > remaining())
      fail_file("{}: truncated or damaged: {} needs {} bytes at offset {}, but only {} are left",
                name(), what, bytes, position_, remaining());
  }

 private:
  const MappedFile& file_;
  std::size_t position_;
};

ValueType take_type(Cursor& cursor, const std::string& key) {
  const auto code = cursor.take<std::uint32_t>("the type of key '" + key + "'");
  if (code >= kNumValueTypes)
    fail_file("{}: key '{}' has unknown type {}; GGUF v3 defines 0 to {}", cursor.name(), key, code,
              kNumValueTypes - 1);
  return static_cast<ValueType>(code);
}

bool is_integer(ValueType type) {
  return type != ValueType::kF32 && type != ValueType::kF64 && type != ValueType::kBool &&
         type != ValueType::kString && type != ValueType::kArray;
}

/// An integer of any width; only kU64 can exceed int64, and comes back in `unsigned_value`.
std::int64_t take_integer(Cursor& cursor, ValueType type, const std::string& what,
                          std::uint64_t& unsigned_value) {
  unsigned_value = 0;
  switch (type) {
    case ValueType::kU8:
    case ValueType::kBool:
      return cursor.take<std::uint8_t>(what);
    case ValueType::kI8:
      return cursor.take<std::int8_t>(what);
    case ValueType::kU16:
      return cursor.take<std::uint16_t>(what);
    case ValueType::kI16:
      return cursor.take<std::int16_t>(what);
    case ValueType::kU32:
      return cursor.take<std::uint32_t>(what);
    case ValueType::kI32:
      return cursor.take<std::int32_t>(what);
    case ValueType::kU64:
      unsigned_value = cursor.take<std::uint64_t>(what);
      return static_cast<std::int64_t>(unsigned_value);
    default:
      return cursor.take<std::int64_t>(what);
  }
}

double take_float(Cursor& cursor, ValueType type, const std::string& what) {
  return type == ValueType::kF32 ? static_cast<double>(cursor.take<float>(what))
                                 : cursor.take<double>(what);
}

GgufFile::Value take_array(Cursor& cursor, const std::string& key) {
  const std::string what = "the array of key '" + key + "'";
  const ValueType type = take_type(cursor, key);
  if (type == ValueType::kArray)
    fail_file("{}: key '{}' holds an array of arrays, which no known model uses", cursor.name(),
              key);
  const auto count = cursor.take<std::uint64_t>(what);
  if (count > cursor.remaining() / least_bytes(type))
    fail_file("{}: key '{}' claims {} values, more than the {} bytes that are left can hold",
              cursor.name(), key, count, cursor.remaining());
  const auto fill = [count](auto values, const auto& take_one) -> GgufFile::Value {
    values.reserve(count);
    for (std::uint64_t i = 0; i < count; ++i) values.push_back(take_one());
    return values;
  };
  if (type == ValueType::kString) {
    const GgufFile::StringArray strings{cursor.position(), count};
    for (std::uint64_t i = 0; i < count; ++i) cursor.take_string(what);
    return strings;
  }
  if (type == ValueType::kF32 || type == ValueType::kF64)
    return fill(std::vector<double>(), [&] { return take_float(cursor, type, what); });
  return fill(std::vector<std::int64_t>(), [&] {
    std::uint64_t unsigned_value = 0;
    const std::int64_t value = take_integer(cursor, type, what, unsigned_value);
    if (unsigned_value > std::numeric_limits<std::int64_t>::max())
      fail_file("{}: key '{}' holds {}, beyond the range of int64", cursor.name(), key,
                unsigned_value);
    return value;
  });
}

GgufFile::Value take_value(Cursor& cursor, const std::string& key) {
  const std::string what = "the value of key '" + key + "'";
  const ValueType type = take_type(cursor, key);
  if (type == ValueType::kArray) return take_array(cursor, key);
  if (type == ValueType::kString) return std::string(cursor.take_string(what));
  if (type == ValueType::kBool) return cursor.take<std::uint8_t>(what) != 0;
  if (!is_integer(type)) return take_float(cursor, type, what);
  std::uint64_t unsigned_value = 0;
  const std::int64_t value = take_integer(cursor, type, what, unsigned_value);
  if (unsigned_value > std::numeric_limits<std::int64_t>::max()) return unsigned_value;
  return value;
}

/// Rank and extents, outermost first; `elements` cannot overflow.
std::vector<std::int64_t> take_shape(Cursor& cursor, const std::string& tensor) {
  const std::string what = "the shape of tensor '" + tensor + "'";
  const auto rank = cursor.take<std::uint32_t>(what);
  if (rank < 1 || rank > 4)
    fail_file("{}: tensor '{}' has rank {}; expected 1 to 4", cursor.name(), tensor, rank);
  std::vector<std::int64_t> shape(rank);
  // 2^60 elements of at most 8 bytes still fit a signed 64-bit byte count.
  constexpr std::uint64_t kMostElements = std::uint64_t{1} << 60;
  std::uint64_t elements = 1;
  for (std::uint32_t i = 0; i < rank; ++i) {
    const auto extent = cursor.take<std::uint64_t>(what);
    if (extent == 0 || extent > kMostElements / elements)
      fail_file("{}: tensor '{}' has an impossible extent {}", cursor.name(), tensor, extent);
    elements *= extent;
    shape[rank - 1 - i] = static_cast<std::int64_t>(extent);
  }
  return shape;
}

/// One entry of the tensor list; `offset` is still relative to the data section.
GgufTensor take_tensor(Cursor& cursor) {
  GgufTensor tensor;
  tensor.name = cursor.take_string("the name of a tensor");
  tensor.shape = take_shape(cursor, tensor.name);
  const auto code = cursor.take<std::uint32_t>("the type of tensor '" + tensor.name + "'");
  const auto dtype = readable_type(code);
  if (!dtype)
    fail_file(
        "{}: tensor '{}' has type {} ({}); F32, F16, BF16, Q8_0, Q4_0 and Q4_1 can be read. "
        "Requantise the model to Q8_0 or F16",
        cursor.name(), tensor.name, ggml_type_name(code), code);
  tensor.dtype = *dtype;
  if (is_quantised(*dtype) && tensor.shape.back() % kQuantBlock != 0)
    fail_file("{}: tensor '{}' is {} with rows of {} values; expected a multiple of {}",
              cursor.name(), tensor.name, dtype_name(*dtype), tensor.shape.back(), kQuantBlock);
  tensor.bytes = dtype_bytes(*dtype, tensor.num_elements());
  const auto offset = cursor.take<std::uint64_t>("the offset of tensor '" + tensor.name + "'");
  if (offset > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
    fail_file("{}: tensor '{}' has offset {}, beyond the end of the file", cursor.name(),
              tensor.name, offset);
  tensor.offset = static_cast<std::int64_t>(offset);
  return tensor;
}

/// Turns relative offsets into absolute ones; every tensor must lie inside the file, aligned, and
/// on bytes of its own.
void place_tensors(std::vector<GgufTensor>& tensors, const Cursor& cursor, std::int64_t alignment) {
  const auto end = static_cast<std::int64_t>(cursor.position());
  const std::int64_t data = (end + alignment - 1) / alignment * alignment;
  const std::int64_t size = end + static_cast<std::int64_t>(cursor.remaining()) - data;
  for (GgufTensor& tensor : tensors) {
    if (tensor.offset % alignment != 0)
      fail_file("{}: tensor '{}' starts at offset {}; expected a multiple of {}", cursor.name(),
                tensor.name, tensor.offset, alignment);
    if (tensor.offset > size || tensor.bytes > size - tensor.offset)
      fail_file(
          "{}: tensor '{}' needs bytes [{}, {} + {}) of the data, but there are {}; the file is "
          "truncated or damaged",
          cursor.name(), tensor.name, tensor.offset, tensor.offset, tensor.bytes,
          std::max<std::int64_t>(size, 0));
    tensor.offset += data;
  }
  std::vector<const GgufTensor*> by_offset;
  for (const GgufTensor& tensor : tensors) by_offset.push_back(&tensor);
  std::sort(by_offset.begin(), by_offset.end(),
            [](const GgufTensor* a, const GgufTensor* b) { return a->offset < b->offset; });
  for (std::size_t i = 1; i < by_offset.size(); ++i)
    if (by_offset[i - 1]->offset + by_offset[i - 1]->bytes > by_offset[i]->offset)
      fail_file("{}: tensors '{}' and '{}' overlap", cursor.name(), by_offset[i - 1]->name,
                by_offset[i]->name);
}

void check_magic_and_version(Cursor& cursor) {
  if (cursor.remaining() < 4 || cursor.take<std::uint32_t>("the magic") != 0x46554747u)  // "GGUF"
    fail_file("{}: is not a GGUF file: it does not start with 'GGUF'", cursor.name());
  const auto version = cursor.take<std::uint32_t>("the version");
  if (version == 0x03000000u)
    fail_file("{}: is a big-endian GGUF file; only little-endian ones can be read", cursor.name());
  if (version != 3)
    fail_file("{}: is GGUF version {}; only version 3 can be read. Convert the model again",
              cursor.name(), version);
}

}  // namespace

std::int64_t GgufTensor::num_elements() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

GgufFile GgufFile::open(const std::filesystem::path& path) {
  GgufFile gguf(MappedFile::open(path));
  Cursor cursor(gguf.file_);
  check_magic_and_version(cursor);
  const auto num_tensors = cursor.take<std::uint64_t>("the tensor count");
  const auto num_keys = cursor.take<std::uint64_t>("the key count");
  // A key takes at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 8 + 4 + 8.
  if (num_keys > cursor.remaining() / 13 || num_tensors > cursor.remaining() / 32)
    fail_file("{}: claims {} keys and {} tensors, more than {} bytes can hold", cursor.name(),
              num_keys, num_tensors, cursor.remaining());

  for (std::uint64_t i = 0; i < num_keys; ++i) {
    const std::string key(cursor.take_string("the name of a key"));
    Value value = take_value(cursor, key);
    if (!gguf.metadata_.emplace(key, std::move(value)).second)
      fail_file("{}: key '{}' occurs twice", cursor.name(), key);
  }
  for (std::uint64_t i = 0; i < num_tensors; ++i) {
    GgufTensor tensor = take_tensor(cursor);
    if (!gguf.index_of_name_.emplace(tensor.name, gguf.tensors_.size()).second)
      fail_file("{}: tensor '{}' occurs twice", cursor.name(), tensor.name);
    gguf.tensors_.push_back(std::move(tensor));
  }
  const std::int64_t alignment = gguf.integer("general.alignment").value_or(32);
  if (alignment < 1 || alignment > (1 << 20) ||
      !std::has_single_bit(static_cast<std::uint64_t>(alignment)))
    fail_file("{}: key 'general.alignment' is {}; expected a power of two", cursor.name(),
              alignment);
  place_tensors(gguf.tensors_, cursor, alignment);
  gguf.keys_end_ = cursor.position();
  gguf.release_keys();  // with a vocabulary, some megabytes
  return gguf;
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto found = index_of_name_.find(name);
  return found == index_of_name_.end() ? nullptr : &tensors_[found->second];
}

std::span<const std::byte> GgufFile::raw(const GgufTensor& tensor) const {
  return bytes().subspan(static_cast<std::size_t>(tensor.offset),
                         static_cast<std::size_t>(tensor.bytes));
}

const GgufFile::Value* GgufFile::value(std::string_view key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

template <typename T>
const T* GgufFile::value_as(std::string_view key, const char* expected) const {
  const Value* held = value(key);
  if (held == nullptr) return nullptr;
  const T* typed = std::get_if<T>(held);
  if (typed == nullptr) fail_file("{}: key '{}' does not hold {}", path().string(), key, expected);
  return typed;
}

std::optional<std::string> GgufFile::string(std::string_view key) const {
  const auto* held = value_as<std::string>(key, "a string");
  return held == nullptr ? std::nullopt : std::optional(*held);
}

std::optional<std::int64_t> GgufFile::integer(std::string_view key) const {
  const auto* held = value_as<std::int64_t>(key, "an integer in the range of int64");
  return held == nullptr ? std::nullopt : std::optional(*held);
}

std::optional<double> GgufFile::number(std::string_view key) const {
  const Value* held = value(key);
  if (held != nullptr && std::holds_alternative<std::int64_t>(*held))
    return static_cast<double>(std::get<std::int64_t>(*held));
  const auto* typed = value_as<double>(key, "a number");
  return typed == nullptr ? std::nullopt : std::optional(*typed);
}

std::optional<bool> GgufFile::boolean(std::string_view key) const {
  const auto* held = value_as<bool>(key, "true or false");
  return held == nullptr ? std::nullopt : std::optional(*held);
}

std::optional<std::vector<std::string_view>> GgufFile::strings(std::string_view key) const {
  const auto* held = value_as<StringArray>(key, "an array of strings");
  if (held == nullptr) return std::nullopt;
  Cursor cursor(file_, held->begin);
  std::vector<std::string_view> strings;
  strings.reserve(held->count);
  const std::string what = "a string";  // all were there when the file was opened
  for (std::uint64_t i = 0; i < held->count; ++i) strings.push_back(cursor.take_string(what));
  return strings;
}

const std::vector<std::int64_t>* GgufFile::integers(std::string_view key) const {
  return value_as<std::vector<std::int64_t>>(key, "an array of integers");
}

const std::vector<double>* GgufFile::floats(std::string_view key) const {
  return value_as<std::vector<double>>(key, "an array of numbers");
}

}  // namespace cleave
