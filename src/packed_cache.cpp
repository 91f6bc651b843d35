#include "packed_cache.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

#include "atomic_file.h"
#include "fail.h"
#include "hash64.h"
#include "kernels/packed_format.h"
#include "mapped_file.h"

namespace cleave {
namespace {

constexpr const char* kFormatName = "cleave-packed";
constexpr const char* kChecksums = "checksums";
// Parts begin on pages, so that an engine can map, lock or drop each alone.
constexpr std::int64_t kPage = 4096;
// One checksum for so many bytes of the data: small enough to be checked by all threads at once.
constexpr std::int64_t kChunk = 1 << 20;

std::int64_t up_to(std::int64_t multiple, std::int64_t value) {
  return (value + multiple - 1) / multiple * multiple;
}

using Bytes = std::shared_ptr<const std::byte[]>;
/// The stored bytes of a part, mapped, or nullptr if only its size is wanted.
using FindPart = std::function<Bytes(const std::string& name, std::int64_t bytes)>;

/// Puts a decoder together from its parts, whose sizes follow from the configuration.
class Assembler {
 public:
  Assembler(const ModelConfig& config, WeightType type, const FindPart& find)
      : c_(config), type_(type), find_(find) {}

  DecoderWeights decoder() const {
    DecoderWeights w;
    const WeightType vocabulary = vocabulary_weight_type(type_);
    w.embedding = linear("embedding", c_.vocab_size, c_.hidden_size, vocabulary);
    if (!c_.rotary) w.positions = floats("positions", c_.max_position_embeddings * c_.hidden_size);
    for (std::int64_t l = 0; l < c_.num_layers; ++l) w.layers.push_back(layer(l));
    w.final_norm = norm("final_norm");
    if (c_.has_head)
      w.head = c_.tie_word_embeddings ? w.embedding
                                      : linear("head", c_.vocab_size, c_.hidden_size, vocabulary);
    return w;
  }

 private:
  LayerWeights layer(std::int64_t l) const {
    const std::string prefix = fmt::format("layers.{}.", l);
    const std::int64_t D = c_.hidden_size, q = c_.num_heads * c_.head_dim;
    const std::int64_t qkv = q + 2 * c_.num_kv_heads * c_.head_dim;
    LayerWeights w;
    w.input_norm = norm(prefix + "input_norm");
    w.qkv = linear(prefix + "qkv", qkv, D, type_);
    if (c_.attention_bias) w.qkv_bias = floats(prefix + "qkv_bias", qkv);
    w.output = linear(prefix + "output", D, q, type_);
    if (c_.attention_bias) w.output_bias = floats(prefix + "output_bias", D);
    w.post_norm = norm(prefix + "post_norm");
    if (!c_.is_moe()) {
      w.ffn = experts(prefix, "experts", 1, c_.intermediate_size);
      return w;
    }
    PackedMoe moe;
    moe.experts = experts(prefix, "experts", c_.num_experts, c_.intermediate_size);
    if (c_.shared_width(l) > 0) moe.shared = experts(prefix, "shared", 1, c_.shared_width(l));
    moe.router = linear(prefix + "router", c_.num_experts, D, router_weight_type(type_));
    moe.experts_per_token = c_.experts_per_token;
    w.ffn = std::move(moe);
    return w;
  }

  NormWeights norm(const std::string& name) const {
    NormWeights weights{floats(name, c_.hidden_size), {}};
    if (c_.layer_norm) weights.bias = floats(name + "_bias", c_.hidden_size);
    return weights;
  }

  PackedExperts experts(const std::string& prefix, const std::string& name, std::int64_t count,
                        std::int64_t width) const {
    PackedExpertsParts parts;
    parts.d_model = c_.hidden_size;
    parts.gated = c_.gated_ffn;
    parts.activation = c_.activation;
    parts.type = type_;
    parts.widths.assign(count, width);
    const PackedExperts shape(parts);
    const std::int64_t lanes = shape.panel_begin(count) * kPanelWidth;
    parts.panels = find_(prefix + name, shape.bytes());
    // Of the families with experts those without a gate have biases.
    if (c_.mlp_bias && (!c_.is_moe() || !c_.gated_ffn)) {
      parts.lane_bias = floats(prefix + name + "_bias", lanes);
      if (name == "experts") parts.down_bias = floats(prefix + "down_bias", c_.hidden_size);
    }
    return PackedExperts(std::move(parts));
  }

  PackedLinear linear(const std::string& name, std::int64_t rows, std::int64_t cols,
                      WeightType type) const {
    return {rows, cols, type, find_(name, PackedLinear(rows, cols, type, Bytes()).bytes())};
  }

  std::vector<float> floats(const std::string& name, std::int64_t count) const {
    std::vector<float> values(static_cast<std::size_t>(count));
    const auto bytes = count * static_cast<std::int64_t>(sizeof(float));
    if (const Bytes stored = find_(name, bytes)) {
      std::memcpy(values.data(), stored.get(), static_cast<std::size_t>(bytes));
      release_pages({stored.get(), static_cast<std::size_t>(bytes)});  // of this part alone
    }
    return values;
  }

