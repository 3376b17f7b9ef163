// Attention's backward with tensor cores. Scores are computed again from q, k and the forward's
// log-sum-exp:
//   p = exp(scale q·k - lse), ds = p (dout·v - delta) scale, delta = dout·out,
//   dq = Σ ds k, dk = Σ ds q, dv = Σ p dout.
// One kernel walks over the keys of a query tile (dq), the other over the query rows that see a key
// tile (dk, dv); so each number has one owner, which adds in a fixed order.

#include "transformer/cuda/attention_tile.cuh"

namespace memory3 {
namespace {

// Query rows that the second kernel takes at once.
constexpr int kRowsAtOnce = 32;

template <int kDim>
__global__ __launch_bounds__(kTileThreads) void QueryTilesKernel(AttentionBackwardCall call,
                                                                 const QueryTile* tiles) {
  using Shape = TileShape<kDim>;
  constexpr int kSteps = kDim / 16, kColumns = kDim / 8, kKeyColumns = kTileKeys / 8;
  extern __shared__ __align__(16) __nv_bfloat16 shared[];
  __shared__ int32_t limit[kTileKeys];
  __nv_bfloat16* q = shared;
  __nv_bfloat16* dout = q + kTileRows * Shape::kPitch;
  __nv_bfloat16* keys = dout + kTileRows * Shape::kPitch;
  __nv_bfloat16* values = keys + kTileKeys * Shape::kPitch;

  const AttentionCall& a = call.forward;
  const QueryTile tile = tiles[blockIdx.x];
  if (tile.tokens == 0) return;
  const int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
  const int64_t column = int64_t{head} * a.head_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;

  LoadRowsToTile<kDim, kTileRows>(q, a.q, tile.row, tile.tokens, column, a.head_dim, a.aligned);
  LoadRowsToTile<kDim, kTileRows>(dout, call.dout, tile.row, tile.tokens, column, a.head_dim,
                                  a.aligned);

  const int row0 = warp * 16 + g, row1 = row0 + 8;
  const int index0 = tile.index + row0, index1 = tile.index + row1;
  const int last = tile.index + tile.tokens - 1;
  const float scale = a.scale * kLog2E;
  // Rows past the tile's last have no queries: any finite numbers do.
  float lse0 = 0, lse1 = 0, delta0 = 0, delta1 = 0;
  if (row0 < tile.tokens) {
    const int64_t at = (int64_t{tile.row} + row0) * a.heads + head;
    lse0 = a.lse[at] * kLog2E, delta0 = call.delta[at];
  }
  if (row1 < tile.tokens) {
    const int64_t at = (int64_t{tile.row} + row1) * a.heads + head;
    lse1 = a.lse[at] * kLog2E, delta1 = call.delta[at];
  }

  float dq[kColumns][4];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dq[c][i] = 0;
  }

