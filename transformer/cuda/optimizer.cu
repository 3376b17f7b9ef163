#include "transformer/cuda/common.cuh"
#include "transformer/cuda/optimizer.h"

namespace memory3 {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void SumOfSquaresKernel(double* sums, const float* x,
                                                               int64_t n) {
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += int64_t{kSumPieces} * kThreads) {
    sum += static_cast<double>(x[i]) * x[i];
  }
  sum = BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ __launch_bounds__(kThreads) void AdamWKernel(float* parameter, __nv_bfloat16* shadow,
                                                        const float* gradient, float* m, float* v,
                                                        int64_t n, AdamWFactors f) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const float g = gradient[i] * f.gradient_scale;
  const float first = f.beta1 * m[i] + (1 - f.beta1) * g;
  const float second = f.beta2 * v[i] + (1 - f.beta2) * (g * g);
  const float p =
      parameter[i] * f.decay - f.step_size * first / (sqrtf(second) * f.root_scale + f.epsilon);
  m[i] = first;
  v[i] = second;
  parameter[i] = p;
  if (shadow != nullptr) shadow[i] = __float2bfloat16_rn(p);
}

}  // namespace

cudaError_t LaunchSumOfSquares(double* sums, const float* x, int64_t n, cudaStream_t stream) {
  SumOfSquaresKernel<<<kSumPieces, kThreads, 0, stream>>>(sums, x, n);
  return cudaGetLastError();
}

cudaError_t LaunchAdamW(float* parameter, void* shadow, const float* gradient, float* m, float* v,
                        int64_t n, const AdamWFactors& factors, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  AdamWKernel<<<CeilDivide(n, kThreads), kThreads, 0, stream>>>(
      parameter, static_cast<__nv_bfloat16*>(shadow), gradient, m, v, n, factors);
  return cudaGetLastError();
}

}  // namespace memory3
