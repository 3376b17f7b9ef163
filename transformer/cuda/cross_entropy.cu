#include "transformer/cuda/common.cuh"
#include "transformer/cuda/cross_entropy.h"

namespace memory3 {
namespace {

constexpr int kThreads = 1024;

// One block a row: the row is read for its largest logit and the sum of exponentials at once, then
// once more for the gradient.
template <int kWidth>
__global__ __launch_bounds__(kThreads) void CrossEntropyKernel(float* losses, Tensor logits,
                                                               const int32_t* targets,
                                                               float loss_scale) {
  const int64_t row = blockIdx.x;
  float* x = static_cast<float*>(logits.data) + row * logits.stride;
  const int64_t n = logits.cols;
  const int32_t target = targets[row];
  if (target < 0) {
    for (int64_t c = threadIdx.x; c < n; c += kThreads) x[c] = 0;
    if (threadIdx.x == 0) losses[row] = 0;
    return;
  }
  float most = MinusInfinity(), sum = 0;
  for (int64_t c = threadIdx.x * kWidth; c < n; c += kThreads * kWidth) {
    const Floats<kWidth> v = LoadFloats<kWidth>(x, DType::kF32, c);
    float here = v.v[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) here = fmaxf(here, v.v[i]);
    if (here > most) {
      sum *= expf(most - here);
      most = here;
    }
    if (most == MinusInfinity()) continue;  // nothing but minus infinities yet: they add nothing
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += expf(v.v[i] - most);
  }
  const float highest = BlockMax<kThreads>(most);
  // A thread that has no column holds minus infinity and zero.
  sum = BlockSum<kThreads>(most == MinusInfinity() ? 0.0f : sum * expf(most - highest));
  const float wanted = x[target] - highest;
  const float factor = loss_scale / sum;
  __syncthreads();  // every thread has read x[target]
  for (int64_t c = threadIdx.x * kWidth; c < n; c += kThreads * kWidth) {
    Floats<kWidth> v = LoadFloats<kWidth>(x, DType::kF32, c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      v.v[i] = expf(v.v[i] - highest) * factor - (c + i == target ? loss_scale : 0.0f);
    }
    StoreFloats<kWidth>(x, DType::kF32, c, v);
  }
  if (threadIdx.x == 0) losses[row] = logf(sum) - wanted;
}

}  // namespace

cudaError_t LaunchCrossEntropy(float* losses, Tensor logits, const int32_t* targets,
                               float loss_scale, cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  if (VectorWidth({logits}) == 4) {
    CrossEntropyKernel<4>
        <<<logits.rows, kThreads, 0, stream>>>(losses, logits, targets, loss_scale);
  } else {
    CrossEntropyKernel<1>
        <<<logits.rows, kThreads, 0, stream>>>(losses, logits, targets, loss_scale);
  }
  return cudaGetLastError();
}

}  // namespace memory3
