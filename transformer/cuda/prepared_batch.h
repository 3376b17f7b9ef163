// A BatchInput as the CUDA kernels read it. See plan.h for the lists.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "transformer/cuda/plan.h"
#include "transformer/device.h"

namespace memory3 {

struct CudaPreparedBatch final : PreparedBatch {
  int slot = 0;
  // Stands for everything a launch depends on but the lists' contents.
  uint64_t signature = 0;
  bool valid = false;  // false: an error was noted, the lists are not there

  // The lists in device memory.
  const int32_t* token_ids = nullptr;      // [rows]
  const int32_t* positions = nullptr;      // [rows]
  const int32_t* logit_row_ids = nullptr;  // [logit_rows]
  void* const* destination = nullptr;      // [rows], null: nothing is kept
  const KvUnit* units = nullptr;
  const AttentionItem* items = nullptr;  // rows of short segments first, then all others
  const QueryTile* tiles = nullptr;      // of long segments
  const KeyTile* key_tiles = nullptr;
  const QuerySegment* segments = nullptr;
  const int32_t* token_order = nullptr;  // [rows], rows by token id
  const TokenGroup* token_groups = nullptr;

  // Lengths, padding included.
  int short_items = 0;
  int all_items = 0;
  int tile_count = 0;
  int token_group_count = 0;
  // Runs of key_tiles, first and count, one launch each: blocks whose gradients share memory are in
  // different runs.
  std::vector<std::pair<int, int>> key_waves;

  std::vector<KvSource> sources;
  int destination_source = 0;
  bool has_positions = false;
  // Keys and values of every block can be read 16 bytes at a time where 8 divides head_dim.
  bool aligned = false;

  void* memory = nullptr;  // holds the lists
  size_t memory_bytes = 0;
  std::vector<size_t> capacities;  // bytes of each list's place; they only grow
};

}  // namespace memory3
