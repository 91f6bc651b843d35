#pragma once

#include "cleave/baselines.h"

namespace cleave {

/// Fits a row with BaselineSpec::refit: a conversion to the row's budget that routes nothing, with
/// the defaults of BudgetSpec, so that what prunes and what routes are repaired alike.
void refit_baseline(Model& dense, const TokenWindows& calibration, const BaselineProgress& progress,
                    Baseline& baseline);

}  // namespace cleave
