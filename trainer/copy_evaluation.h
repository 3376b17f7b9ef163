// Exact match on copying exercises: the curve that shows when a model begins to read memories.
//
// Thread-safety: the device's thread.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "trainer/continual.h"
#include "transformer/parameters.h"

namespace memory3 {

// Part of `exercises` values of which every token is the model's first choice (teacher-forced),
// with memories of `tokens_kept` tokens written by the model itself. Exercises are a function of
// `seed`.
absl::StatusOr<double> CopyExactMatch(const Parameters& parameters, CopyLevel level,
                                      int tokens_kept, int exercises, uint64_t seed);

}  // namespace memory3
