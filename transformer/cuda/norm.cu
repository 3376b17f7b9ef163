#include <algorithm>

#include "transformer/cuda/common.cuh"
#include "transformer/cuda/norm.h"

namespace memory3 {
namespace {

constexpr int kThreads = 512;
// Rows that one thread of the gain's gradient adds up.
constexpr int kRowsPerPiece = 64;

// One block a row.
template <int kWidth>
__global__ __launch_bounds__(kThreads) void RmsNormKernel(Tensor y, Tensor x, const float* gain,
                                                          float eps, float* inv_rms) {
  const int64_t row = blockIdx.x;
  const int64_t from = row * x.stride, to = row * y.stride;
  float sum = 0;
  for (int64_t c = threadIdx.x * kWidth; c < x.cols; c += kThreads * kWidth) {
    const Floats<kWidth> v = LoadFloats<kWidth>(x.data, x.dtype, from + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += v.v[i] * v.v[i];
  }
  sum = BlockSum<kThreads>(sum);
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(x.cols) + eps);
  for (int64_t c = threadIdx.x * kWidth; c < x.cols; c += kThreads * kWidth) {
    Floats<kWidth> v = LoadFloats<kWidth>(x.data, x.dtype, from + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v.v[i] = v.v[i] * inverse * gain[c + i];
    StoreFloats<kWidth>(y.data, y.dtype, to + c, v);
  }
  if (inv_rms != nullptr && threadIdx.x == 0) inv_rms[row] = inverse;
}

template <int kWidth>
__global__ __launch_bounds__(kThreads) void InputGradientKernel(Tensor dx, Tensor dy, Tensor x,
                                                                const float* gain,
                                                                const float* inv_rms) {
  const int64_t row = blockIdx.x;
  float sum = 0;
  for (int64_t c = threadIdx.x * kWidth; c < x.cols; c += kThreads * kWidth) {
    const Floats<kWidth> d = LoadFloats<kWidth>(dy.data, dy.dtype, row * dy.stride + c);
    const Floats<kWidth> v = LoadFloats<kWidth>(x.data, x.dtype, row * x.stride + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += d.v[i] * gain[c + i] * v.v[i];
  }
  sum = BlockSum<kThreads>(sum);
  const float inverse = inv_rms[row];
  const float pull = sum / static_cast<float>(x.cols) * inverse * inverse;
  for (int64_t c = threadIdx.x * kWidth; c < x.cols; c += kThreads * kWidth) {
    const Floats<kWidth> d = LoadFloats<kWidth>(dy.data, dy.dtype, row * dy.stride + c);
    const Floats<kWidth> v = LoadFloats<kWidth>(x.data, x.dtype, row * x.stride + c);
    Floats<kWidth> g = LoadFloats<kWidth>(dx.data, dx.dtype, row * dx.stride + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g.v[i] += inverse * (d.v[i] * gain[c + i] - v.v[i] * pull);
    }
    StoreFloats<kWidth>(dx.data, dx.dtype, row * dx.stride + c, g);
  }
}

// pieces[piece][column] = Σ over the piece's rows, in order. A thread has a column.
__global__ void GainPiecesKernel(float* pieces, Tensor dy, Tensor x, const float* inv_rms) {
  const int64_t c = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (c >= x.cols) return;
  const int64_t begin = int64_t{blockIdx.x} * kRowsPerPiece;
  const int64_t end = min(begin + kRowsPerPiece, x.rows);
  float sum = 0;
  for (int64_t r = begin; r < end; ++r) {
    sum += LoadOne(dy.data, dy.dtype, r * dy.stride + c) *
           LoadOne(x.data, x.dtype, r * x.stride + c) * inv_rms[r];
  }
  pieces[blockIdx.x * x.cols + c] = sum;
}

__global__ void GainKernel(float* dgain, const float* pieces, int64_t count, int64_t cols) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += pieces[i * cols + c];
  dgain[c] += sum;
}

}  // namespace

cudaError_t LaunchRmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms,
                          cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  if (VectorWidth({y, x}) == 4) {
    RmsNormKernel<4><<<x.rows, kThreads, 0, stream>>>(y, x, gain, eps, inv_rms);
  } else {
    RmsNormKernel<1><<<x.rows, kThreads, 0, stream>>>(y, x, gain, eps, inv_rms);
  }
  return cudaGetLastError();
}

int64_t RmsNormBackwardScratch(int64_t rows, int64_t cols) {
  return CeilDivide(rows, kRowsPerPiece) * cols;
}

cudaError_t LaunchRmsNormBackward(Tensor dx, float* dgain, Tensor dy, Tensor x, const float* gain,
                                  const float* inv_rms, float* scratch, cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  constexpr int kColumns = 256;
  const unsigned pieces = CeilDivide(x.rows, kRowsPerPiece);
  const unsigned columns = CeilDivide(x.cols, kColumns);
  // The gain first, as the CPU does: dx may stand where dy does.
  GainPiecesKernel<<<dim3(pieces, columns), kColumns, 0, stream>>>(scratch, dy, x, inv_rms);
  GainKernel<<<columns, kColumns, 0, stream>>>(dgain, scratch, pieces, x.cols);
  if (VectorWidth({dx, dy, x}) == 4) {
    InputGradientKernel<4><<<x.rows, kThreads, 0, stream>>>(dx, dy, x, gain, inv_rms);
  } else {
    InputGradientKernel<1><<<x.rows, kThreads, 0, stream>>>(dx, dy, x, gain, inv_rms);
  }
  return cudaGetLastError();
}

}  // namespace memory3
