#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "decoder_tensors.h"
#include "fail.h"
#include "json.h"
#include "mapped_file.h"
#include "model_files.h"
#include "safetensors.h"

// A HuggingFace directory: config.json beside model.safetensors, or beside several files and an
// index that says which tensor lies in which.

namespace cleave {
namespace {

namespace fs = std::filesystem;

/// The index may name files of its own folder only: a downloaded model must not reach elsewhere.
void check_inside(const std::string& file, const std::string& tensor, const fs::path& index) {
  const fs::path path(file);
  const bool climbs = std::find(path.begin(), path.end(), fs::path("..")) != path.end();
  if (file.empty() || path.is_absolute() || climbs)
    fail_file("{}: tensor '{}' is said to lie in '{}'; expected a file inside the model's folder",
              index.string(), tensor, file);
}

/// Tensor name to file name.
std::map<std::string, std::string> read_weight_map(const fs::path& index) {
  const nlohmann::json object = parse_json_object(read_text_file(index), index.string());
  const JsonReader json(object, index.string());
  const nlohmann::json* weight_map = json.find("weight_map");
  if (weight_map == nullptr) fail_file("{}: key 'weight_map' is missing", index.string());
  if (!weight_map->is_object() || weight_map->empty())
    json.fail_type("weight_map", "an object that maps tensors to files");
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string())
      fail_file("{}: tensor '{}' is not mapped to a file name", index.string(), tensor);
    files[tensor] = file.get<std::string>();
    check_inside(files[tensor], tensor, index);
  }
  return files;
}

void add_tensor(ModelFiles& model, const SafetensorsFile& shard, const std::string& name) {
  model.infos.push_back(shard.info(name));
  model.stored.push_back({shard.raw(name), 0});
}

void open_single(ModelFiles& model, const fs::path& file) {
  model.weight_files = {file};
  model.shards.push_back(SafetensorsFile::open(file));
  for (const TensorInfo& info : model.shards.front().tensors())
    add_tensor(model, model.shards.front(), info.name);
}

void open_sharded(ModelFiles& model, const fs::path& index) {
  const auto file_of_tensor = read_weight_map(index);
  std::map<std::string, std::size_t> shard_of_file;
  for (const auto& [tensor, file] : file_of_tensor) shard_of_file.emplace(file, 0);
  for (auto& [file, shard] : shard_of_file) {
    shard = model.shards.size();
    model.weight_files.push_back(model.directory / file);
    model.shards.push_back(SafetensorsFile::open(model.weight_files.back()));
  }
  for (const auto& [tensor, file] : file_of_tensor) {  // a map: sorted by name
    const SafetensorsFile& shard = model.shards[shard_of_file[file]];
    if (!shard.contains(tensor))
      fail_file("{}: tensor '{}' is said to lie in {}, which does not hold it", index.string(),
                tensor, file);
    add_tensor(model, shard, tensor);
  }
}

/// After renaming: the bytes have to move along.
void sort_by_name(ModelFiles& model) {
  std::vector<std::size_t> order(model.infos.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return model.infos[a].name < model.infos[b].name;
  });
  ModelFiles sorted;
  for (const std::size_t i : order) {
    sorted.infos.push_back(model.infos[i]);
    sorted.stored.push_back(model.stored[i]);
  }
  model.infos = std::move(sorted.infos);
  model.stored = std::move(sorted.stored);
}

/// Writers keep one of two tensors that share memory, and for a tied head that may be `lm_head`:
/// then it is the embedding under another name.
void name_tied_embedding(ModelFiles& model) {
  const auto head = find_tensor(model.infos, "lm_head.weight");
  if (!model.config.tie_word_embeddings || !head ||
      find_tensor(model.infos, "model.embed_tokens.weight"))
    return;
  model.infos[*head].name = "model.embed_tokens.weight";
  sort_by_name(model);
}

/// A BERT with a head keeps its encoder under "bert.", and checkpoints converted from TensorFlow
/// call a norm's weight and bias `gamma` and `beta`. Transformers reads both as it reads the plain
/// names.
void name_bert_tensors(ModelFiles& model) {
  if (!is_bert(model.config.family)) return;
  for (TensorInfo& info : model.infos) {
    if (info.name.starts_with("bert.")) info.name.erase(0, std::string_view("bert.").size());
    for (const auto& [theirs, ours] :
         {std::pair{"LayerNorm.gamma", "LayerNorm.weight"}, {"LayerNorm.beta", "LayerNorm.bias"}})
      if (info.name.ends_with(theirs))
        info.name.replace(info.name.size() - std::string_view(theirs).size(), std::string::npos,
                          ours);
  }
  sort_by_name(model);
  const auto twice =
      std::adjacent_find(model.infos.begin(), model.infos.end(),
                         [](const TensorInfo& a, const TensorInfo& b) { return a.name == b.name; });
  if (twice != model.infos.end())
    fail_file("{}: holds tensor '{}' with and without the prefix 'bert.', or under two names",
              model.directory.string(), twice->name);
}

}  // namespace

ModelFiles open_safetensors_model(const fs::path& weights) {
  ModelFiles model;
  model.format = Checkpoint::Format::kSafetensors;
  model.directory = weights.has_parent_path() ? weights.parent_path() : fs::path(".");
  const fs::path config = model.directory / "config.json";
  if (!fs::exists(config))
    fail_file("{}: there is no config.json; expected a HuggingFace model directory",
              model.directory.string());
  model.config = parse_model_config(read_text_file(config), config.string());
  if (weights.extension() == ".json")
    open_sharded(model, weights);
  else
    open_single(model, weights);
  name_tied_embedding(model);
  name_bert_tensors(model);
  check_decoder_tensors(model.config, model.infos, weights.string());
  return model;
}

}  // namespace cleave
