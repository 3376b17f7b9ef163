#include "transformer/cuda/common.cuh"
#include "transformer/cuda/vq_decode_kernel.h"

namespace memory3 {
namespace {

constexpr int kThreads = 256;
// Vectors of one block, and those that a thread turns back at once.
constexpr int kVectors = 32;
constexpr int kAtOnce = 8;
static_assert(kVectors <= kThreads && kVectors % kAtOnce == 0);
constexpr int kBooks = 8;  // fine
constexpr int kCoarseBooks = 2;

// Bits [at, at + count) of a code, lowest bit of the first byte first; count <= 16.
__device__ __forceinline__ int Bits(const uint8_t* code, int at, int count) {
  uint32_t bits = 0;
  const int first = at / 8, last = (at + count - 1) / 8;
  for (int i = first; i <= last; ++i) bits |= static_cast<uint32_t>(code[i]) << (8 * (i - first));
  return static_cast<int>(bits >> (at % 8) & ((1u << count) - 1));
}

// Shared memory: the vectors as they are before the rotation is undone, [d, kVectors], then the
// codes; besides, where each vector goes.
__global__ __launch_bounds__(kThreads) void VqDecodeKernel(VectorRuns vectors, int64_t all, int d,
                                                           const uint8_t* codes, VqTables t) {
  extern __shared__ __align__(16) float rotated[];
  __shared__ int64_t goes_to[kVectors];
  auto* code = reinterpret_cast<uint8_t*>(rotated + d * kVectors);
  const int64_t first = int64_t{blockIdx.x} * kVectors;
  const int count = static_cast<int>(min(int64_t{kVectors}, all - first));
  if (static_cast<int>(threadIdx.x) < count) {
    const int64_t i = first + threadIdx.x;
    goes_to[threadIdx.x] = i / vectors.run * vectors.run_stride + i % vectors.run * d;
  }
  for (int i = threadIdx.x; i < count * t.code_bytes; i += kThreads) {
    code[i] = codes[first * t.code_bytes + i];
  }
  __syncthreads();

  const int half = d / kCoarseBooks, part = d / kBooks;
  for (int i = threadIdx.x; i < kVectors * d; i += kThreads) {
    const int v = i / d, c = i % d;
    float x = 0;
    if (v < count) {
      const uint8_t* mine = code + v * t.code_bytes;
      const int64_t coarse = (int64_t{c / half} << t.coarse_bits) +
                             Bits(mine, c / half * t.coarse_bits, t.coarse_bits);
      const int64_t fine = (int64_t{c / part} << t.fine_bits) +
                           Bits(mine + t.coarse_code_bytes, c / part * t.fine_bits, t.fine_bits);
      x = t.coarse[coarse * half + c % half] + t.fine[fine * part + c % part];
    }
    rotated[c * kVectors + v] = x;
  }
  __syncthreads();

  // vector = rotationᵀ rotated: the rotation is orthonormal.
  for (int i = threadIdx.x; i < d * (kVectors / kAtOnce); i += kThreads) {
    const int c = i % d, v = i / d * kAtOnce;
    float sum[kAtOnce] = {};
    for (int k = 0; k < d; ++k) {
      const float r = t.rotation[k * d + c];
      const float* y = rotated + k * kVectors + v;
      const float4 low = *reinterpret_cast<const float4*>(y);
      const float4 high = *reinterpret_cast<const float4*>(y + 4);
      sum[0] += r * low.x;
      sum[1] += r * low.y;
      sum[2] += r * low.z;
      sum[3] += r * low.w;
      sum[4] += r * high.x;
      sum[5] += r * high.y;
      sum[6] += r * high.z;
      sum[7] += r * high.w;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (v + j < count) {
        StoreOne(vectors.data, vectors.dtype, goes_to[v + j] + c, sum[j]);
      }
    }
  }
}

}  // namespace

cudaError_t LaunchVqDecode(const VectorRuns& vectors, int64_t count, int head_dim,
                           const uint8_t* codes, const VqTables& tables, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int bytes =
      static_cast<int>(sizeof(float)) * kVectors * head_dim + kVectors * tables.code_bytes;
  const cudaError_t error =
      cudaFuncSetAttribute(VqDecodeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  VqDecodeKernel<<<CeilDivide(count, kVectors), kThreads, bytes, stream>>>(vectors, count, head_dim,
                                                                           codes, tables);
  return cudaGetLastError();
}

}  // namespace memory3
