// The kernels for a CPU without AVX2, in plain C++.
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

void PanelInt8(const uint8_t* x, int64_t x_stride, const float* x_scale, const int8_t* panel,
               const float* w_scale, const int32_t*, int64_t k, int64_t rows, float* y,
               int64_t y_stride, PanelMode mode, void*) {
  for (int64_t r = 0; r < rows; ++r) {
    int32_t sum[kPanel] = {};
    const int8_t* q = reinterpret_cast<const int8_t*>(x + r * x_stride);
    for (int64_t i = 0; i < k; i += 4) {
      const int8_t* w = panel + i * kPanel;
      for (int c = 0; c < kPanel; ++c) {
        for (int j = 0; j < 4; ++j) sum[c] += q[i + j] * w[c * 4 + j];
      }
    }
    float* to = y + r * y_stride;
    for (int c = 0; c < kPanel; ++c) {
      const float value = static_cast<float>(sum[c]) * (x_scale[r] * w_scale[c]);
      to[c] = mode == PanelMode::kStore ? value : to[c] + value;
    }
  }
}

}  // namespace

const CpuKernels& GenericKernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k = CommonKernels();
    k.panel_int8 = PanelInt8;
    k.quantize_row = QuantizeRow<0>;
    return k;
  }();
  return kernels;
}

}  // namespace memory3
