// Attention's backward in f32, a warp for each query row and head (dq) and for each key and KV head
// (its key's and value's gradient, summed over the rows that see it in their order).

#include "transformer/cuda/attention.h"
#include "transformer/cuda/common.cuh"

namespace memory3 {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
// Numbers of a head that a lane has.
constexpr int kPerLane = kMaxHeadDim / 32;

__global__ __launch_bounds__(kThreads) void DeltaKernel(AttentionBackwardCall call) {
  const AttentionCall& a = call.forward;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= a.q.rows * a.heads) return;
  const int64_t row = at / a.heads, column = at % a.heads * a.head_dim;
  float sum = 0;
  for (int c = lane; c < a.head_dim; c += 32) {
    sum += LoadOne(call.dout.data, call.dout.dtype, row * call.dout.stride + column + c) *
           LoadOne(a.out.data, a.out.dtype, row * a.out.stride + column + c);
  }
  sum = WarpSum(sum);
  if (lane == 0) call.delta[at] = sum;
}

__global__ __launch_bounds__(kThreads) void QueryGradientKernel(AttentionBackwardCall call,
                                                                const AttentionItem* items) {
  __shared__ float shared[kWarps][2][kMaxHeadDim];
  const AttentionCall& a = call.forward;
  const AttentionItem item = items[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.y * kWarps + warp;
  if (item.row < 0 || head >= a.heads) return;  // no barrier of the block follows
  const int d = a.head_dim, kv_head = head / (a.heads / a.kv_heads);
  const int64_t column = int64_t{head} * d;
  float* q = shared[warp][0];
  float* dout = shared[warp][1];
  for (int c = lane; c < d; c += 32) {
    q[c] = LoadOne(a.q.data, a.q.dtype, item.row * a.q.stride + column + c);
    dout[c] = LoadOne(call.dout.data, call.dout.dtype, item.row * call.dout.stride + column + c);
  }
  __syncwarp();
  const float lse = a.lse[int64_t{item.row} * a.heads + head];
  const float delta = call.delta[int64_t{item.row} * a.heads + head];
  float dq[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) dq[i] = 0;

  // Lanes 0 … 15 multiply the query with keys, the others the output's gradient with values.
  static_assert(kUnitTokens == 16);
  const int token = lane % kUnitTokens;
  const bool has_value = lane >= kUnitTokens;
  const float* mine = has_value ? dout : q;
  for (int u = item.unit_begin; u < item.unit_end; ++u) {
    const KvUnit unit = a.units[u];
    const SourceAtLayer source = a.sources.at[unit.source];
    if (!source.read) continue;
    const int visible = unit.first == kFirstSeenByAll
                            ? unit.tokens
                            : min(max(item.index - unit.first + 1, 0), unit.tokens);
    if (visible == 0) continue;
    const int64_t base = source.layer_offset + kv_head * source.head_stride;
    float product = 0;
    if (token < visible) {
      const int64_t at = base + token * source.token_stride + (has_value ? source.value_offset : 0);
      for (int c = 0; c < d; ++c) product += mine[c] * LoadOne(unit.base, source.dtype, at + c);
    }
    const float dp = __shfl_sync(kAllLanes, product, token + kUnitTokens);
    const float ds =
        token < visible ? expf(product * a.scale - lse) * (dp - delta) * a.scale : 0.0f;
    for (int t = 0; t < visible; ++t) {
      const float factor = __shfl_sync(kAllLanes, ds, t);
      const int64_t at = base + t * source.token_stride;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int c = lane + i * 32;
        if (c < d) dq[i] += factor * LoadOne(unit.base, source.dtype, at + c);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = lane + i * 32;
    if (c < d) {
      StoreOne(call.dq.data, call.dq.dtype, item.row * call.dq.stride + column + c, dq[i]);
    }
  }
}

__global__ __launch_bounds__(kThreads) void KeyGradientKernel(AttentionBackwardCall call,
                                                              const KeyTile* tiles,
                                                              const QuerySegment* segments) {
  __shared__ float shared[kWarps][2][kMaxHeadDim];
  const AttentionCall& a = call.forward;
  const KeyTile tile = tiles[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = blockIdx.z * kWarps + warp, kv_head = blockIdx.y;
  if (token >= tile.tokens) return;  // no barrier of the block follows
  const SourceAtLayer source = a.sources.at[tile.source];
  if (!source.read) return;
  const int d = a.head_dim, group = a.heads / a.kv_heads;
  const int64_t at =
      source.layer_offset + kv_head * source.head_stride + token * source.token_stride;
  float* key = shared[warp][0];
  float* value = shared[warp][1];
  for (int c = lane; c < d; c += 32) {
    key[c] = LoadOne(tile.base, source.dtype, at + c);
    value[c] = LoadOne(tile.base, source.dtype, at + source.value_offset + c);
  }
  __syncwarp();
  float dkey[kPerLane], dvalue[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) dkey[i] = dvalue[i] = 0;

  for (int s = tile.segment_begin; s < tile.segment_end; ++s) {
    const QuerySegment segment = segments[s];
    const int skipped =
        tile.first == kFirstSeenByAll ? 0 : max(0, tile.first + token - segment.index);
    const int pairs = (segment.rows - skipped) * group;  // (row, query head of the group)
    for (int first = 0; first < pairs; first += 32) {
      const int pair = first + lane;
      int64_t q_at = 0, dout_at = 0;
      float p = 0, ds = 0;
      if (pair < pairs) {
        const int64_t row = segment.row + skipped + pair / group;
        const int head = kv_head * group + pair % group;
        q_at = row * a.q.stride + int64_t{head} * d;
        dout_at = row * call.dout.stride + int64_t{head} * d;
        float score = 0, dp = 0;
        for (int c = 0; c < d; ++c) {
          score += LoadOne(a.q.data, a.q.dtype, q_at + c) * key[c];
          dp += LoadOne(call.dout.data, call.dout.dtype, dout_at + c) * value[c];
        }
        p = expf(score * a.scale - a.lse[row * a.heads + head]);
        ds = p * (dp - call.delta[row * a.heads + head]) * a.scale;
      }
      for (int j = 0; j < min(32, pairs - first); ++j) {
        const float p_j = __shfl_sync(kAllLanes, p, j), ds_j = __shfl_sync(kAllLanes, ds, j);
        const int64_t q_j = __shfl_sync(kAllLanes, q_at, j);
        const int64_t dout_j = __shfl_sync(kAllLanes, dout_at, j);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int c = lane + i * 32;
          if (c < d) {
            dkey[i] += ds_j * LoadOne(a.q.data, a.q.dtype, q_j + c);
            dvalue[i] += p_j * LoadOne(call.dout.data, call.dout.dtype, dout_j + c);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = lane + i * 32;
    if (c < d) {
      tile.gradient[at + c] += dkey[i];
      tile.gradient[at + source.value_offset + c] += dvalue[i];
    }
  }
}

}  // namespace

cudaError_t LaunchAttentionDelta(const AttentionBackwardCall& call, cudaStream_t stream) {
  const int64_t warps = call.forward.q.rows * call.forward.heads;
  if (warps == 0) return cudaSuccess;
  DeltaKernel<<<CeilDivide(warps, kWarps), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchAttentionBackwardRows(const AttentionBackwardCall& call,
                                        const AttentionItem* items, int count,
                                        cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(count, CeilDivide(call.forward.heads, kWarps));
  QueryGradientKernel<<<grid, kThreads, 0, stream>>>(call, items);
  return cudaGetLastError();
}

cudaError_t LaunchAttentionBackwardKeys(const AttentionBackwardCall& call, const KeyTile* tiles,
                                        int count, const QuerySegment* segments,
                                        cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(count, call.forward.kv_heads, kTileKeys / kWarps);
  KeyGradientKernel<<<grid, kThreads, 0, stream>>>(call, tiles, segments);
  return cudaGetLastError();
}

}  // namespace memory3
