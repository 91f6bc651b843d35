#pragma once

#include <cstdint>
#include <vector>

#include "cleave_op.h"

// llama.cpp has no way to exchange an op of a model: its callbacks only look at results. But its
// graph is built by calls of two functions, build_ffn and build_moe_ffn, and the linker can send
// those calls here (-Wl,--wrap, see CMakeLists.txt). No source of llama.cpp is changed.

/// What the graphs that llama.cpp builds hold for their FFNs.
struct FfnHook {
  enum class Mode {
    kCleave,   ///< our node
    kCompare,  ///< llama.cpp's, and ours beside it; `worst` receives how far they are apart
  };
  Mode mode = Mode::kCleave;
  std::vector<FfnOp>* ops = nullptr;                       ///< [L]
  const std::vector<cleave::ExpertBank>* banks = nullptr;  ///< [L], for kCompare
  std::int64_t nodes = 0;                                  ///< that went into graphs

  struct Worst {
    std::int64_t outputs = 0;  ///< compared
    double difference = 0.0;   ///< the largest
    double share = 0.0;        ///< the largest, of what rounding allows for that output
  } worst;
};

/// Of the graphs that are built next; nullptr: llama.cpp's own FFNs.
inline FfnHook* active_hook = nullptr;
