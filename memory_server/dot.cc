#include "memory_server/dot.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

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

namespace {

MEMORY3_CLONES void DotRowsInt8Portable(const float* query, const int8_t* codes, int64_t rows,
                                        int64_t n, float* scores) {
  for (int64_t r = 0; r < rows; ++r) scores[r] = DotLanes(query, codes + r * n, n);
}

#ifdef __x86_64__
// The compiler widens bytes in too many steps (the masked forms only avoid a warning of GCC 12's).
// Four rows at a time hide the additions' latency; each row's sums are those of DotLanes.
__attribute__((target("avx512f"))) void DotRowsInt8Avx512(const float* query, const int8_t* codes,
                                                          int64_t rows, int64_t n, float* scores) {
  const int64_t whole = n / kLanes * kLanes;
  int64_t r = 0;
  for (; r + 4 <= rows && whole == n; r += 4) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += kLanes) {
      const __m512 q = _mm512_loadu_ps(query + i);
      for (int k = 0; k < 4; ++k) {
        const auto* at = reinterpret_cast<const __m128i*>(codes + (r + k) * n + i);
        const __m512 c = _mm512_maskz_cvtepi32_ps(
            0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(at)));
        sums[k] = _mm512_add_ps(sums[k], _mm512_mul_ps(q, c));
      }
    }
    for (int k = 0; k < 4; ++k) {
      float lanes[kLanes];
      _mm512_storeu_ps(lanes, sums[k]);
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      }
      scores[r + k] = lanes[0];
    }
  }
  for (; r < rows; ++r) scores[r] = DotLanes(query, codes + r * n, n);
}
#endif

using DotRowsInt8Function = void (*)(const float*, const int8_t*, int64_t, int64_t, float*);

DotRowsInt8Function PickDotRowsInt8() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return DotRowsInt8Avx512;
#endif
  return DotRowsInt8Portable;
}

}  // namespace

void DotRowsInt8(const float* query, const int8_t* codes, int64_t rows, int64_t n, float* scores) {
  static const DotRowsInt8Function kPicked = PickDotRowsInt8();
  kPicked(query, codes, rows, n, scores);
}

}  // namespace memory3