  const ModelConfig& c_;
  WeightType type_;
  const FindPart& find_;
};

/// The parts of a layer in the assembler's order: put(name, bytes).
template <typename Put>
void put_layer(const LayerWeights& w, const std::string& prefix, const Put& put) {
  const auto floats = [&](const std::string& name, std::span<const float> values) {
    if (!values.empty()) put(prefix + name, std::as_bytes(values));
  };
  const auto linear = [&](const char* name, const PackedLinear& packed) {
    put(prefix + name, std::span(packed.data(), static_cast<std::size_t>(packed.bytes())));
  };
  const auto norm = [&](const std::string& name, const NormWeights& weights) {
    floats(name, weights.weight);
    floats(name + "_bias", weights.bias);
  };
  norm("input_norm", w.input_norm);
  linear("qkv", w.qkv);
  floats("qkv_bias", w.qkv_bias);
  linear("output", w.output);
  floats("output_bias", w.output_bias);
  norm("post_norm", w.post_norm);
  const auto panels = [&](const std::string& name, const PackedExperts& packed) {
    put(prefix + name, std::span(packed.expert(0), static_cast<std::size_t>(packed.bytes())));
    floats(name + "_bias", packed.lane_bias());
  };
  const auto* moe = std::get_if<PackedMoe>(&w.ffn);
  const PackedExperts& experts = moe != nullptr ? moe->experts : std::get<PackedExperts>(w.ffn);
  panels("experts", experts);
  floats("down_bias", experts.down_bias());
  if (moe == nullptr) return;
  if (moe->shared.num_experts() > 0) panels("shared", moe->shared);
  linear("router", moe->router);
}

struct Part {
  std::string name;
  std::int64_t bytes;
};

std::vector<Part> list_parts(const ModelConfig& config, WeightType type) {
  std::vector<Part> parts;
  const FindPart record = [&](const std::string& name, std::int64_t bytes) {
    parts.push_back({name, bytes});
    return nullptr;
  };
  Assembler(config, type, record).decoder();
  return parts;
}

/// Length, JSON and the spaces that bring the data to a page.
std::string cache_header(const std::vector<Part>& parts, std::int64_t chunks, WeightType type,
                         const std::string& source) {
  std::string json = fmt::format(
      R"({{"__metadata__":{{"format":"{}","version":"{}","weights":"{}","source":"{}"}})",
      kFormatName, kPackedCacheVersion, weight_type_name(type), source);
  std::int64_t begin = 0;
  const auto add = [&](const std::string& name, const char* dtype, std::int64_t count,
                       std::int64_t bytes) {
    json += fmt::format(R"(,"{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", name,
                        dtype, count, begin, begin + bytes);
    begin += bytes;
  };
  for (const Part& part : parts)
    add(part.name, "U8", up_to(kPage, part.bytes), up_to(kPage, part.bytes));
  add(kChecksums, "I64", chunks, chunks * 8);
  json += "}";
  const auto end = static_cast<std::int64_t>(json.size()) + 8;
  json.append(static_cast<std::size_t>(up_to(kPage, end) - end), ' ');
  std::string header(8, '\0');
  const std::uint64_t length = json.size();
  std::memcpy(header.data(), &length, sizeof length);
  return header + json;
}

/// Writes parts in the order of the plan, and what is left for the end: the checksums.
class CacheWriter {
 public:
  CacheWriter(const std::filesystem::path& file, const Checkpoint& checkpoint, WeightType type)
      : file_(file), parts_(list_parts(checkpoint.config(), type)) {
    std::int64_t bytes = 0;
    for (const Part& part : parts_) bytes += up_to(kPage, part.bytes);
    file_.write(
        cache_header(parts_, up_to(kChunk, bytes) / kChunk, type, checkpoint.fingerprint()));
    chunk_.reserve(kChunk);
  }

  void put(const std::string& name, std::span<const std::byte> bytes) {
    const auto size = static_cast<std::int64_t>(bytes.size());
    if (next_ == parts_.size() || parts_[next_].name != name || parts_[next_].bytes != size)
      throw Error(fmt::format("packed cache: part '{}' of {} bytes is not the next of the plan",
                              name, size));
    ++next_;
    append(bytes);
    const std::vector<std::byte> zeros(static_cast<std::size_t>(up_to(kPage, size) - size));
    append(zeros);
  }

  void commit() {
    if (next_ != parts_.size())
      throw Error(fmt::format("packed cache: part '{}' is missing", parts_[next_].name));
    if (!chunk_.empty()) flush();
    file_.write(std::as_bytes(std::span(checksums_)));
    file_.commit();
  }

 private:
  void append(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const std::size_t count = std::min(bytes.size(), kChunk - chunk_.size());
      chunk_.insert(chunk_.end(), bytes.begin(),
                    bytes.begin() + static_cast<std::ptrdiff_t>(count));
      bytes = bytes.subspan(count);
      if (chunk_.size() == kChunk) flush();
    }
  }
  void flush() {
    checksums_.push_back(hash64(chunk_));
    file_.write(chunk_);
    chunk_.clear();
  }

  AtomicFile file_;
  std::vector<Part> parts_;
  std::size_t next_ = 0;
  std::vector<std::byte> chunk_;
  std::vector<std::uint64_t> checksums_;
};

void check_header(const SafetensorsFile& cache, const std::string& file,
                  const Checkpoint& checkpoint, WeightType type) {
  if (cache.metadata("format") != kFormatName) fail_file("{}: holds no packed weights", file);
  if (cache.metadata("version") != std::to_string(kPackedCacheVersion))
    fail_file("{}: is of format version {}, this cleave uses {}", file, cache.metadata("version"),
              kPackedCacheVersion);
  if (cache.metadata("weights") != weight_type_name(type))
    fail_file("{}: holds {} weights; {} are wanted", file, cache.metadata("weights"),
              weight_type_name(type));
  if (cache.metadata("source") != checkpoint.fingerprint())
    fail_file("{}: was packed from another model, or {} has changed since", file,
              checkpoint.path().string());
}

/// All parts lie one after the other, so they are checked as one range.
void check_data(const SafetensorsFile& cache, const std::string& file,
                const std::vector<Part>& parts, const ParallelFor& parallel) {
  std::int64_t size = 0;
  for (const Part& part : parts) {
    if (!cache.contains(part.name)) fail_file("{}: has no part '{}'", file, part.name);
    const auto bytes = cache.raw(part.name);
    if (static_cast<std::int64_t>(bytes.size()) != up_to(kPage, part.bytes) ||
        bytes.data() != cache.raw(parts.front().name).data() + size)
      fail_file("{}: part '{}' is not where it should be", file, part.name);
    size += static_cast<std::int64_t>(bytes.size());
  }
  const std::int64_t chunks = up_to(kChunk, size) / kChunk;
  if (!cache.contains(kChecksums) ||
      static_cast<std::int64_t>(cache.raw(kChecksums).size()) != chunks * 8)
    fail_file("{}: has no checksums for its {} bytes", file, size);
  const std::span data(cache.raw(parts.front().name).data(), static_cast<std::size_t>(size));
  const std::byte* checksums = cache.raw(kChecksums).data();
  parallel(chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto chunk =
          data.subspan(static_cast<std::size_t>(i * kChunk),
                       static_cast<std::size_t>(std::min(kChunk, size - i * kChunk)));
      std::uint64_t expected;
      std::memcpy(&expected, checksums + 8 * i, sizeof expected);
      if (hash64(chunk) != expected)
        fail_file("{}: is damaged: a checksum between bytes {} and {} of its data is wrong", file,
                  i * kChunk, i * kChunk + static_cast<std::int64_t>(chunk.size()));
    }
  });
}

}  // namespace

