// NeuronStats as a safetensors file. All values are float32; counts beyond what a float holds are
// written as two of them.

#include <fmt/format.h>

#include <cmath>
#include <initializer_list>

#include "cleave/checkpoint.h"
#include "fail.h"
#include "neuron_stats.h"

namespace cleave {
namespace {

constexpr char kSpecName[] = "neuron_stats";
constexpr float kFileVersion = 1.0f;
constexpr std::int64_t kCountBase = 1 << 20;

std::string tensor_name(std::int64_t layer, const char* what) {
  return fmt::format("layers.{}.{}", layer, what);
}

std::vector<float> means_of(const std::vector<double>& sum, double weight) {
  std::vector<float> out(sum.size());
  for (std::size_t i = 0; i < sum.size(); ++i)
    out[i] = weight > 0.0 ? static_cast<float>(sum[i] / weight) : 0.0f;
  return out;
}

std::vector<double> sums_of(const std::vector<float>& mean, double weight) {
  std::vector<double> out(mean.size());
  for (std::size_t i = 0; i < mean.size(); ++i) out[i] = weight * mean[i];
  return out;
}

/// [tokens / base, tokens % base, seen / base, seen % base, weight, its rounding error].
std::vector<float> counts_of(const LayerStats& layer) {
  const float weight = static_cast<float>(layer.weight);
  return {static_cast<float>(layer.tokens / kCountBase),
          static_cast<float>(layer.tokens % kCountBase),
          static_cast<float>(layer.seen / kCountBase),
          static_cast<float>(layer.seen % kCountBase),
          weight,
          static_cast<float>(layer.weight - weight)};
}

class StatsWriter {
 public:
  explicit StatsWriter(const NeuronStatsSpec& spec) : spec_(spec) {
    tensors.push_back({kSpecName, {8}, [spec] {
                         return std::vector<float>{kFileVersion,
                                                   static_cast<float>(spec.num_layers),
                                                   static_cast<float>(spec.hidden),
                                                   static_cast<float>(spec.d_model),
                                                   static_cast<float>(spec.top),
                                                   spec.input_moment ? 1.0f : 0.0f,
                                                   spec.gram ? 1.0f : 0.0f,
                                                   spec.coactivation ? 1.0f : 0.0f};
                       }});
  }

  void add(std::int64_t l, const LayerStats& layer) {
    const std::int64_t H = spec_.hidden;
    if (const auto size = static_cast<std::int64_t>(layer.gate_means.size()); size > 0)
      tensors.push_back(
          {tensor_name(l, "gate_means"), {size / H, H}, [&] { return layer.gate_means; }});
    if (layer.sum.empty()) return;
    tensors.push_back({tensor_name(l, "counts"), {6}, [&] { return counts_of(layer); }});
    add_mean(l, "mean", layer.sum, layer.weight);
    add_mean(l, "square", layer.square, layer.weight);
    add_mean(l, "rate", layer.rate, layer.weight);
    add_matrix(l, "input_moment", layer.input_moment, layer.weight);
    add_matrix(l, "gram", layer.gram, layer.weight);
    add_matrix(l, "coactivation", layer.coactivation, layer.weight);
  }

  std::vector<NamedTensor> tensors;

 private:
  void add_mean(std::int64_t l, const char* what, const std::vector<double>& sum, double weight) {
    tensors.push_back(
        {tensor_name(l, what), {spec_.hidden}, [&sum, weight] { return means_of(sum, weight); }});
  }
  void add_matrix(std::int64_t l, const char* what, const SymmetricSum& sum, double weight) {
    if (sum.empty()) return;
    const std::int64_t n = sum.size();
    tensors.push_back({tensor_name(l, what), {n * (n + 1) / 2}, [&sum, weight] {
                         return sum.packed(weight > 0.0 ? 1.0 / weight : 0.0);
                       }});
  }
  NeuronStatsSpec spec_;
};

class StatsReader {
 public:
  explicit StatsReader(const std::filesystem::path& path)
      : path_(path.string()), file_(SafetensorsFile::open(path)) {}

