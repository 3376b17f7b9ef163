#include "transformer/cuda/common.cuh"
#include "transformer/cuda/pointwise.h"

namespace memory3 {
namespace {

constexpr int kThreads = 256;
constexpr int kArgMaxThreads = 1024;

// Each thread has kWidth columns of one row: grid (rows, columns).
dim3 Grid(int64_t rows, int64_t cols, int width) {
  return dim3(rows, CeilDivide(cols, int64_t{kThreads} * width));
}

template <int kWidth>
__device__ __forceinline__ int64_t Column() {
  return (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kWidth;
}

// y[r] = x[rows[r]], or x[r] where rows is null.
template <int kWidth>
__global__ __launch_bounds__(kThreads) void CopyRowsKernel(Tensor y, Tensor x,
                                                           const int32_t* rows) {
  const int64_t r = blockIdx.x, c = Column<kWidth>();
  if (c >= y.cols) return;
  const int64_t from = rows == nullptr ? r : rows[r];
  StoreFloats<kWidth>(y.data, y.dtype, r * y.stride + c,
                      LoadFloats<kWidth>(x.data, x.dtype, from * x.stride + c));
}

template <int kWidth>
__global__ __launch_bounds__(kThreads) void ScatterRowsKernel(Tensor x, Tensor y,
                                                              const int32_t* rows) {
  const int64_t r = blockIdx.x, c = Column<kWidth>();
  if (c >= y.cols) return;
  const int64_t to = rows[r] * x.stride + c;
  Floats<kWidth> sum = LoadFloats<kWidth>(x.data, x.dtype, to);
  const Floats<kWidth> add = LoadFloats<kWidth>(y.data, y.dtype, r * y.stride + c);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.v[i] += add.v[i];
  StoreFloats<kWidth>(x.data, x.dtype, to, sum);
}

template <int kWidth>
__global__ __launch_bounds__(kThreads) void EmbedBackwardKernel(Tensor dtable, Tensor dy,
                                                                const TokenGroup* groups,
                                                                const int32_t* order) {
  const TokenGroup group = groups[blockIdx.x];
  const int64_t c = Column<kWidth>();
  if (c >= dy.cols || group.begin >= group.end) return;
  const int64_t to = group.token * dtable.stride + c;
  Floats<kWidth> sum = LoadFloats<kWidth>(dtable.data, dtable.dtype, to);
  for (int i = group.begin; i < group.end; ++i) {
    const Floats<kWidth> add = LoadFloats<kWidth>(dy.data, dy.dtype, order[i] * dy.stride + c);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum.v[j] += add.v[j];
  }
  StoreFloats<kWidth>(dtable.data, dtable.dtype, to, sum);
}

__device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int kWidth>
__global__ __launch_bounds__(kThreads) void SiluMulKernel(Tensor y, Tensor gate_up) {
  const int64_t r = blockIdx.x, c = Column<kWidth>();
  if (c >= y.cols) return;
  const int64_t at = r * gate_up.stride + c;
  const Floats<kWidth> gate = LoadFloats<kWidth>(gate_up.data, gate_up.dtype, at);
  const Floats<kWidth> up = LoadFloats<kWidth>(gate_up.data, gate_up.dtype, at + y.cols);
  Floats<kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.v[i] = gate.v[i] * Sigmoid(gate.v[i]) * up.v[i];
  StoreFloats<kWidth>(y.data, y.dtype, r * y.stride + c, out);
}

template <int kWidth>
__global__ __launch_bounds__(kThreads) void SiluMulBackwardKernel(Tensor dgate_up, Tensor dy,
                                                                  Tensor gate_up) {
  const int64_t r = blockIdx.x, c = Column<kWidth>();
  if (c >= dy.cols) return;
  const int64_t at = r * gate_up.stride + c, to = r * dgate_up.stride + c;
  const Floats<kWidth> gate = LoadFloats<kWidth>(gate_up.data, gate_up.dtype, at);
  const Floats<kWidth> up = LoadFloats<kWidth>(gate_up.data, gate_up.dtype, at + dy.cols);
  const Floats<kWidth> d = LoadFloats<kWidth>(dy.data, dy.dtype, r * dy.stride + c);
  Floats<kWidth> dgate, dup;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float sigmoid = Sigmoid(gate.v[i]);
    const float silu = gate.v[i] * sigmoid;
    dup.v[i] = d.v[i] * silu;
    dgate.v[i] = d.v[i] * up.v[i] * (sigmoid + silu * (1.0f - sigmoid));
  }
  StoreFloats<kWidth>(dgate_up.data, dgate_up.dtype, to, dgate);
  StoreFloats<kWidth>(dgate_up.data, dgate_up.dtype, to + dy.cols, dup);
}

struct Choice {
  float value;
  int32_t id;
};
__device__ __forceinline__ Choice Better(Choice a, Choice b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}
__device__ __forceinline__ Choice WarpBest(Choice x) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    const Choice other = {__shfl_xor_sync(kAllLanes, x.value, width),
                          __shfl_xor_sync(kAllLanes, x.id, width)};
    x = Better(x, other);
  }
  return x;
}

