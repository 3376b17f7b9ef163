// Products of a few rows with a weight, at the speed of memory, and the int8 path's helpers.
// Launches return the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/tensor.h"

namespace memory3 {

// Most rows LaunchRowsProduct takes.
inline constexpr int kMaxProductRows = 16;

// What the row product multiplies: bf16, or int8 whose sums are exact and then scaled.
struct RowsProduct {
  Tensor y;                 // [rows, out] f32 or bf16
  const void* x = nullptr;  // [rows, in] bf16 or int8, x_stride bytes from row to row
  int64_t x_stride = 0;
  const void* w = nullptr;  // [out, in] of the same type, w_stride bytes from row to row
  int64_t w_stride = 0;
  int64_t row_bytes = 0;  // of `in` elements; a multiple of 16, as are strides and addresses
  const float* x_scale = nullptr;  // [rows], int8 only
  const float* w_scale = nullptr;  // [out], int8 only
  bool accumulate = false;
};
cudaError_t LaunchRowsProduct(const RowsProduct& product, cudaStream_t stream);

// codes[r] = round(x[r] / scales[r]), scales[r] = max|x[r]| / 127; zero from x.cols up to `stride`.
cudaError_t LaunchQuantizeRows(int8_t* codes, int64_t stride, float* scales, Tensor x,
                               cudaStream_t stream);
// y (+)= sums * x_scale * w_scale; sums: [y.rows, y.cols] dense.
cudaError_t LaunchScaleSums(Tensor y, const int32_t* sums, const float* x_scale,
                            const float* w_scale, bool accumulate, cudaStream_t stream);

}  // namespace memory3
