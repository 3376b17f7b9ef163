// The kernels for AVX2 with FMA. Compiled for them; entered only behind the check for them.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

// Each builds on the one before.
// clang-format off
#include "transformer/cpu/simd.inc"
#include "transformer/cpu/tiles.inc"
#include "transformer/cpu/simd_kernels.inc"
// clang-format on

// Signed times signed through vpmaddubsw: |x| times w with x's sign; two products are at most
// 2 * 127 * 127, which int16 holds.
void PanelInt8(const uint8_t* x, int64_t x_stride, const float* x_scale, const int8_t* panel,
               const float* w_scale, const int32_t*, int64_t k, int64_t rows, float* y,
               int64_t y_stride, PanelMode mode, void*) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* q = x + r * x_stride;
    __m256i sum[8];
    for (auto& s : sum) s = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += 4) {
      int32_t quad;
      memcpy(&quad, q + i, sizeof quad);
      const __m256i a = _mm256_set1_epi32(quad);
      const __m256i magnitude = _mm256_abs_epi8(a);
      const __m256i* w = reinterpret_cast<const __m256i*>(panel + i * kPanel);
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) {
        const __m256i product =
            _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(_mm256_loadu_si256(w + v), a));
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(product, ones));
      }
    }
    float* to = y + r * y_stride;
    for (int v = 0; v < 8; ++v) {
      const Vec value =
          Mul(_mm256_cvtepi32_ps(sum[v]), Mul(Set(x_scale[r]), Load(w_scale + v * kLanes)));
      Vec old = mode == PanelMode::kStore ? Set(0.0f) : Load(to + v * kLanes);
      Store(to + v * kLanes, mode == PanelMode::kStore ? value : Add(old, value));
    }
  }
}

}  // namespace

const CpuKernels& Avx2Kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k = CommonKernels();
    k.panel_int8 = PanelInt8;
    k.quantize_row = QuantizeRow<0>;
    return k;
  }();
  return kernels;
}

}  // namespace memory3