__global__ __launch_bounds__(kArgMaxThreads) void ArgMaxKernel(int32_t* ids, Tensor logits) {
  __shared__ Choice best[kArgMaxThreads / 32];
  const float* row = static_cast<const float*>(logits.data) + blockIdx.x * logits.stride;
  Choice mine = {MinusInfinity(), INT32_MAX};
  for (int c = threadIdx.x; c < logits.cols; c += kArgMaxThreads) {
    mine = Better(mine, {row[c], c});
  }
  mine = WarpBest(mine);
  if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) {
    mine = WarpBest(best[threadIdx.x]);
    // Nothing compares greater than a row of NaN: its first id, as on the CPU.
    if (threadIdx.x == 0) ids[blockIdx.x] = mine.id == INT32_MAX ? 0 : mine.id;
  }
}

}  // namespace

cudaError_t LaunchConvert(Tensor y, Tensor x, cudaStream_t stream) {
  return LaunchGatherRows(y, x, nullptr, stream);
}

cudaError_t LaunchGatherRows(Tensor y, Tensor x, const int32_t* rows, cudaStream_t stream) {
  if (y.rows == 0) return cudaSuccess;
  if (VectorWidth({y, x}) == 4) {
    CopyRowsKernel<4><<<Grid(y.rows, y.cols, 4), kThreads, 0, stream>>>(y, x, rows);
  } else {
    CopyRowsKernel<1><<<Grid(y.rows, y.cols, 1), kThreads, 0, stream>>>(y, x, rows);
  }
  return cudaGetLastError();
}

cudaError_t LaunchScatterRows(Tensor x, Tensor y, const int32_t* rows, cudaStream_t stream) {
  if (y.rows == 0) return cudaSuccess;
  if (VectorWidth({y, x}) == 4) {
    ScatterRowsKernel<4><<<Grid(y.rows, y.cols, 4), kThreads, 0, stream>>>(x, y, rows);
  } else {
    ScatterRowsKernel<1><<<Grid(y.rows, y.cols, 1), kThreads, 0, stream>>>(x, y, rows);
  }
  return cudaGetLastError();
}

cudaError_t LaunchEmbedBackward(Tensor dtable, Tensor dy, const TokenGroup* groups, int count,
                                const int32_t* order, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  if (VectorWidth({dtable, dy}) == 4) {
    EmbedBackwardKernel<4>
        <<<Grid(count, dy.cols, 4), kThreads, 0, stream>>>(dtable, dy, groups, order);
  } else {
    EmbedBackwardKernel<1>
        <<<Grid(count, dy.cols, 1), kThreads, 0, stream>>>(dtable, dy, groups, order);
  }
  return cudaGetLastError();
}

cudaError_t LaunchSiluMul(Tensor y, Tensor gate_up, cudaStream_t stream) {
  if (y.rows == 0) return cudaSuccess;
  if (VectorWidth({y, gate_up}) == 4) {
    SiluMulKernel<4><<<Grid(y.rows, y.cols, 4), kThreads, 0, stream>>>(y, gate_up);
  } else {
    SiluMulKernel<1><<<Grid(y.rows, y.cols, 1), kThreads, 0, stream>>>(y, gate_up);
  }
  return cudaGetLastError();
}

cudaError_t LaunchSiluMulBackward(Tensor dgate_up, Tensor dy, Tensor gate_up, cudaStream_t stream) {
  if (dy.rows == 0) return cudaSuccess;
  if (VectorWidth({dgate_up, dy, gate_up}) == 4) {
    SiluMulBackwardKernel<4>
        <<<Grid(dy.rows, dy.cols, 4), kThreads, 0, stream>>>(dgate_up, dy, gate_up);
  } else {
    SiluMulBackwardKernel<1>
        <<<Grid(dy.rows, dy.cols, 1), kThreads, 0, stream>>>(dgate_up, dy, gate_up);
  }
  return cudaGetLastError();
}

cudaError_t LaunchArgMax(int32_t* ids, Tensor logits, cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  ArgMaxKernel<<<logits.rows, kArgMaxThreads, 0, stream>>>(ids, logits);
  return cudaGetLastError();
}

}  // namespace memory3
