// Products of bf16 weights with vdpbf16ps. Compiled for AVX-512 with BF16; entered only behind the
// check.
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
// clang-format on

struct TileBf16 {
  const char* x;  // bf16
  int64_t x_stride;
  const uint16_t* panel;
  Sums sums;

  template <int kRows, int kPrefetch>
  void Run(const Part& part) const {
    const char* a = x + part.row * x_stride + 4 * part.begin;
    const uint16_t* p = panel + 2 * (part.begin * kPanel + part.column);
    const char* prefetch = part.prefetch;
    Vec sum[kRows][kTileVecs];
    sums.Start<kRows>(sum, part);
    for (int64_t i = 0; i < 4 * part.steps; i += 4, p += 2 * kPanel) {
      PrefetchStep<kPrefetch>(prefetch, part.prefetch_step);
      __m512i w[kTileVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) w[v] = _mm512_loadu_si512(p + 32 * v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, a + r * x_stride + i, sizeof pair);
        const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
        for (int v = 0; v < kTileVecs; ++v) {
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], b, (__m512bh)w[v]);
        }
      }
    }
    sums.Finish<kRows>(sum, part);
  }
};

void PanelBf16(const void* x, int64_t x_stride, const uint16_t* panel, int64_t k, int64_t rows,
               float* y, int64_t y_stride, PanelMode mode, void* sums) {
  ForTiles(TileBf16{static_cast<const char*>(x),
                    x_stride,
                    panel,
                    {y, y_stride, mode, static_cast<float*>(sums)}},
           panel, rows, k / 2, sums != nullptr);
}

void RoundBf16(void* to, const float* x, int64_t n, int64_t n_padded) {
  uint16_t* h = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(h + i),
                        (__m256i)_mm512_cvtneps_pbh(Load(x + i)));
  }
  if (i < n) {
    _mm256_mask_storeu_epi16(h + i, First(n - i),
                             (__m256i)_mm512_cvtneps_pbh(LoadFirst(x + i, n - i)));
  }
  for (i = n; i < n_padded; ++i) h[i] = 0;
}

}  // namespace

const CpuKernels& Avx512Bf16Kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k = Avx512VnniKernels();
    k.panel_bf16 = PanelBf16;
    k.bf16_activation_bytes = 2;
    k.round_bf16 = RoundBf16;
    return k;
  }();
  return kernels;
}

}  // namespace memory3