  NeuronStatsSpec spec() const {
    if (!file_.contains(kSpecName))
      fail_file("{}: no tensor '{}'; expected a file of `cleave calibrate`", path_, kSpecName);
    const std::vector<float> values = read(kSpecName, {8});
    for (const float value : values)
      if (value < 0.0f || value > 16777216.0f || value != std::floor(value))
        fail_file("{}: tensor '{}' holds {}; expected whole numbers up to 2^24", path_, kSpecName,
                  value);
    if (values[0] != kFileVersion)
      fail_file("{}: written in version {} of the format; this cleave reads version {}", path_,
                values[0], kFileVersion);
    return {.num_layers = static_cast<std::int64_t>(values[1]),
            .hidden = static_cast<std::int64_t>(values[2]),
            .d_model = static_cast<std::int64_t>(values[3]),
            .top = static_cast<std::int64_t>(values[4]),
            .input_moment = values[5] != 0.0f,
            .gram = values[6] != 0.0f,
            .coactivation = values[7] != 0.0f};
  }

  void read_layer(const NeuronStatsSpec& spec, std::int64_t l, LayerStats& layer) const {
    if (const std::string gates = tensor_name(l, "gate_means"); file_.contains(gates)) {
      const auto& shape = file_.info(gates).shape;
      layer.gate_means = read(gates, {shape.empty() ? 0 : shape[0], spec.hidden});
    }
    if (!file_.contains(tensor_name(l, "counts"))) return;
    const std::vector<float> counts = read(tensor_name(l, "counts"), {6});
    layer.tokens = count(counts[0], counts[1]);
    layer.seen = count(counts[2], counts[3]);
    layer.weight = static_cast<double>(counts[4]) + counts[5];
    if (!(layer.weight >= 0.0))
      fail_file("{}: layer {} has the total weight {}", path_, l, layer.weight);
    layer.sum = sums_of(read(tensor_name(l, "mean"), {spec.hidden}), layer.weight);
    layer.square = sums_of(read(tensor_name(l, "square"), {spec.hidden}), layer.weight);
    layer.rate = sums_of(read(tensor_name(l, "rate"), {spec.hidden}), layer.weight);
    if (spec.input_moment)
      layer.input_moment = matrix(l, "input_moment", spec.d_model, layer.weight);
    if (spec.gram) layer.gram = matrix(l, "gram", spec.hidden, layer.weight);
    if (spec.coactivation)
      layer.coactivation = matrix(l, "coactivation", spec.hidden, layer.weight);
  }

 private:
  std::vector<float> read(const std::string& name,
                          std::initializer_list<std::int64_t> shape) const {
    if (!file_.contains(name)) fail_file("{}: tensor '{}' is missing", path_, name);
    const TensorInfo& info = file_.info(name);
    if (info.shape != std::vector<std::int64_t>(shape))
      fail_file("{}: tensor '{}' has the shape [{}]; expected [{}]", path_, name,
                fmt::join(info.shape, ", "), fmt::join(shape, ", "));
    std::vector<float> values = file_.read(name);
    for (const float value : values)
      if (!std::isfinite(value))
        fail_file("{}: tensor '{}' holds {}; the file is damaged", path_, name, value);
    return values;
  }
  std::int64_t count(float high, float low) const {
    if (high < 0.0f || low < 0.0f || high > 16777216.0f || low >= static_cast<float>(kCountBase))
      fail_file("{}: a count of tokens is damaged ({}, {})", path_, high, low);
    return static_cast<std::int64_t>(high) * kCountBase + static_cast<std::int64_t>(low);
  }
  SymmetricSum matrix(std::int64_t l, const char* what, std::int64_t n, double weight) const {
    return SymmetricSum::from_packed(n, read(tensor_name(l, what), {n * (n + 1) / 2}), weight);
  }

  std::string path_;
  SafetensorsFile file_;
};

}  // namespace

void NeuronStats::save(const std::filesystem::path& file) const {
  StatsWriter writer(impl_->spec);
  for (std::size_t l = 0; l < impl_->layers.size(); ++l)
    writer.add(static_cast<std::int64_t>(l), impl_->layers[l]);
  write_safetensors(file, writer.tensors, DType::kF32);
}

NeuronStats NeuronStats::load(const std::filesystem::path& file) {
  const StatsReader reader(file);
  const NeuronStatsSpec spec = reader.spec();
  try {
    NeuronStats stats(spec);
    for (std::int64_t l = 0; l < spec.num_layers; ++l)
      reader.read_layer(spec, l, stats.impl_->layers[l]);
    return stats;
  } catch (const InvalidArgument& error) {
    fail_file("{}: {}", file.string(), error.what());
  }
}

}  // namespace cleave