  for (int u = tile.unit_begin; u < tile.unit_end; u += kUnitsPerTile) {
    if (!AnyVisible(a, u, tile.unit_end, last)) continue;
    __syncthreads();  // what is there has been read
    LoadUnitsToTile<kDim>(keys, values, limit, a, kv_head, u, tile.unit_end);
    __syncthreads();

    float s[kKeyColumns][4], dp[kKeyColumns][4];
#pragma unroll
    for (int c = 0; c < kKeyColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[c][i] = dp[c][i] = 0;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t q_part[4], dout_part[4];
      LoadA<Shape::kPitch>(q_part, q, warp * 16, step * 16);
      LoadA<Shape::kPitch>(dout_part, dout, warp * 16, step * 16);
#pragma unroll
      for (int c = 0; c < kKeyColumns; c += 2) {
        uint32_t b[4];
        LoadBTransposed<Shape::kPitch>(b, keys, c * 8, step * 16);
        MultiplyAdd(s[c], q_part, b[0], b[1]);
        MultiplyAdd(s[c + 1], q_part, b[2], b[3]);
        LoadBTransposed<Shape::kPitch>(b, values, c * 8, step * 16);
        MultiplyAdd(dp[c], dout_part, b[0], b[1]);
        MultiplyAdd(dp[c + 1], dout_part, b[2], b[3]);
      }
    }
#pragma unroll
    for (int c = 0; c < kKeyColumns; ++c) {
      const int32_t limit0 = limit[c * 8 + 2 * t], limit1 = limit[c * 8 + 2 * t + 1];
      const float p0 = limit0 <= index0 ? exp2f(s[c][0] * scale - lse0) : 0.0f;
      const float p1 = limit1 <= index0 ? exp2f(s[c][1] * scale - lse0) : 0.0f;
      const float p2 = limit0 <= index1 ? exp2f(s[c][2] * scale - lse1) : 0.0f;
      const float p3 = limit1 <= index1 ? exp2f(s[c][3] * scale - lse1) : 0.0f;
      s[c][0] = p0 * (dp[c][0] - delta0) * a.scale;
      s[c][1] = p1 * (dp[c][1] - delta0) * a.scale;
      s[c][2] = p2 * (dp[c][2] - delta1) * a.scale;
      s[c][3] = p3 * (dp[c][3] - delta1) * a.scale;
    }
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step) {
      const uint32_t ds[4] = {PackBf16(s[2 * step][0], s[2 * step][1]),
                              PackBf16(s[2 * step][2], s[2 * step][3]),
                              PackBf16(s[2 * step + 1][0], s[2 * step + 1][1]),
                              PackBf16(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        uint32_t b[4];
        LoadB<Shape::kPitch>(b, keys, step * 16, c * 8);
        MultiplyAdd(dq[c], ds, b[0], b[1]);
        MultiplyAdd(dq[c + 1], ds, b[2], b[3]);
      }
    }
  }

  const int64_t at0 = (int64_t{tile.row} + row0) * call.dq.stride + column;
  const int64_t at1 = at0 + 8 * call.dq.stride;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int x = c * 8 + 2 * t;
    if (row0 < tile.tokens) StorePair(call.dq, at0, x, a.head_dim, dq[c][0], dq[c][1]);
    if (row1 < tile.tokens) StorePair(call.dq, at1, x, a.head_dim, dq[c][2], dq[c][3]);
  }
}

