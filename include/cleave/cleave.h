#pragma once

// cleave::core, in pipeline order: the table of contents of the library. No gradient, no LibTorch.
#include "cleave/error.h"
#include "cleave/version.h"
#include "cleave/views.h"
// 1 read
#include "cleave/checkpoint.h"
#include "cleave/model_config.h"
#include "cleave/text.h"
#include "cleave/tokenizer.h"
// 2 split
#include "cleave/expert.h"
#include "cleave/factorize.h"
#include "cleave/partition.h"
// 3 route
#include "cleave/fit_router.h"
#include "cleave/mass_router.h"
#include "cleave/refit.h"
#include "cleave/regression_router.h"
#include "cleave/routing.h"
// 4 run
#include "cleave/calibrate.h"
#include "cleave/evaluate.h"
#include "cleave/kernels.h"
#include "cleave/model.h"
#include "cleave/moe_layer.h"
#include "cleave/packed.h"
#include "cleave/self_text.h"
#include "cleave/threshold.h"
// 5 the whole way, and writing
#include "cleave/baselines.h"
#include "cleave/convert.h"
#include "cleave/export.h"
#include "cleave/report.h"
