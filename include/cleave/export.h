#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/expert.h"
#include "cleave/moe_layer.h"
#include "cleave/routing.h"

namespace cleave {

/// How a model was made: stored as `cleave.json` in every directory we write, so a model can tell.
struct Provenance {
  std::string tool_version;  ///< of the cleave that wrote it
  std::string source;        ///< file name (no path) of the dense model
  std::string source_sha256;
  std::int64_t num_experts = 0;        ///< E; 0: dense
  std::int64_t experts_per_token = 0;  ///< K
  std::int64_t shared_experts = 0;     ///< S; 0 also where shared_width is no multiple of I
  std::int64_t shared_width = 0;       ///< S * I, neurons that always run
  std::string partition;               ///< partition_method_name
  std::uint64_t seed = 0;
  GateMode gate = GateMode::kSoftmax;
  double folded_scale = 1.0;    ///< what `down` was multiplied by when it was written
  double router_epsilon = 1.0;  ///< what the router was multiplied by (hard gate: 2^-10)
  std::string router;           ///< "zero", "random", "ridge", "trained"
  std::vector<std::vector<std::int32_t>>
      neuron_order;  ///< [L][E * I]: dense neuron of every expert row, or ExpertBank::kPadding; of
                     ///< a dense FFN's rows
  std::vector<std::vector<std::int32_t>> shared_neurons =
      {};  ///< [L][S * I]: of every row of the shared slice that is no padding; empty
           ///< without any
  std::string spec_json;  ///< the whole command's settings, an object
};
/// @throws FileError  malformed. Empty optional where the directory has no cleave.json.
std::optional<Provenance> read_provenance(const std::filesystem::path& directory);

struct WriteSpec {
  std::optional<DType> dtype =
      std::nullopt;  ///< F32, F16 or BF16; unset: see default_write_dtype()
  bool overwrite =
      false;  ///< replace an existing directory (the old one stays until the new is whole)
  std::int64_t max_shard_bytes = 5'000'000'000;  ///< a tensor is never split
};

/// What `down` is multiplied by when the layer is written: stock classes weigh by a softmax over
/// the selected logits, whose weights sum to 1 (a hard gate's sum to K).
double folded_scale(const MoeLayer& layer);

/// The source's own type where it is F32, F16 or BF16 and `folded_scale` is a power of two (so that
/// nothing is rounded), else F32.
DType default_write_dtype(const ModelConfig& source, double folded_scale);

/// The same for layers: also F32 where a weight or bias of an expert is no value of the source's
/// type (as after a refit), or a layer's folded scale is no power of two. Router weights may be
/// rounded.
DType default_write_dtype(const ModelConfig& source, std::span<const MoeLayer> layers);

/// Hard gates in stock classes: the router is scaled by this, which keeps the order of the logits
/// and brings the softmax weights to 1 / K. Reasons and measured error: docs/methods/factorllm.md.
inline constexpr double kHardGateEpsilon = 1.0 / 1024.0;

/// HuggingFace tensor names of the Mixtral family; they are written in one place only.
struct MixtralNames {
  static std::string router(std::int64_t layer);                     ///< [E, D]
  static std::string gate(std::int64_t layer, std::int64_t expert);  ///< w1 [I, D]
  static std::string down(std::int64_t layer, std::int64_t expert);  ///< w2 [D, I]
  static std::string up(std::int64_t layer, std::int64_t expert);    ///< w3 [I, D]
};

/// Writes a directory that `AutoModelForCausalLM.from_pretrained` opens as MixtralForCausalLM
/// without remote code: per-expert 2-D tensors, config.json, tokenizer and generation files of
/// `source`, cleave.json and a model card (README.md). Everything is first written to a temporary
/// sibling, fsynced and renamed; on any error nothing is left behind.
///
/// @param source   the dense (or already converted) model that tokenizer and config come from
/// @param num_experts, experts_per_token, expert_width   E, K, I: uniform over layers
/// @param tensors  every weight in HuggingFace names (see mixtral_tensors)
/// @throws InvalidArgument  `out` exists and overwrite is off; a family the target cannot hold
/// (biases, encoders)
/// @throws FileError        the disk is full or not writable
struct MixtralShape {
  std::int64_t num_experts = 0;        ///< E
  std::int64_t experts_per_token = 0;  ///< K
  std::int64_t expert_width = 0;       ///< I
};
void write_mixtral(const std::filesystem::path& out, const Checkpoint& source,
                   const MixtralShape& shape, std::span<const NamedTensor> tensors,
                   const Provenance& provenance, const WriteSpec& spec);

/// Attention, norms and embeddings of `source` plus the experts and routers of `layers` ([L], all
/// of equal E, K and width), scale folded into down, hard gates' routers scaled by
/// kHardGateEpsilon. An explicit lm_head is written even where the source ties it. Views: `source`
/// and `layers` must outlive the result.
/// @throws InvalidArgument  layers disagree, have biases, no gate or shared experts
std::vector<NamedTensor> mixtral_tensors(const Checkpoint& source,
                                         std::span<const MoeLayer> layers);

/// HuggingFace tensor names of the Granite MoE families: the experts of a layer are fused, gate
/// rows before up rows.
struct GraniteMoeNames {
  static std::string router(std::int64_t layer);         ///< [E, D]
  static std::string input(std::int64_t layer);          ///< gate and up [E, 2I, D]
  static std::string output(std::int64_t layer);         ///< down [E, D, I]
  static std::string shared_input(std::int64_t layer);   ///< gate and up [2 S I, D]
  static std::string shared_output(std::int64_t layer);  ///< down [D, S I]
};

struct GraniteMoeSharedShape {
  std::int64_t num_experts = 0;        ///< E
  std::int64_t experts_per_token = 0;  ///< K
  std::int64_t expert_width = 0;       ///< I
  std::int64_t shared_width = 0;       ///< S * I; 0: none
};

/// As write_mixtral, for models with a shared slice: AutoModelForCausalLM opens the directory as
/// GraniteMoeSharedForCausalLM, without remote code. Attention may have biases (in Transformers and
/// llama.cpp; vLLM's class has none).
/// @throws InvalidArgument  also where head_dim is not D / heads, or attention slides
void write_granite_moe_shared(const std::filesystem::path& out, const Checkpoint& source,
                              const GraniteMoeSharedShape& shape,
                              std::span<const NamedTensor> tensors, const Provenance& provenance,
                              const WriteSpec& spec);

/// Rows of the widest shared slice; 0: none has any.
std::int64_t widest_shared(std::span<const MoeLayer> layers);

/// As mixtral_tensors; the shared slices ([L]) are written as they are, since their weight is 1.
/// The class has one width for all layers: narrower slices are padded with rows of zeros to
/// widest_shared(), which changes nothing, and which a stock loader computes all the same.
std::vector<NamedTensor> granite_moe_shared_tensors(const Checkpoint& source,
                                                    std::span<const MoeLayer> layers);

/// Writes a dense Llama directory: attention, norms, embeddings and tokenizer of `source` with
/// other FFNs, as pruning without routing leaves them. A tied head stays tied. If any FFN has a
/// bias, the others' are written as zeros (`mlp_bias`). WriteSpec::dtype unset: the source's type
/// if it holds every value exactly, else F32.
///
/// @param ffns        [L], all gated, of one width H' and one activation; read during the call
/// @param provenance  num_experts 0; neuron_order: the dense neuron of every row
/// @throws InvalidArgument  the FFNs disagree, or attention slides; else as write_mixtral
void write_llama_dense(const std::filesystem::path& out, const Checkpoint& source,
                       std::span<const DenseFfn> ffns, const Provenance& provenance,
                       const WriteSpec& spec);

/// Names of the tensors that take the place of an encoder's FFN. As Granite's, experts are fused;
/// they have no gate, and biases.
struct BertMoeNames {
  static std::string router(std::int64_t layer);             ///< [E, D]
  static std::string input(std::int64_t layer);              ///< up [E, I, D]
  static std::string input_bias(std::int64_t layer);         ///< [E, I]
  static std::string output(std::int64_t layer);             ///< down [E, D, I]
  static std::string output_bias(std::int64_t layer);        ///< [D], added once per token
  static std::string shared_input(std::int64_t layer);       ///< up [S I, D]
  static std::string shared_input_bias(std::int64_t layer);  ///< [S I]
  static std::string shared_output(std::int64_t layer);      ///< down [D, S I]
};

/// What write_bert_moe writes: uniform over layers but for the shared slices.
struct BertMoeShape {
  std::int64_t num_experts = 0;                  ///< E
  std::int64_t experts_per_token = 0;            ///< K
  std::int64_t expert_width = 0;                 ///< I
  std::vector<std::int64_t> shared_widths = {};  ///< [L], neurons that always run; empty: none
};

/// As write_mixtral, for a BERT encoder. No stock class holds one with experts, so `model_type` is
/// "cleave_bert_moe", which stock loaders refuse; cleave reads it. The rest of the encoder, its
/// pooler included, keeps names and values.
/// @throws InvalidArgument  also where the source is no BERT
void write_bert_moe(const std::filesystem::path& out, const Checkpoint& source,
                    const BertMoeShape& shape, std::span<const NamedTensor> tensors,
                    const Provenance& provenance, const WriteSpec& spec);

/// As mixtral_tensors, for write_bert_moe: experts of two matrices and a bias per neuron (zeros
/// where there is none); the down_bias of the experts is written as it is. Each shared slice has
/// its own width.
/// @throws InvalidArgument  layers disagree or have a gate, or the source is no BERT
/// @throws FileError        the source's pooler is not [D, D] and [D]
std::vector<NamedTensor> bert_moe_tensors(const Checkpoint& source,
                                          std::span<const MoeLayer> layers);

/// Shared neurons of each layer; empty: no layer has any.
std::vector<std::int64_t> shared_widths(std::span<const MoeLayer> layers);

/// As write_llama_dense, for a BERT encoder: a stock BertModel with narrower FFNs.
/// @param ffns  [L], none gated, of one width H' and one activation; a missing bias is zero
/// @throws InvalidArgument  the FFNs disagree or have a gate, or the source is no BERT; else as
///                          write_mixtral
/// @throws FileError        as write_mixtral; or the source's pooler is not [D, D] and [D]
void write_bert_dense(const std::filesystem::path& out, const Checkpoint& source,
                      std::span<const DenseFfn> ffns, const Provenance& provenance,
                      const WriteSpec& spec);

/// Throws InvalidArgument if `out` exists and `overwrite` is off, FileError if its parent folder is
/// missing or not writable. For a friendly check before hours of work.
void check_output(const std::filesystem::path& out, bool overwrite);

}  // namespace cleave
