// Random numbers that are a function of a key alone (SplitMix64): what a training step draws
// depends on (seed, step, …), so a resumed run draws the same without any stored state.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace memory3 {

class Random {
 public:
  Random(std::initializer_list<uint64_t> key) {
    for (const uint64_t k : key) state_ = Mix(state_ ^ k) + kStep;
  }
  uint64_t Next() { return Mix(state_ += kStep); }
  // Uniform in [0, n), n >= 1 (bias below n / 2^64).
  uint64_t Below(uint64_t n) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * n) >> 64);
  }
  double Unit() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  uint64_t state_ = 0;
};

// 0 … n-1 in random order (Fisher-Yates).
inline std::vector<uint32_t> RandomOrder(uint32_t n, Random random) {
  std::vector<uint32_t> order(n);
  for (uint32_t i = 0; i < n; ++i) {
    const uint32_t j = static_cast<uint32_t>(random.Below(i + 1));
    order[i] = order[j];
    order[j] = i;
  }
  return order;
}

}  // namespace memory3
