// Attention of up to 64 query rows of a segment at a time, with tensor cores. A block has one tile
// and one query head and walks over the keys, 64 at a time, with a running softmax; each of its
// four warps has 16 rows. Products are bf16 with f32 sums; scores, maxima and sums stay f32.

#include "transformer/cuda/attention_tile.cuh"

namespace memory3 {
namespace {

template <int kDim>
__global__ __launch_bounds__(kTileThreads) void TilesKernel(AttentionCall a,
                                                            const QueryTile* tiles) {
  using Shape = TileShape<kDim>;
  constexpr int kSteps = kDim / 16;   // steps of the products with keys
  constexpr int kColumns = kDim / 8;  // C fragments of the output
  constexpr int kKeyColumns = kTileKeys / 8;
  __shared__ __align__(16) __nv_bfloat16 keys[kTileKeys * Shape::kPitch];
  __shared__ __align__(16) __nv_bfloat16 values[kTileKeys * Shape::kPitch];
  __shared__ int32_t limit[kTileKeys];

  const QueryTile tile = tiles[blockIdx.x];
  if (tile.tokens == 0) return;
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
  const int64_t column = int64_t{head} * a.head_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;

  // Queries pass through the keys' memory into registers.
  static_assert(kTileRows == kTileKeys);
  LoadRowsToTile<kDim, kTileRows>(keys, a.q, tile.row, tile.tokens, column, a.head_dim, a.aligned);
  __syncthreads();
  uint32_t q[kSteps][4];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) LoadA<Shape::kPitch>(q[s], keys, warp * 16, s * 16);

  const int row0 = warp * 16 + g, row1 = row0 + 8;
  const int index0 = tile.index + row0, index1 = tile.index + row1;
  const int last = tile.index + tile.tokens - 1;
  const float scale = a.scale * kLog2E;

  float out[kColumns][4];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[c][i] = 0;
  }
  float max0 = MinusInfinity(), max1 = MinusInfinity(), sum0 = 0, sum1 = 0;

  for (int u = tile.unit_begin; u < tile.unit_end; u += kUnitsPerTile) {
    if (!AnyVisible(a, u, tile.unit_end, last)) continue;
    __syncthreads();  // what is there has been read
    LoadUnitsToTile<kDim>(keys, values, limit, a, kv_head, u, tile.unit_end);
    __syncthreads();

    float p[kKeyColumns][4];
#pragma unroll
    for (int c = 0; c < kKeyColumns; c += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[c][i] = p[c + 1][i] = 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        LoadBTransposed<Shape::kPitch>(b, keys, c * 8, s * 16);
        MultiplyAdd(p[c], q[s], b[0], b[1]);
        MultiplyAdd(p[c + 1], q[s], b[2], b[3]);
      }
    }

    float most0 = max0, most1 = max1;
#pragma unroll
    for (int c = 0; c < kKeyColumns; ++c) {
      const int32_t limit0 = limit[c * 8 + 2 * t], limit1 = limit[c * 8 + 2 * t + 1];
      p[c][0] = limit0 <= index0 ? p[c][0] * scale : MinusInfinity();
      p[c][1] = limit1 <= index0 ? p[c][1] * scale : MinusInfinity();
      p[c][2] = limit0 <= index1 ? p[c][2] * scale : MinusInfinity();
      p[c][3] = limit1 <= index1 ? p[c][3] * scale : MinusInfinity();
      most0 = fmaxf(most0, fmaxf(p[c][0], p[c][1]));
      most1 = fmaxf(most1, fmaxf(p[c][2], p[c][3]));
    }
    // The four lanes of a row.
    most0 = fmaxf(most0, __shfl_xor_sync(kAllLanes, most0, 1));
    most0 = fmaxf(most0, __shfl_xor_sync(kAllLanes, most0, 2));
    most1 = fmaxf(most1, __shfl_xor_sync(kAllLanes, most1, 1));
    most1 = fmaxf(most1, __shfl_xor_sync(kAllLanes, most1, 2));
    const float pivot0 = most0 == MinusInfinity() ? 0.0f : most0;
    const float pivot1 = most1 == MinusInfinity() ? 0.0f : most1;
    const float shrink0 = exp2f(max0 - pivot0), shrink1 = exp2f(max1 - pivot1);
    max0 = most0;
    max1 = most1;
    sum0 *= shrink0;
    sum1 *= shrink1;
#pragma unroll
    for (int c = 0; c < kKeyColumns; ++c) {
      p[c][0] = exp2f(p[c][0] - pivot0);
      p[c][1] = exp2f(p[c][1] - pivot0);
      p[c][2] = exp2f(p[c][2] - pivot1);
      p[c][3] = exp2f(p[c][3] - pivot1);
      sum0 += p[c][0] + p[c][1];
      sum1 += p[c][2] + p[c][3];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      out[c][0] *= shrink0;
      out[c][1] *= shrink0;
      out[c][2] *= shrink1;
      out[c][3] *= shrink1;
    }
#pragma unroll
    for (int s = 0; s < kTileKeys / 16; ++s) {
      const uint32_t chance[4] = {
          PackBf16(p[2 * s][0], p[2 * s][1]), PackBf16(p[2 * s][2], p[2 * s][3]),
          PackBf16(p[2 * s + 1][0], p[2 * s + 1][1]), PackBf16(p[2 * s + 1][2], p[2 * s + 1][3])};
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        uint32_t b[4];
        LoadB<Shape::kPitch>(b, values, s * 16, c * 8);
        MultiplyAdd(out[c], chance, b[0], b[1]);
        MultiplyAdd(out[c + 1], chance, b[2], b[3]);
      }
    }
  }

  sum0 += __shfl_xor_sync(kAllLanes, sum0, 1);
  sum0 += __shfl_xor_sync(kAllLanes, sum0, 2);
  sum1 += __shfl_xor_sync(kAllLanes, sum1, 1);
  sum1 += __shfl_xor_sync(kAllLanes, sum1, 2);
  const float inverse0 = sum0 > 0 ? 1 / sum0 : 0, inverse1 = sum1 > 0 ? 1 / sum1 : 0;
  const int64_t at0 = (int64_t{tile.row} + row0) * a.out.stride + column;
  const int64_t at1 = at0 + 8 * a.out.stride;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int x = c * 8 + 2 * t;
    if (row0 < tile.tokens) {
      StorePair(a.out, at0, x, a.head_dim, out[c][0] * inverse0, out[c][1] * inverse0);
    }
    if (row1 < tile.tokens) {
      StorePair(a.out, at1, x, a.head_dim, out[c][2] * inverse1, out[c][3] * inverse1);
    }
  }
  if (a.lse != nullptr && t == 0) {
    float* lse = a.lse + (int64_t{tile.row} + row0) * a.heads + head;
    if (row0 < tile.tokens) lse[0] = (max0 + log2f(sum0)) * kLn2;
    if (row1 < tile.tokens) lse[int64_t{8} * a.heads] = (max1 + log2f(sum1)) * kLn2;
  }
}

}  // namespace

cudaError_t LaunchAttentionTiles(const AttentionCall& call, const QueryTile* tiles, int count,
                                 cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(count, call.heads);
  if (call.head_dim <= 64) {
    TilesKernel<64><<<grid, kTileThreads, 0, stream>>>(call, tiles);
  } else if (call.head_dim <= 80) {
    TilesKernel<80><<<grid, kTileThreads, 0, stream>>>(call, tiles);
  } else {
    TilesKernel<128><<<grid, kTileThreads, 0, stream>>>(call, tiles);
  }
  return cudaGetLastError();
}

}  // namespace memory3
