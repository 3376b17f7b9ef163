#include "transformer/cuda/common.cuh"
#include "transformer/cuda/writing.h"

namespace memory3 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
// Shared memory up to which a reference's keys are kept there; two blocks fit a multiprocessor.
constexpr int64_t kStagedBytes = 80 << 10;

// Query rows that a warp multiplies with a key at once.
constexpr int kQueries = 4;

// One block a reference and KV head. A warp takes four of the pairs (row, query head of the group)
// at a time, keeps what its softmaxes give to each token, and the warps' sums are added in order.
// Shared memory: the keys [longest, head_dim | 1] where kStaged, then per warp the queries
// [kQueries, head_dim], scores [kQueries, longest] and sums [longest].
template <bool kStaged>
__global__ __launch_bounds__(kThreads) void AttentionReceivedKernel(
    Tensor weights, Tensor q, Tensor k, const ReferenceRange* references, int longest,
    HeadShape shape) {
  extern __shared__ float shared[];
  const ReferenceRange reference = references[blockIdx.x];
  const int kv_head = blockIdx.y, group = shape.heads / shape.kv_heads, d = shape.head_dim;
  const int n = reference.tokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int pitch = d | 1;  // odd: the keys of a warp's lanes lie in different banks
  const int per_warp = kQueries * (d + longest) + longest;
  float* keys = shared;
  float* warps = shared + (kStaged ? longest * pitch : 0);
  float* queries = warps + warp * per_warp;
  float* scores = queries + kQueries * d;
  float* sums = scores + kQueries * longest;
  const int64_t first_key = reference.row * k.stride + int64_t{kv_head} * d;
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < n * d; i += kThreads) {
      const int j = i / d, c = i % d;
      keys[j * pitch + c] = LoadOne(k.data, k.dtype, first_key + j * k.stride + c);
    }
  }
  for (int j = lane; j < n; j += 32) sums[j] = 0;
  __syncthreads();

  const int pairs = n * group;
  for (int first = warp * kQueries; first < pairs; first += kWarps * kQueries) {
    __syncwarp();  // the last queries have been read
    for (int i = lane; i < kQueries * d; i += 32) {
      const int pair = first + i / d;
      const int64_t at = (int64_t{reference.row} + pair / group) * q.stride +
                         (int64_t{kv_head} * group + pair % group) * d + i % d;
      queries[i] = pair < pairs ? LoadOne(q.data, q.dtype, at) * shape.scale : 0.0f;
    }
    __syncwarp();
    float most[kQueries], total[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) most[i] = MinusInfinity(), total[i] = 0;
    for (int j = lane; j < n; j += 32) {
      float score[kQueries];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) score[i] = 0;
      for (int c = 0; c < d; ++c) {
        const float key =
            kStaged ? keys[j * pitch + c] : LoadOne(k.data, k.dtype, first_key + j * k.stride + c);
#pragma unroll
        for (int i = 0; i < kQueries; ++i) score[i] += queries[i * d + c] * key;
      }
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        scores[i * longest + j] = score[i];
        most[i] = fmaxf(most[i], score[i]);
      }
    }
    // From here on a lane reads and writes what it wrote: its own tokens.
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      most[i] = WarpMax(most[i]);
      for (int j = lane; j < n; j += 32) {
        const float p = expf(scores[i * longest + j] - most[i]);
        scores[i * longest + j] = p;
        total[i] += p;
      }
      total[i] = WarpSum(total[i]);
      if (first + i >= pairs) continue;
      for (int j = lane; j < n; j += 32) sums[j] += scores[i * longest + j] / total[i];
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warps[(w + 1) * per_warp - longest + j];
    static_cast<float*>(weights.data)[(int64_t{reference.row} + j) * weights.stride + kv_head] =
        sum;
  }
}

// One block a reference and KV head. A token's rank is the number of tokens that go before it.
__global__ __launch_bounds__(kThreads) void SelectKeptKernel(int32_t* kept, Tensor weights,
                                                             const ReferenceRange* references,
                                                             int longest, int keep) {
  extern __shared__ float shared[];
  const ReferenceRange reference = references[blockIdx.x];
  const int kv_head = blockIdx.y, n = reference.tokens;
  float* weight = shared;
  int32_t* chosen = reinterpret_cast<int32_t*>(shared + longest);
  const float* from = static_cast<const float*>(weights.data);
  for (int j = threadIdx.x; j < n; j += kThreads) {
    weight[j] = from[(int64_t{reference.row} + j) * weights.stride + kv_head];
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += kThreads) {
    const float mine = weight[j];
    int rank = 0;
    for (int i = 0; i < n; ++i) rank += weight[i] > mine || (weight[i] == mine && i < j);
    chosen[j] = rank < keep;
  }
  __syncthreads();
  int32_t* to = kept + (int64_t{blockIdx.x} * gridDim.y + kv_head) * keep;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    if (!chosen[j]) continue;
    int place = 0;
    for (int i = 0; i < j; ++i) place += chosen[i];
    if (place < keep) to[place] = reference.row + j;  // NaN ranks before and after nothing
  }
  for (int i = n + threadIdx.x; i < keep; i += kThreads) to[i] = -1;
}