// The products here are those of the first kernel transposed: rows of the fragments are keys,
// columns are query rows.
template <int kDim>
__global__ __launch_bounds__(kTileThreads) void KeyTilesKernel(AttentionBackwardCall call,
                                                               const KeyTile* tiles,
                                                               const QuerySegment* segments) {
  using Shape = TileShape<kDim>;
  constexpr int kSteps = kDim / 16, kColumns = kDim / 8, kRowColumns = kRowsAtOnce / 8;
  extern __shared__ __align__(16) __nv_bfloat16 shared[];
  __shared__ float row_lse[kRowsAtOnce], row_delta[kRowsAtOnce];
  __nv_bfloat16* keys = shared;
  __nv_bfloat16* values = keys + kTileKeys * Shape::kPitch;
  __nv_bfloat16* q = values + kTileKeys * Shape::kPitch;
  __nv_bfloat16* dout = q + kRowsAtOnce * Shape::kPitch;

  const AttentionCall& a = call.forward;
  const KeyTile tile = tiles[blockIdx.x];
  if (tile.tokens == 0) return;
  const SourceAtLayer source = a.sources.at[tile.source];
  if (!source.read) return;
  const int kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t base = source.layer_offset + kv_head * source.head_stride;

  for (int i = threadIdx.x; i < kTileKeys * Shape::kPieces; i += kTileThreads) {
    const int slot = i / Shape::kPieces, c = i % Shape::kPieces * 8;
    uint4 key = make_uint4(0, 0, 0, 0), value = key;
    if (slot < tile.tokens && c < a.head_dim) {
      const int64_t at = base + slot * source.token_stride + c;
      key = LoadEightBf16(tile.base, source.dtype, at, a.head_dim - c, a.aligned);
      value = LoadEightBf16(tile.base, source.dtype, at + source.value_offset, a.head_dim - c,
                            a.aligned);
    }
    *reinterpret_cast<uint4*>(keys + slot * Shape::kPitch + c) = key;
    *reinterpret_cast<uint4*>(values + slot * Shape::kPitch + c) = value;
  }

  // Lowest context index that sees this lane's two keys.
  const int slot0 = warp * 16 + g, slot1 = slot0 + 8;
  const bool masked = tile.first != kFirstSeenByAll;
  const int limit0 = slot0 >= tile.tokens ? INT32_MAX : masked ? tile.first + slot0 : INT32_MIN;
  const int limit1 = slot1 >= tile.tokens ? INT32_MAX : masked ? tile.first + slot1 : INT32_MIN;
  const float scale = a.scale * kLog2E;

  float dkey[kColumns][4], dvalue[kColumns][4];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dkey[c][i] = dvalue[c][i] = 0;
  }

  for (int n = tile.segment_begin; n < tile.segment_end; ++n) {
    const QuerySegment segment = segments[n];
    const int skipped = masked ? max(0, tile.first - segment.index) : 0;
    for (int member = 0; member < group; ++member) {
      const int head = kv_head * group + member;
      const int64_t column = int64_t{head} * a.head_dim;
      for (int first = skipped; first < segment.rows; first += kRowsAtOnce) {
        const int rows = min(kRowsAtOnce, segment.rows - first);
        const int64_t row = int64_t{segment.row} + first;
        __syncthreads();  // what is there has been read
        LoadRowsToTile<kDim, kRowsAtOnce>(q, a.q, row, rows, column, a.head_dim, a.aligned);
        LoadRowsToTile<kDim, kRowsAtOnce>(dout, call.dout, row, rows, column, a.head_dim,
                                          a.aligned);
        if (threadIdx.x < kRowsAtOnce) {
          const bool there = threadIdx.x < rows;
          const int64_t at = (row + threadIdx.x) * a.heads + head;
          row_lse[threadIdx.x] = there ? a.lse[at] * kLog2E : 0.0f;
          row_delta[threadIdx.x] = there ? call.delta[at] : 0.0f;
        }
        __syncthreads();

        float s[kRowColumns][4], dp[kRowColumns][4];
#pragma unroll
        for (int c = 0; c < kRowColumns; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[c][i] = dp[c][i] = 0;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t key_part[4], value_part[4];
          LoadA<Shape::kPitch>(key_part, keys, warp * 16, step * 16);
          LoadA<Shape::kPitch>(value_part, values, warp * 16, step * 16);
#pragma unroll
          for (int c = 0; c < kRowColumns; c += 2) {
            uint32_t b[4];
            LoadBTransposed<Shape::kPitch>(b, q, c * 8, step * 16);
            MultiplyAdd(s[c], key_part, b[0], b[1]);
            MultiplyAdd(s[c + 1], key_part, b[2], b[3]);
            LoadBTransposed<Shape::kPitch>(b, dout, c * 8, step * 16);
            MultiplyAdd(dp[c], value_part, b[0], b[1]);
            MultiplyAdd(dp[c + 1], value_part, b[2], b[3]);
          }
        }
        // s becomes p, dp becomes ds.
#pragma unroll
        for (int c = 0; c < kRowColumns; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = c * 8 + 2 * t + i % 2;
            const int index = segment.index + first + r;
            const bool seen = r < rows && (i < 2 ? limit0 : limit1) <= index;
            const float p = seen ? exp2f(s[c][i] * scale - row_lse[r]) : 0.0f;
            s[c][i] = p;
            dp[c][i] = p * (dp[c][i] - row_delta[r]) * a.scale;
          }
        }
#pragma unroll
        for (int step = 0; step < kRowsAtOnce / 16; ++step) {
          const int x = 2 * step;
          const uint32_t p[4] = {PackBf16(s[x][0], s[x][1]), PackBf16(s[x][2], s[x][3]),
                                 PackBf16(s[x + 1][0], s[x + 1][1]),
                                 PackBf16(s[x + 1][2], s[x + 1][3])};
          const uint32_t ds[4] = {PackBf16(dp[x][0], dp[x][1]), PackBf16(dp[x][2], dp[x][3]),
                                  PackBf16(dp[x + 1][0], dp[x + 1][1]),
                                  PackBf16(dp[x + 1][2], dp[x + 1][3])};
#pragma unroll
          for (int c = 0; c < kColumns; c += 2) {
            uint32_t b[4];
            LoadB<Shape::kPitch>(b, dout, step * 16, c * 8);
            MultiplyAdd(dvalue[c], p, b[0], b[1]);
            MultiplyAdd(dvalue[c + 1], p, b[2], b[3]);
            LoadB<Shape::kPitch>(b, q, step * 16, c * 8);
            MultiplyAdd(dkey[c], ds, b[0], b[1]);
            MultiplyAdd(dkey[c + 1], ds, b[2], b[3]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = i < 2 ? slot0 : slot1, x = c * 8 + 2 * t + i % 2;
      if (slot < tile.tokens && x < a.head_dim) {
        float* to = tile.gradient + base + slot * source.token_stride + x;
        *to += dkey[c][i];
        to[source.value_offset] += dvalue[c][i];
      }
    }
  }
}

// Bytes of `rows` rows of two matrices in shared memory.
template <int kDim>
constexpr int TileBytes(int rows) {
  return 2 * rows * TileShape<kDim>::kPitch * static_cast<int>(sizeof(__nv_bfloat16));
}

// More shared memory than every kernel has must be asked for.
template <typename Kernel>
cudaError_t AskForShared(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <int kDim>
cudaError_t LaunchQueries(const AttentionBackwardCall& call, const QueryTile* tiles, int count,
                          cudaStream_t stream) {
  constexpr int kBytes = TileBytes<kDim>(kTileRows + kTileKeys);
  const cudaError_t error = AskForShared(QueryTilesKernel<kDim>, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(count, call.forward.heads);
  QueryTilesKernel<kDim><<<grid, kTileThreads, kBytes, stream>>>(call, tiles);
  return cudaGetLastError();
}

template <int kDim>
cudaError_t LaunchKeys(const AttentionBackwardCall& call, const KeyTile* tiles, int count,
                       const QuerySegment* segments, cudaStream_t stream) {
  constexpr int kBytes = TileBytes<kDim>(kRowsAtOnce + kTileKeys);
  const cudaError_t error = AskForShared(KeyTilesKernel<kDim>, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(count, call.forward.kv_heads);
  KeyTilesKernel<kDim><<<grid, kTileThreads, kBytes, stream>>>(call, tiles, segments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttentionBackwardTiles(const AttentionBackwardCall& call, const QueryTile* tiles,
                                         int count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int d = call.forward.head_dim;
  if (d <= 64) return LaunchQueries<64>(call, tiles, count, stream);
  if (d <= 80) return LaunchQueries<80>(call, tiles, count, stream);
  return LaunchQueries<128>(call, tiles, count, stream);
}

cudaError_t LaunchAttentionBackwardKeyTiles(const AttentionBackwardCall& call, const KeyTile* tiles,
                                            int count, const QuerySegment* segments,
                                            cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int d = call.forward.head_dim;
  if (d <= 64) return LaunchKeys<64>(call, tiles, count, segments, stream);
  if (d <= 80) return LaunchKeys<80>(call, tiles, count, segments, stream);
  return LaunchKeys<128>(call, tiles, count, segments, stream);
}

}  // namespace memory3
