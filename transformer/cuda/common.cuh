// Loads, stores and reductions that the kernels share. Reductions sum in one fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "transformer/tensor.h"

namespace memory3 {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float MinusInfinity() { return __int_as_float(0xff800000); }

// ---- one element of f32 or bf16 memory ----

__device__ __forceinline__ float LoadOne(const void* data, DType type, int64_t i) {
  return type == DType::kF32 ? static_cast<const float*>(data)[i]
                             : __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

__device__ __forceinline__ void StoreOne(void* data, DType type, int64_t i, float value) {
  if (type == DType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  }
}

// ---- kWidth elements, 1 or 4; for 4, i and the memory are aligned to four elements ----

template <int kWidth>
struct Floats {
  float v[kWidth];
};

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ float LowBf16(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float HighBf16(uint32_t bits) {
  return __uint_as_float(bits & 0xffff0000u);
}

template <int kWidth>
__device__ __forceinline__ Floats<kWidth> LoadFloats(const void* data, DType type, int64_t i) {
  Floats<kWidth> x;
  if constexpr (kWidth == 4) {
    if (type == DType::kF32) {
      const float4 f = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      x.v[0] = f.x, x.v[1] = f.y, x.v[2] = f.z, x.v[3] = f.w;
    } else {
      const uint2 b = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(data) + i);
      x.v[0] = LowBf16(b.x), x.v[1] = HighBf16(b.x);
      x.v[2] = LowBf16(b.y), x.v[3] = HighBf16(b.y);
    }
  } else {
    x.v[0] = LoadOne(data, type, i);
  }
  return x;
}

template <int kWidth>
__device__ __forceinline__ void StoreFloats(void* data, DType type, int64_t i, Floats<kWidth> x) {
  if constexpr (kWidth == 4) {
    if (type == DType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(data) + i) =
          make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    } else {
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(data) + i) =
          make_uint2(PackBf16(x.v[0], x.v[1]), PackBf16(x.v[2], x.v[3]));
    }
  } else {
    StoreOne(data, type, i, x.v[0]);
  }
}

// ---- eight elements of a key, value or query: `valid` of them, zeros after; `aligned`: valid is 8
// and the memory 16-byte aligned ----

__device__ __forceinline__ void LoadEight(const void* data, DType type, int64_t i, int valid,
                                          bool aligned, float (&x)[8]) {
  if (aligned) {
    if (type == DType::kF32) {
      const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      const float4 a = p[0], b = p[1];
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
      x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
      const uint4 b = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(data) + i);
      x[0] = LowBf16(b.x), x[1] = HighBf16(b.x), x[2] = LowBf16(b.y), x[3] = HighBf16(b.y);
      x[4] = LowBf16(b.z), x[5] = HighBf16(b.z), x[6] = LowBf16(b.w), x[7] = HighBf16(b.w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = j < valid ? LoadOne(data, type, i + j) : 0.0f;
  }
}

// The same as eight bf16.
__device__ __forceinline__ uint4 LoadEightBf16(const void* data, DType type, int64_t i, int valid,
                                               bool aligned) {
  if (aligned && type == DType::kBF16) {
    return *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(data) + i);
  }
  float x[8];
  LoadEight(data, type, i, valid, aligned, x);
  return make_uint4(PackBf16(x[0], x[1]), PackBf16(x[2], x[3]), PackBf16(x[4], x[5]),
                    PackBf16(x[6], x[7]));
}

// ---- reductions ----

template <typename T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) x += __shfl_xor_sync(kAllLanes, x, width);
  return x;
}
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, width));
  }
  return x;
}

// Over the block's threads, to all of them. Every thread of the block must call.
template <int kThreads, typename T>
__device__ __forceinline__ T BlockSum(T x) {
  __shared__ T sums[kThreads / 32];
  x = WarpSum(x);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

template <int kThreads>
__device__ __forceinline__ float BlockMax(float x) {
  __shared__ float best[kThreads / 32];
  x = WarpMax(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = x;
  __syncthreads();
  float most = best[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) most = fmaxf(most, best[i]);
  return most;
}

// ---- host side ----

// 4 where every tensor can be read four elements at a time, else 1.
inline int VectorWidth(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    const uintptr_t alignment = t.dtype == DType::kF32 ? 16 : 8;
    if (t.cols % 4 != 0 || t.stride % 4 != 0 ||
        reinterpret_cast<uintptr_t>(t.data) % alignment != 0)
      return 1;
  }
  return 4;
}

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace memory3
