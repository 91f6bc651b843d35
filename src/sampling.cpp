#include <algorithm>
#include <cmath>
#include <limits>

#include "cleave/model.h"
#include "fail.h"
#include "kernels/dispatch.h"

namespace cleave {
namespace {

struct Candidate {
  std::int32_t id;
  double mass;  // probability, not normalised
};

// The smallest set of most likely tokens whose share of the mass reaches top_p, by falling mass.
void keep_top(std::vector<Candidate>& candidates, double total, double top_p) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.mass != b.mass ? a.mass > b.mass : a.id < b.id;
  });
  double reached = 0.0;
  std::size_t count = 0;
  while (count < candidates.size() && reached < top_p * total) reached += candidates[count++].mass;
  candidates.resize(std::max<std::size_t>(1, count));
}

std::int32_t check_and_find_largest(std::span<const float> logits) {
  if (logits.empty()) fail_argument("Sampler: there are no logits; expected one per token id");
  const std::int64_t largest =
      row_kernels().largest(logits.data(), static_cast<std::int64_t>(logits.size()));
  if (largest < 0) {
    const auto bad = std::find_if(logits.begin(), logits.end(), [](float logit) {
      return std::isnan(logit) || logit == std::numeric_limits<float>::infinity();
    });
    fail_argument("Sampler: the logit of token {} is {}; look for NaN in the model's weights",
                  bad - logits.begin(), *bad);
  }
  return static_cast<std::int32_t>(largest);
}

}  // namespace

Sampler::Sampler(const SamplingSpec& spec) : spec_(spec), rng_(spec.seed) {
  if (!(spec.temperature >= 0.0) || !std::isfinite(spec.temperature))
    fail_argument("Sampler: temperature is {}; expected 0 (greedy) or more", spec.temperature);
  if (!(spec.top_p > 0.0 && spec.top_p <= 1.0))
    fail_argument("Sampler: top_p is {}; expected more than 0 and at most 1", spec.top_p);
}

// std::discrete_distribution may differ between standard libraries; 53 bits of the generator and a
// walk over the sums do not.
std::int32_t Sampler::operator()(std::span<const float> logits) {
  const std::int32_t largest = check_and_find_largest(logits);
  if (spec_.temperature == 0.0) return largest;
  std::vector<Candidate> candidates;
  double total = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double mass =
        std::exp((static_cast<double>(logits[i]) - logits[largest]) / spec_.temperature);
    if (!(mass > 0.0)) continue;
    candidates.push_back({static_cast<std::int32_t>(i), mass});
    total += mass;
  }
  if (candidates.empty()) return largest;  // every logit is -inf
  if (spec_.top_p < 1.0) {
    keep_top(candidates, total, spec_.top_p);
    total = 0.0;
    for (const Candidate& candidate : candidates) total += candidate.mass;
  }
  double left = static_cast<double>(rng_() >> 11) * 0x1p-53 * total;
  for (const Candidate& candidate : candidates) {
    left -= candidate.mass;
    if (left < 0.0) return candidate.id;
  }
  return candidates.back().id;  // rounding ate the last bit
}

}  // namespace cleave
