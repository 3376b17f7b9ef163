// Products of int8 weights with VNNI. Compiled for AVX-512 with it; entered only behind the check.
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

// Not the intrinsic: around it GCC 12 copies every sum to memory and back, which halves the rate.
inline void DotAdd(__m512i& sum, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
}

// vpdpbusd multiplies unsigned by signed bytes: activations are stored 128 too high, and
// 128 * Σ w is taken off the exact sum.
struct TileInt8 {
  const uint8_t* x;
  int64_t x_stride;
  const float* x_scale;
  const int8_t* panel;
  const float* w_scale;
  const int32_t* w_sum;
  float* y;
  int64_t y_stride;
  PanelMode mode;
  int32_t* between;  // sums between chunks, [rows, kPanel]

  template <int kRows, int kPrefetch>
  void Run(const Part& part) const {
    const uint8_t* a = x + part.row * x_stride + 4 * part.begin;
    const int8_t* p = panel + 4 * (part.begin * kPanel + part.column);
    const char* prefetch = part.prefetch;
    int32_t* rest = between + part.row * kPanel + part.column;
    __m512i sum[kRows][kTileVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) {
        sum[r][v] = part.first ? _mm512_setzero_si512()
                               : _mm512_loadu_si512(rest + r * kPanel + v * kLanes);
      }
    }
    for (int64_t i = 0; i < 4 * part.steps; i += 4, p += 4 * kPanel) {
      PrefetchStep<kPrefetch>(prefetch, part.prefetch_step);
      __m512i w[kTileVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) w[v] = _mm512_loadu_si512(p + 64 * v);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t quad;
        memcpy(&quad, a + r * x_stride + i, sizeof quad);
        const __m512i b = _mm512_set1_epi32(quad);
#pragma GCC unroll 16
        for (int v = 0; v < kTileVecs; ++v) DotAdd(sum[r][v], b, w[v]);
      }
    }
    // Unrolled, or the sums would live in memory.
#pragma GCC unroll 16
    for (int v = 0; v < kTileVecs; ++v) {
      const int c = part.column + v * kLanes;
      const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(w_sum + c), 7);
      const Vec scale = Load(w_scale + c);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        if (!part.last) {
          _mm512_storeu_si512(rest + r * kPanel + v * kLanes, sum[r][v]);
          continue;
        }
        const Vec value = Mul(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][v], shift)),
                              Mul(Set(x_scale[part.row + r]), scale));
        float* to = y + (part.row + r) * y_stride + c;
        Store(to, mode == PanelMode::kStore ? value : Add(Load(to), value));
      }
    }
  }
};

void PanelInt8(const uint8_t* x, int64_t x_stride, const float* x_scale, const int8_t* panel,
               const float* w_scale, const int32_t* w_sum, int64_t k, int64_t rows, float* y,
               int64_t y_stride, PanelMode mode, void* sums) {
  ForTiles(TileInt8{x, x_stride, x_scale, panel, w_scale, w_sum, y, y_stride, mode,
                    static_cast<int32_t*>(sums)},
           panel, rows, k / 4, sums != nullptr);
}

float QuantizeRow(uint8_t* to, const float* x, int64_t n, int64_t n_padded) {
  Vec m = Set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) m = Max(m, _mm512_abs_ps(Load(x + i)));
  if (i < n) m = Max(m, _mm512_abs_ps(LoadFirst(x + i, n - i)));
  const float largest = Largest(m);
  const Vec factor = Set(largest > 0 ? 127.0f / largest : 0.0f);
  const __m512i offset = _mm512_set1_epi32(128);
  const auto quantize = [&](Vec v) {
    const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(Mul(v, factor)), offset);
    return _mm512_cvtepi32_epi8(q);
  };
  for (i = 0; i + kLanes <= n; i += kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), quantize(Load(x + i)));
  }
  if (i < n) {
    _mm_mask_storeu_epi8(to + i, First(n - i), quantize(LoadFirst(x + i, n - i)));
  }
  for (i = n; i < n_padded; ++i) to[i] = 128;
  return largest / 127.0f;
}

}  // namespace

const CpuKernels& Avx512VnniKernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k = Avx512Kernels();
    k.panel_int8 = PanelInt8;
    k.quantize_row = QuantizeRow;
    return k;
  }();
  return kernels;
}

}  // namespace memory3
