// What the tensor-core attention kernels share: bringing queries, keys and values to shared memory.
#pragma once

#include "transformer/cuda/attention.h"
#include "transformer/cuda/common.cuh"
#include "transformer/cuda/mma.cuh"

namespace memory3 {

constexpr int kTileThreads = 128;
constexpr int kUnitsPerTile = kTileKeys / kUnitTokens;

// head_dim padded to kDim, rows an odd multiple of 16 bytes apart (mma.cuh).
template <int kDim>
struct TileShape {
  static_assert(kDim % 16 == 0);
  static constexpr int kPitch = kDim + 8;
  static constexpr int kPieces = kDim / 8;
};

// to[r][c] = from[first_row + r][column + c], zero where r >= rows or c >= head_dim, r < kRows.
template <int kDim, int kRows>
__device__ __forceinline__ void LoadRowsToTile(__nv_bfloat16* to, const Tensor& from,
                                               int64_t first_row, int rows, int64_t column,
                                               int head_dim, bool aligned) {
  using Shape = TileShape<kDim>;
  for (int i = threadIdx.x; i < kRows * Shape::kPieces; i += kTileThreads) {
    const int r = i / Shape::kPieces, c = i % Shape::kPieces * 8;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (r < rows && c < head_dim) {
      x = LoadEightBf16(from.data, from.dtype, (first_row + r) * from.stride + column + c,
                        head_dim - c, aligned);
    }
    *reinterpret_cast<uint4*>(to + r * Shape::kPitch + c) = x;
  }
}

// Keys and values of units [first, first + kUnitsPerTile), those before `end`. limit[slot]: the
// lowest context index that sees the slot's key; INT32_MAX where there is none.
template <int kDim>
__device__ __forceinline__ void LoadUnitsToTile(__nv_bfloat16* keys, __nv_bfloat16* values,
                                                int32_t* limit, const AttentionCall& a, int kv_head,
                                                int first, int end) {
  using Shape = TileShape<kDim>;
  if (threadIdx.x < kTileKeys) {
    const int u = first + threadIdx.x / kUnitTokens, t = threadIdx.x % kUnitTokens;
    int32_t lowest = INT32_MAX;
    if (u < end) {
      const KvUnit unit = a.units[u];
      if (a.sources.at[unit.source].read && t < unit.tokens) {
        lowest = unit.first == kFirstSeenByAll ? kFirstSeenByAll : unit.first + t;
      }
    }
    limit[threadIdx.x] = lowest;
  }
  for (int i = threadIdx.x; i < kTileKeys * Shape::kPieces; i += kTileThreads) {
    const int slot = i / Shape::kPieces, c = i % Shape::kPieces * 8;
    const int u = first + slot / kUnitTokens, t = slot % kUnitTokens;
    uint4 key = make_uint4(0, 0, 0, 0), value = key;
    if (u < end && c < a.head_dim) {
      const KvUnit unit = a.units[u];
      const SourceAtLayer source = a.sources.at[unit.source];
      if (source.read && t < unit.tokens) {
        const int64_t at =
            source.layer_offset + kv_head * source.head_stride + t * source.token_stride + c;
        key = LoadEightBf16(unit.base, source.dtype, at, a.head_dim - c, a.aligned);
        value = LoadEightBf16(unit.base, source.dtype, at + source.value_offset, a.head_dim - c,
                              a.aligned);
      }
    }
    *reinterpret_cast<uint4*>(keys + slot * Shape::kPitch + c) = key;
    *reinterpret_cast<uint4*>(values + slot * Shape::kPitch + c) = value;
  }
}

// False where no row up to context index `last` sees any of the units. The same for all threads.
__device__ __forceinline__ bool AnyVisible(const AttentionCall& a, int first, int end, int last) {
  for (int u = first; u < min(first + kUnitsPerTile, end); ++u) {
    const KvUnit unit = a.units[u];
    if (a.sources.at[unit.source].read && (unit.first == kFirstSeenByAll || unit.first <= last)) {
      return true;
    }
  }
  return false;
}

// The two neighbouring numbers of a C fragment, columns column and column + 1 of a head.
__device__ __forceinline__ void StorePair(const Tensor& to, int64_t at, int column, int head_dim,
                                          float x, float y) {
  if (column < head_dim) StoreOne(to.data, to.dtype, at + column, x);
  if (column + 1 < head_dim) StoreOne(to.data, to.dtype, at + column + 1, y);
}

}  // namespace memory3
