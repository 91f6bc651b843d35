#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/routing.h"
#include "cleave/train/losses.h"
#include "cleave/train/recipe.h"
#include "cleave/train/trainer.h"

namespace cleave::train {

/// Which half of an MoE layer learns. Attention, norms and embeddings never do.
enum class Trainable { kRouter, kExperts, kJoint };

const char* trainable_name(Trainable trainable);  ///< "router", "experts", "joint"
const char* pa_form_name(PaForm form);            ///< "router-first", "target-first", "ce"
const char* label_kind_name(LabelKind kind);      ///< "per-expert", "exhaustive"
const char* balance_kind_name(BalanceKind kind);  ///< "switch", "paper"

struct FactorLlmPhase {
  Trainable trainable = Trainable::kJoint;
  std::int64_t steps = 200;
};

/// "joint" (all of `steps`), or "router:50,joint:150" (`steps` is then ignored).
/// @throws InvalidArgument  unknown word, or a count that is not a positive number
std::vector<FactorLlmPhase> parse_phases(const std::string& text, std::int64_t steps);

/// FactorLLM's choices: L = lm L_LM + sum over layers (pa L_PA + balance L_bal) + distill KL.
struct FactorLlmSpec {
  std::vector<FactorLlmPhase> phases = {{}};  ///< in order; one schedule spans all of them
  double lm_weight = 1.0;                     ///< next-token loss
  double pa_weight = 0.05;                    ///< prior-approximate loss, summed over layers
  double balance_weight = 0.01;               ///< load balance, summed over layers
  double distill_weight = 0.0;                ///< KL to the dense model's logits; 0: not computed
  PaForm pa_form = PaForm::kRouterFirst;
  LabelKind labels = LabelKind::kPerExpert;
  BalanceKind balance = BalanceKind::kSwitch;
  /// Tokens per forward pass that get labels, evenly spread; 0: all. A label costs every expert
  /// plus the dense FFN on its token, without gradients, so a quarter of the tokens saves much.
  std::int64_t pa_tokens = 0;
  std::optional<GateMode> gate = {};  ///< unset: as the student was converted
  bool straight_through = false;      ///< with hard gates: backward as if they were softmax
};
std::string to_json(const FactorLlmSpec& spec);

/// The dense model a converted one was made from, put together again from the experts as loaded
/// (laid side by side, the folded scale divided out: the order of neurons does not matter to the
/// output). Shares everything but the FFNs with `student`; its FFN weights are copies.
/// @throws InvalidArgument  the experts were trained or refitted already (cleave.json says so),
///                          there is a shared slice, or the student carries no cleave.json: pass
///                          the dense checkpoint instead
Transformer dense_teacher(Transformer student);

/// FactorLLM as a recipe (arXiv:2408.11855; docs/methods/factorllm.md has every deviation).
///
/// The PA labels of a layer come from the teacher's FFN of that layer on the student's own input.
/// With alpha = folded scale / K they compare what the served layer would return (its weights
/// averaging 1 / K) with the dense FFN. A phase that freezes the router leaves L_PA and L_bal out:
/// they could only bend the experts below to please a router that cannot answer.
///
/// @param student  its gates are set to spec.gate and spec.straight_through
/// @param teacher  dense, same shapes; may be empty when neither PA nor distillation is on
/// @throws InvalidArgument  shapes differ, no phase, no loss, a negative weight
Recipe factorllm(Transformer student, Transformer teacher, const FactorLlmSpec& spec);

/// The whole procedure on checkpoints: load, choose the teacher, train. What `cleave train` calls.
/// @param teacher  the dense checkpoint, or nullptr: dense_teacher(student)
TrainResult train_factorllm(const Checkpoint& student, const Checkpoint* teacher,
                            const TokenWindows& data, const TokenWindows* held_out,
                            const FactorLlmSpec& method, const TrainSpec& spec,
                            const TrainIo& io = {});

/// Which weights a distillation trains. Embeddings and head never learn.
struct DistillParts {
  bool router = true;
  bool experts = true;
  bool shared = true;      ///< the slice that always runs, where there is one
  bool norms = false;      ///< all of them, the final one too
  bool attention = false;  ///< q, k, v and o, without their biases
};
/// "ffn" (router, experts and shared), or names of parts: "ffn,norms", "experts,router".
/// @throws InvalidArgument  unknown word
DistillParts parse_distill_parts(const std::string& text);
/// The names of the parts that are on: "router", "experts", "shared", "norms", "attention".
std::vector<std::string> part_names(const DistillParts& parts);

/// Light tuning of a conversion: L = distill KL(teacher || student) + lm L_LM + router sum over
/// layers L_router.
struct DistillSpec {
  std::int64_t steps = 200;
  DistillParts parts = {};
  double distill_weight = 1.0;  ///< KL to the dense model's logits
  double lm_weight = 0.0;       ///< next-token loss
  double router_weight = 0.1;   ///< router_supervision_loss, summed over layers
  /// Hard gates: the losses on the logits reach the routers through GateSpec::border_temperature.
  bool soft_border = true;
  double temperature = 0.3;  ///< of the soft border, here and in the supervision
};
std::string to_json(const DistillSpec& spec);

/// Distillation as a recipe (docs/methods/tuning.md). For conversions to a budget, whose experts
/// are fine and whose gates are hard; others work as well.
///
/// @param student  its gates, execution and records are set as the spec needs them
/// @param teacher  dense, same shapes; may be empty with distill_weight = 0
/// @throws InvalidArgument  shapes differ, no loss, nothing to train, a negative weight
Recipe distill(Transformer student, Transformer teacher, const DistillSpec& spec);

/// On checkpoints: load, train, record. What `cleave train --recipe distill` calls.
/// @param teacher  the dense checkpoint, or nullptr: dense_teacher(student), for conversions that
///                 left the dense weights as they were
TrainResult train_distill(const Checkpoint& student, const Checkpoint* teacher,
                          const TokenWindows& data, const TokenWindows* held_out,
                          const DistillSpec& method, const TrainSpec& spec, const TrainIo& io = {});

/// Light tuning one layer after the other: each FFN learns to return what the dense model's would,
/// on the inputs that the tuned layers before it give.
struct LayerwiseSpec {
  std::int64_t steps = 200;  ///< of each layer
  DistillParts parts = {};   ///< router, experts, shared; norms and attention stay as they are
  /// Which part of what the layers before have lost a layer is asked to give back: 0: it aims at
  /// the dense FFN's output; 1: at the dense model's residual stream after the layer.
  double correction = 0.5;
  /// Hard gates: the error reaches the routers through GateSpec::border_temperature.
  double temperature = 0.3;
};
std::string to_json(const LayerwiseSpec& spec);

/// Tunes a conversion layer by layer (docs/methods/tuning.md). The residual streams of all of
/// `data` go through the dense model and the student together; at layer l, on the FFN's input x
/// [N, D] of the student, the FFN learns y = FFN_dense(x) + correction (dense stream - student
/// stream) by AdamW on sum_t w_t |FFN_l(x_t) - y_t|^2 / sum_t w_t |y_t|^2, w_t = 1 / mean square of
/// the stream; then both streams take the layer. A step draws spec.batch * context tokens from all
/// of the text.
///
/// Holds two residual streams of all tokens, and the layer's input and target: 4 N D numbers.
/// Checkpoints lie after every layer; a resumed run begins the layer anew that it was at, exactly.
/// spec.grad_accumulation, eval_every and checkpoint_every have no meaning here; held-out quality
/// is measured at both ends. StepReport::tokens are those of the layer at hand.
/// @param teacher  dense, same shapes
/// @throws InvalidArgument, FileError, Error  as train(); and where a stream is not finite
TrainResult layerwise(Transformer student, Transformer teacher, const TokenWindows& data,
                      const TokenWindows* held_out, const LayerwiseSpec& method,
                      const TrainSpec& spec, const TrainIo& io = {});

/// On checkpoints: load, tune, record. What `cleave train --recipe layerwise` calls.
/// @param teacher  the dense checkpoint, or nullptr: dense_teacher(student)
TrainResult train_layerwise(const Checkpoint& student, const Checkpoint* teacher,
                            const TokenWindows& data, const TokenWindows* held_out,
                            const LayerwiseSpec& method, const TrainSpec& spec,
                            const TrainIo& io = {});

}  // namespace cleave::train
