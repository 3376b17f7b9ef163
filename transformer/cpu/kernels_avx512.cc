// The kernels for AVX-512 (F, BW, DQ, VL). Compiled for it; entered only behind the check for it.
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

// Sixteen keys at a time: their 16 x 16 squares are turned in registers. Fewer at the end, and
// memories of eight tokens, take the same way with lanes masked out.
void PackColumns(float* panel, int first, const float* keys, int64_t stride, int tokens,
                 int head_dim) {
  for (int t = 0; t < tokens; t += 16) {
    const int rows = tokens - t;
    const __mmask16 there = rows >= 16 ? static_cast<__mmask16>(0xffff) : First(rows);
    for (int d = 0; d < head_dim; d += 16) {
      const int64_t n = head_dim - d;
      const __mmask16 columns = n >= 16 ? static_cast<__mmask16>(0xffff) : First(n);
      __m512 r[16], s[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = i < rows ? _mm512_maskz_loadu_ps(columns, keys + (t + i) * stride + d) : Set(0.0f);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        const auto lo = [](__m512 a, __m512 b) {
          return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        };
        const auto hi = [](__m512 a, __m512 b) {
          return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        };
        r[i] = lo(s[i], s[i + 2]);
        r[i + 1] = hi(s[i], s[i + 2]);
        r[i + 2] = lo(s[i + 1], s[i + 3]);
        r[i + 3] = hi(s[i + 1], s[i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd);
      }
      float* to = panel + d * kPanel + first + t;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i < n) _mm512_mask_storeu_ps(to + i * kPanel, there, r[i]);
      }
    }
  }
}

}  // namespace

// Without VNNI the products of bytes stay AVX2's.
const CpuKernels& Avx512Kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k = CommonKernels();
    k.panel_int8 = Avx2Kernels().panel_int8;
    k.quantize_row = Avx2Kernels().quantize_row;
    k.pack_columns = PackColumns;
    return k;
  }();
  return kernels;
}

}  // namespace memory3
