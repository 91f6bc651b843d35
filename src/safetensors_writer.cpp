#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "atomic_file.h"
#include "cleave/checkpoint.h"
#include "decoder_tensors.h"
#include "fail.h"
#include "json.h"
#include "quants.h"

namespace cleave {
namespace {

std::int64_t count_elements(const NamedTensor& tensor) {
  // A byte count of at most 4 per element must fit.
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 4;
  std::int64_t count = 1;
  for (const std::int64_t extent : tensor.shape) {
    if (extent < 0 || (extent != 0 && count > kMost / extent))
      fail_argument("write_safetensors: tensor '{}' has the impossible shape {}", tensor.name,
                    shape_text(tensor.shape));
    count *= extent;
  }
  return count;
}

std::vector<const NamedTensor*> sorted_by_name(std::span<const NamedTensor> tensors) {
  std::vector<const NamedTensor*> sorted;
  for (const NamedTensor& tensor : tensors) sorted.push_back(&tensor);
  std::sort(sorted.begin(), sorted.end(),
            [](const NamedTensor* a, const NamedTensor* b) { return a->name < b->name; });
  for (std::size_t i = 1; i < sorted.size(); ++i)
    if (sorted[i - 1]->name == sorted[i]->name)
      fail_argument("write_safetensors: tensor '{}' is given twice", sorted[i]->name);
  return sorted;
}

std::string quoted(const std::string& name) {
  try {
    return nlohmann::json(name).dump();
  } catch (const nlohmann::json::exception&) {
    fail_argument("write_safetensors: a tensor's name is not UTF-8");
  }
}

/// Length and JSON, padded with spaces so that the data begin at a multiple of 8.
std::string make_header(std::span<const NamedTensor* const> tensors, DType dtype) {
  // Transformers 4 refuses files without "format".
  std::string json = R"({"__metadata__":{"format":"pt"})";
  std::int64_t begin = 0;
  for (const NamedTensor* tensor : tensors) {
    const std::int64_t end = begin + dtype_bytes(dtype, count_elements(*tensor));
    json += fmt::format(R"(,{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                        quoted(tensor->name), dtype_name(dtype), fmt::join(tensor->shape, ","),
                        begin, end);
    begin = end;
  }
  json += "}";
  json.append((8 - json.size() % 8) % 8, ' ');
  std::string header(8, '\0');
  const std::uint64_t length = json.size();
  std::memcpy(header.data(), &length, sizeof length);
  return header + json;
}

/// Values from here on round to infinity.
float overflow_limit(DType dtype) {
  if (dtype == DType::kF16) return 65520.0f;
  if (dtype == DType::kBF16) return std::bit_cast<float>(0x7f7f8000u);
  return std::numeric_limits<float>::infinity();
}

std::vector<float> load_checked(const NamedTensor& tensor, DType dtype) {
  std::vector<float> values = tensor.load();
  if (static_cast<std::int64_t>(values.size()) != count_elements(tensor))
    fail_argument("write_safetensors: tensor '{}' has {} values; its shape {} needs {}",
                  tensor.name, values.size(), shape_text(tensor.shape), count_elements(tensor));
  const float limit = overflow_limit(dtype);
  const auto writable = [limit](float value) { return std::fabs(value) < limit; };
  const auto bad = std::find_if_not(values.begin(), values.end(), writable);
  if (bad != values.end())
    fail_argument("write_safetensors: tensor '{}' holds {} at element {}, which {} cannot hold",
                  tensor.name, *bad, bad - values.begin(), dtype_name(dtype));
  return values;
}

}  // namespace

void write_safetensors(const std::filesystem::path& file, std::span<const NamedTensor> tensors,
                       DType dtype) {
  if (dtype != DType::kF32 && dtype != DType::kF16 && dtype != DType::kBF16)
    fail_argument("write_safetensors: cannot write {}; expected F32, F16 or BF16",
                  dtype_name(dtype));
  const auto sorted = sorted_by_name(tensors);
  const std::string header = make_header(sorted, dtype);
  AtomicFile out(file);
  out.write(header);
  std::vector<std::byte> bytes;
  for (const NamedTensor* tensor : sorted) {
    const std::vector<float> values = load_checked(*tensor, dtype);
    bytes.resize(
        static_cast<std::size_t>(dtype_bytes(dtype, static_cast<std::int64_t>(values.size()))));
    encode(dtype, values, bytes);
    out.write(bytes);
  }
  out.commit();
}

}  // namespace cleave
