// Learning rates over a run: linear warm-up, then a cosine or WSD (warm-up, stable, linear decay)
// down to a floor.
//
// Thread-safety: plain values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace memory3 {

struct Schedule {
  enum class Kind : uint8_t { kCosine, kWsd } kind = Kind::kCosine;
  double peak = 8e-4, floor = 8e-5;
  int64_t warmup = 100;  // steps
  int64_t steps = 1000;  // the whole run
  int64_t decay = 200;   // WSD: the last steps

  // Of step 0 … steps-1. Warm-up step i has peak · (i + 1) / warmup; the last step is one decay
  // step above the floor, which would be reached at `steps`.
  double At(int64_t step) const {
    if (step < warmup) {
      return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
    }
    const int64_t begin = kind == Kind::kCosine ? warmup : std::max(warmup, steps - decay);
    if (step < begin) return peak;
    const double part = std::min(1.0, static_cast<double>(step - begin) /
                                          static_cast<double>(std::max<int64_t>(1, steps - begin)));
    const double left =
        kind == Kind::kCosine ? 0.5 * (1 + std::cos(std::numbers::pi * part)) : 1 - part;
    return floor + (peak - floor) * left;
  }
};

}  // namespace memory3
