#include "transformer/cuda/common.cuh"
#include "transformer/cuda/rope.h"

namespace memory3 {
namespace {

constexpr int kThreads = 256;
// Pairs (i, i + head_dim/2) that one block rotates.
constexpr int kPairsPerBlock = 1024;

__global__ __launch_bounds__(kThreads) void RopeKernel(Tensor x, const int32_t* positions,
                                                       const float* inv_freq, int heads,
                                                       int head_dim, float sign) {
  __shared__ float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2];
  const int64_t row = blockIdx.x;
  const int half = head_dim / 2;
  const float position = static_cast<float>(positions[row]);
  for (int i = threadIdx.x; i < half; i += kThreads) {
    sincosf(position * inv_freq[i], &sine[i], &cosine[i]);
  }
  __syncthreads();
  const int begin = blockIdx.y * kPairsPerBlock;
  const int end = min(begin + kPairsPerBlock, heads * half);
  for (int pair = begin + threadIdx.x; pair < end; pair += kThreads) {
    const int i = pair % half;
    const int64_t at = row * x.stride + pair / half * head_dim + i;
    const float a = LoadOne(x.data, x.dtype, at), b = LoadOne(x.data, x.dtype, at + half);
    const float c = cosine[i], s = sine[i] * sign;
    StoreOne(x.data, x.dtype, at, a * c - b * s);
    StoreOne(x.data, x.dtype, at + half, b * c + a * s);
  }
}

__global__ __launch_bounds__(kThreads) void StoreKvKernel(void* const* destination,
                                                          SourceAtLayer to, Tensor k, Tensor v,
                                                          int kv_heads, int head_dim) {
  const int64_t row = blockIdx.x;
  void* base = destination[row];
  if (base == nullptr) return;
  const int c = blockIdx.y * kThreads + threadIdx.x;
  if (c >= kv_heads * head_dim) return;
  const int64_t at = to.layer_offset + c / head_dim * to.head_stride + c % head_dim;
  StoreOne(base, to.dtype, at, LoadOne(k.data, k.dtype, row * k.stride + c));
  StoreOne(base, to.dtype, at + to.value_offset, LoadOne(v.data, v.dtype, row * v.stride + c));
}

}  // namespace

cudaError_t LaunchRope(Tensor x, const int32_t* positions, const float* inv_freq, int heads,
                       int head_dim, bool inverse, cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  const dim3 grid(x.rows, CeilDivide(int64_t{heads} * head_dim / 2, kPairsPerBlock));
  RopeKernel<<<grid, kThreads, 0, stream>>>(x, positions, inv_freq, heads, head_dim,
                                            inverse ? -1.0f : 1.0f);
  return cudaGetLastError();
}

cudaError_t LaunchStoreKv(void* const* destination, SourceAtLayer to, Tensor k, Tensor v,
                          int kv_heads, int head_dim, cudaStream_t stream) {
  if (k.rows == 0) return cudaSuccess;
  const dim3 grid(k.rows, CeilDivide(int64_t{kv_heads} * head_dim, kThreads));
  StoreKvKernel<<<grid, kThreads, 0, stream>>>(destination, to, k, v, kv_heads, head_dim);
  return cudaGetLastError();
}

}  // namespace memory3