// One thread a number of the memory: [references, kv_heads, keep, head_dim], key and value.
__global__ void GatherKeptKernel(float* memory, const int32_t* kept, Tensor k, Tensor v, int keep,
                                 int kv_heads, int head_dim, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t half = int64_t{kv_heads} * keep * head_dim;
  const int64_t reference = i / half, within = i % half;
  const int64_t column = within / (int64_t{keep} * head_dim) * head_dim + within % head_dim;
  const int64_t row = kept[i / head_dim];
  float* to = memory + reference * 2 * half + within;
  to[0] = row < 0 ? 0.0f : LoadOne(k.data, k.dtype, row * k.stride + column);
  to[half] = row < 0 ? 0.0f : LoadOne(v.data, v.dtype, row * v.stride + column);
}

// The rows kept for one head differ from each other, so every number has one thread.
__global__ void ScatterKeptKernel(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept,
                                  int keep, int kv_heads, int head_dim, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t row = kept[i / head_dim];
  if (row < 0) return;
  const int64_t half = int64_t{kv_heads} * keep * head_dim;
  const int64_t reference = i / half, within = i % half;
  const int64_t column = within / (int64_t{keep} * head_dim) * head_dim + within % head_dim;
  const float* from = dmemory + reference * 2 * half + within;
  const int64_t key = row * dk.stride + column, value = row * dv.stride + column;
  StoreOne(dk.data, dk.dtype, key, LoadOne(dk.data, dk.dtype, key) + from[0]);
  StoreOne(dv.data, dv.dtype, value, LoadOne(dv.data, dv.dtype, value) + from[half]);
}

}  // namespace

cudaError_t LaunchAttentionReceived(Tensor weights, Tensor q, Tensor k,
                                    const ReferenceRange* references, int count, int longest,
                                    const HeadShape& shape, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t d = shape.head_dim;
  const int64_t work = sizeof(float) * kWarps * (kQueries * (d + longest) + int64_t{longest});
  const int64_t staged = sizeof(float) * longest * (d | 1);
  const auto launch = [&](auto* kernel, int64_t bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    kernel<<<dim3(count, shape.kv_heads), kThreads, bytes, stream>>>(weights, q, k, references,
                                                                     longest, shape);
    return cudaGetLastError();
  };
  return work + staged <= kStagedBytes ? launch(AttentionReceivedKernel<true>, work + staged)
                                       : launch(AttentionReceivedKernel<false>, work);
}

cudaError_t LaunchSelectKept(int32_t* kept, Tensor weights, const ReferenceRange* references,
                             int count, int longest, int keep, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int bytes = 2 * sizeof(float) * longest;
  const cudaError_t error =
      cudaFuncSetAttribute(SelectKeptKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  SelectKeptKernel<<<dim3(count, weights.cols), kThreads, bytes, stream>>>(
      kept, weights, references, longest, keep);
  return cudaGetLastError();
}

cudaError_t LaunchGatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references,
                             int keep, int kv_heads, int head_dim, cudaStream_t stream) {
  const int64_t count = int64_t{references} * kv_heads * keep * head_dim;
  if (count == 0) return cudaSuccess;
  GatherKeptKernel<<<CeilDivide(count, 256), 256, 0, stream>>>(memory, kept, k, v, keep, kv_heads,
                                                               head_dim, count);
  return cudaGetLastError();
}

cudaError_t LaunchScatterKept(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept,
                              int references, int keep, int kv_heads, int head_dim,
                              cudaStream_t stream) {
  const int64_t count = int64_t{references} * kv_heads * keep * head_dim;
  if (count == 0) return cudaSuccess;
  ScatterKeptKernel<<<CeilDivide(count, 256), 256, 0, stream>>>(dk, dv, dmemory, kept, keep,
                                                                kv_heads, head_dim, count);
  return cudaGetLastError();
}

}  // namespace memory3
