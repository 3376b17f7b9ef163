#include "memory_server/dot.h"

// Chosen at run time by the CPU. Not under sanitizers: the resolver runs before their start-up.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
#define MEMORY3_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEMORY3_CLONES
#endif

namespace memory3 {
namespace {

constexpr int kLanes = 16;

template <typename T>
[[gnu::always_inline]] inline float DotLanes(const float* a, const T* b, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * static_cast<float>(b[i + j]);
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += a[i + j] * static_cast<float>(b[i + j]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

}  // namespace

MEMORY3_CLONES float Dot(const float* a, const float* b, int64_t n) { return DotLanes(a, b, n); }

MEMORY3_CLONES float DotInt8(const float* a, const int8_t* b, int64_t n) {
  return DotLanes(a, b, n);
}

MEMORY3_CLONES void DotRows(const float* query, const float* vectors, int64_t rows, int64_t n,
                            float* scores) {
  for (int64_t r = 0; r < rows; ++r) scores[r] = DotLanes(query, vectors + r * n, n);
}

MEMORY3_CLONES void DotRowsInt8(const float* query, const int8_t* codes, int64_t rows, int64_t n,
                                float* scores) {
  for (int64_t r = 0; r < rows; ++r) scores[r] = DotLanes(query, codes + r * n, n);
}

}  // namespace memory3