std::filesystem::path default_cache_file(const Checkpoint& checkpoint, WeightType type) {
  const std::string ending = fmt::format("{}.packed", weight_type_name(type));
  if (checkpoint.format() == Checkpoint::Format::kGguf)
    return checkpoint.path().string() + "." + ending;
  return checkpoint.directory() / ("cleave." + ending);
}

DecoderWeights read_packed_cache(const std::filesystem::path& file, const Checkpoint& checkpoint,
                                 WeightType type, const ParallelFor& parallel) {
  const auto cache = std::make_shared<const SafetensorsFile>(SafetensorsFile::open(file));
  check_header(*cache, file.string(), checkpoint, type);
  check_data(*cache, file.string(), list_parts(checkpoint.config(), type), parallel);
  const FindPart find = [&](const std::string& name, std::int64_t) {
    return Bytes(cache, cache->raw(name).data());
  };
  return Assembler(checkpoint.config(), type, find).decoder();
}

void write_packed_cache(const std::filesystem::path& file, const Checkpoint& checkpoint,
                        WeightType type, const DecoderPacker& packer) {
  CacheWriter writer(file, checkpoint, type);
  const auto put = [&](const std::string& name, std::span<const std::byte> bytes) {
    writer.put(name, bytes);
  };
  const auto put_linear = [&](const std::string& name, const PackedLinear& packed) {
    writer.put(name, {packed.data(), static_cast<std::size_t>(packed.bytes())});
  };
  const ModelConfig& c = checkpoint.config();
  put_linear("embedding", packer.embedding());
  const auto put_floats = [&](const std::string& name, const std::vector<float>& values) {
    if (!values.empty()) writer.put(name, std::as_bytes(std::span(values)));
  };
  put_floats("positions", packer.positions());
  for (std::int64_t l = 0; l < c.num_layers; ++l)
    put_layer(packer.layer(l), fmt::format("layers.{}.", l), put);
  const NormWeights final_norm = packer.final_norm();
  put_floats("final_norm", final_norm.weight);
  put_floats("final_norm_bias", final_norm.bias);
  if (c.has_head && !c.tie_word_embeddings) put_linear("head", packer.head());
  writer.commit();
}

}  // namespace cleave
