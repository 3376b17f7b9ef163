// What the CUDA kernels read of a batch: the attention plan, cut into pieces of fixed size on the
// host (CudaDevice::Prepare), so that a kernel finds its work without searching and a recorded
// graph stays valid while contexts grow.
//
// Plain structs in device memory. Lists that a launch's grid is sized by are padded with empty
// entries to the size the grid has.
#pragma once

#include <cstdint>

#include "transformer/tensor.h"

namespace memory3 {

// Keys are read in units: up to kUnitTokens tokens of one block.
inline constexpr int kUnitTokens = 16;
// Most query rows of one tile, and most keys of one key tile, of the tensor-core kernels.
inline constexpr int kTileRows = 64;
inline constexpr int kTileKeys = 64;
inline constexpr int kMaxSources = 8;
inline constexpr int kMaxHeadDim = 256;
// Largest head_dim the tensor-core attention kernels take.
inline constexpr int kMaxTileDim = 128;
// Same as KvBlock::kSeenByAll.
inline constexpr int kFirstSeenByAll = INT32_MIN;

struct KvUnit {
  const void* base = nullptr;  // of the unit's first token, layer 0, head 0
  int32_t source = 0;
  int32_t tokens = 0;
  int32_t first = 0;  // context index of the first token, or kFirstSeenByAll
  int32_t unused = 0;
};

// One query row. row < 0: padding.
struct AttentionItem {
  int32_t row = -1;
  int32_t index = 0;  // context index
  int32_t unit_begin = 0, unit_end = 0;
};

// Up to kTileRows query rows of one segment. tokens == 0: padding.
struct QueryTile {
  int32_t row = 0;
  int32_t tokens = 0;
  int32_t index = 0;  // context index of the first row
  int32_t unit_begin = 0, unit_end = 0;
};

// Query rows that see a key tile.
struct QuerySegment {
  int32_t row = 0, rows = 0;
  int32_t index = 0;  // context index of the first row
};

// Up to kTileKeys tokens of one block whose gradient is wanted. tokens == 0: padding.
struct KeyTile {
  const void* base = nullptr;
  float* gradient = nullptr;
  int32_t source = 0;
  int32_t tokens = 0;
  int32_t first = 0;
  int32_t segment_begin = 0, segment_end = 0;  // range of the list of QuerySegment
  int32_t unused = 0;
};

// Rows that hold one token id, for the embedding's gradient: [begin, end) of a list of rows.
struct TokenGroup {
  int32_t token = 0;
  int32_t begin = 0, end = 0;  // empty: padding
};

// As ReferenceRows and AttentionShape of device.h, which kernels, C++17, cannot include.
struct ReferenceRange {
  int32_t row = 0;
  int32_t tokens = 0;
};
struct HeadShape {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
};

// The sources of a plan at one layer. Strides in elements.
struct SourceAtLayer {
  int64_t layer_offset = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t value_offset = 0;
  DType dtype = DType::kF32;
  bool read = false;  // false: not read at this layer
};
struct Sources {
  SourceAtLayer at[kMaxSources];
};

}  // namespace memory3
