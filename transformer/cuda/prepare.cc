// CudaDevice::Prepare: the attention plan cut into units, items and tiles (plan.h), and one upload.

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "transformer/check.h"
#include "transformer/cuda/cuda_device.h"

namespace memory3 {
namespace {

static_assert(kFirstSeenByAll == KvBlock::kSeenByAll);

// Segments with so few rows go to the row kernel, which reads keys once for every row.
constexpr int kShortRows = 4;

struct Lists {
  std::vector<KvUnit> units;
  std::vector<AttentionItem> short_items, long_items;
  std::vector<QueryTile> tiles;
  std::vector<std::vector<KeyTile>> key_waves;
  std::vector<QuerySegment> segments;
  std::vector<int32_t> token_order;
  std::vector<TokenGroup> token_groups;
  bool aligned = true;
};

// Grids are a little larger than they must be, so that they change less often.
size_t Bucket(size_t n) { return n <= 64 ? n : (n + 63) / 64 * 64; }

template <typename T>
void Pad(std::vector<T>& list) {
  list.resize(Bucket(list.size()));
}

const void* TokenAt(const KvBlock& block, const KvSource& source, int token) {
  return static_cast<const char*>(block.base) + token * source.token_stride * SizeOf(source.dtype);
}

bool Aligned(const KvSource& source) {
  const int64_t elements = 16 / SizeOf(source.dtype);
  return source.layer_stride % elements == 0 && source.head_stride % elements == 0 &&
         source.token_stride % elements == 0 && source.value_offset % elements == 0;
}

// End of the units that context index `index` may see.
int LastUnit(const std::vector<KvUnit>& units, int begin, int end, int index) {
  while (end > begin && units[end - 1].first != kFirstSeenByAll && units[end - 1].first > index) {
    --end;
  }
  return end;
}

void CutSegments(const AttentionPlan& plan, Lists& lists) {
  for (const AttentionSegment& segment : plan.segments) {
    const int begin = static_cast<int>(lists.units.size());
    for (int i = segment.block_begin; i < segment.block_end; ++i) {
      const KvBlock& block = plan.blocks[plan.block_ids[i]];
      const KvSource& source = plan.sources[block.source];
      int tokens = block.tokens;
      if (block.first != KvBlock::kSeenByAll) {
        tokens = std::min(tokens, segment.first + segment.rows - block.first);
      }
      for (int token = 0; token < tokens; token += kUnitTokens) {
        KvUnit& unit = lists.units.emplace_back();
        unit.base = TokenAt(block, source, token);
        unit.source = block.source;
        unit.tokens = std::min(kUnitTokens, tokens - token);
        unit.first = block.first == KvBlock::kSeenByAll ? kFirstSeenByAll : block.first + token;
        lists.aligned = lists.aligned && reinterpret_cast<uintptr_t>(unit.base) % 16 == 0;
      }
    }
    const int end = static_cast<int>(lists.units.size());
    const bool is_short = segment.rows <= kShortRows;
    for (int i = 0; i < segment.rows; ++i) {
      const int index = segment.first + i;
      (is_short ? lists.short_items : lists.long_items)
          .push_back({segment.row + i, index, begin, LastUnit(lists.units, begin, end, index)});
    }
    if (is_short) continue;
    for (int i = 0; i < segment.rows; i += kTileRows) {
      const int tokens = std::min(kTileRows, segment.rows - i);
      const int index = segment.first + i;
      lists.tiles.push_back({segment.row + i, tokens, index, begin,
                             LastUnit(lists.units, begin, end, index + tokens - 1)});
    }
  }
}

// Which segments see each block that wants a gradient. Blocks that share a gradient are put into
// different waves: a wave is one launch, so no two blocks of it add to one number.
void CutBlocks(const AttentionPlan& plan, Lists& lists) {
  std::vector<std::vector<int>> seen_by(plan.blocks.size());
  for (size_t s = 0; s < plan.segments.size(); ++s) {
    const AttentionSegment& segment = plan.segments[s];
    for (int i = segment.block_begin; i < segment.block_end; ++i) {
      const int id = plan.block_ids[i];
      if (plan.blocks[id].gradient != nullptr) seen_by[id].push_back(static_cast<int>(s));
    }
  }
  absl::flat_hash_map<const float*, size_t> sharing;
  for (size_t id = 0; id < plan.blocks.size(); ++id) {
    if (seen_by[id].empty()) continue;
    const size_t wave = sharing[plan.blocks[id].gradient]++;
    if (wave == lists.key_waves.size()) lists.key_waves.emplace_back();
    const KvBlock& block = plan.blocks[id];
    const KvSource& source = plan.sources[block.source];
    const int begin = static_cast<int>(lists.segments.size());
    for (const int s : seen_by[id]) {
      const AttentionSegment& segment = plan.segments[s];
      lists.segments.push_back({segment.row, segment.rows, segment.first});
    }
    const int end = static_cast<int>(lists.segments.size());
    for (int token = 0; token < block.tokens; token += kTileKeys) {
      KeyTile& tile = lists.key_waves[wave].emplace_back();
      tile.base = TokenAt(block, source, token);
      tile.gradient = block.gradient + token * source.token_stride;
      tile.source = block.source;
      tile.tokens = std::min(kTileKeys, block.tokens - token);
      tile.first = block.first == KvBlock::kSeenByAll ? kFirstSeenByAll : block.first + token;
      tile.segment_begin = begin;
      tile.segment_end = end;
      lists.aligned = lists.aligned && reinterpret_cast<uintptr_t>(tile.base) % 16 == 0;
    }
  }
}

void GroupTokens(const std::vector<int32_t>& ids, Lists& lists) {
  std::vector<int32_t>& order = lists.token_order;
  order.resize(ids.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return ids[a] < ids[b]; });
  for (int i = 0; i < order.size(); ++i) {
    if (i == 0 || ids[order[i]] != ids[order[i - 1]]) {
      lists.token_groups.push_back({ids[order[i]], i, i});
    }
    lists.token_groups.back().end = i + 1;
  }
}

// FNV-1a over numbers.
class Signature {
 public:
  Signature& Add(uint64_t x) {
    for (int i = 0; i < 8; ++i) hash_ = (hash_ ^ (x >> (8 * i) & 0xff)) * 0x100000001b3;
    return *this;
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325;
};

}  // namespace

PreparedBatch* CudaDevice::Prepare(const BatchInput& input, int slot) {
  CHECK(slot >= 0);
  CHECK(!recording_);
  CHECK(input.positions.size() == input.token_ids.size() || input.positions.empty());
  CHECK(input.destination.size() == input.token_ids.size() || input.destination.empty());
  const AttentionPlan& plan = input.attention;
  CHECK(plan.sources.size() <= kMaxSources);
  Bind();
  if (slot >= prepared_.size()) prepared_.resize(slot + 1);
  if (prepared_[slot] == nullptr) prepared_[slot] = std::make_unique<CudaPreparedBatch>();
  CudaPreparedBatch& batch = *prepared_[slot];
  batch.slot = slot;
  batch.valid = false;
  batch.rows = static_cast<int>(input.token_ids.size());
  batch.logit_rows = static_cast<int>(input.logit_rows.size());
  batch.sources = plan.sources;
  batch.destination_source = input.destination_source;
  batch.has_positions = input.positions.size() == input.token_ids.size();
  CHECK(input.destination.empty() ||
        (input.destination_source >= 0 && input.destination_source < plan.sources.size()));
  for (const KvSource& source : plan.sources) {
    CHECK(source.dtype == DType::kF32 || source.dtype == DType::kBF16);
  }

  Lists lists;
  CutSegments(plan, lists);
  CutBlocks(plan, lists);
  GroupTokens(input.token_ids, lists);
  for (const KvSource& source : plan.sources) lists.aligned = lists.aligned && Aligned(source);
  batch.aligned = lists.aligned;

  Pad(lists.short_items);
  std::vector<AttentionItem>& items = lists.short_items;
  batch.short_items = static_cast<int>(items.size());
  items.insert(items.end(), lists.long_items.begin(), lists.long_items.end());
  Pad(items);
  batch.all_items = static_cast<int>(items.size());
  Pad(lists.tiles);
  batch.tile_count = static_cast<int>(lists.tiles.size());
  std::vector<KeyTile> key_tiles;
  batch.key_waves.clear();
  for (std::vector<KeyTile>& wave : lists.key_waves) {
    Pad(wave);
    batch.key_waves.emplace_back(key_tiles.size(), wave.size());
    key_tiles.insert(key_tiles.end(), wave.begin(), wave.end());
  }
  Pad(lists.token_groups);
  batch.token_group_count = static_cast<int>(lists.token_groups.size());

  // Each list has a place of its own in the slot's memory, whose size only grows: recorded graphs
  // hold the addresses.
  struct List {
    const void* data;
    size_t bytes;
    void (*place)(CudaPreparedBatch&, const void*);
  };
#define MEMORY3_LIST(list, member)                                                               \
  List {                                                                                         \
    (list).data(), (list).size() * sizeof((list)[0]), [](CudaPreparedBatch& b, const void* at) { \
      b.member = static_cast<decltype(b.member)>(const_cast<void*>(at));                         \
    }                                                                                            \
  }
  const List all[] = {MEMORY3_LIST(input.token_ids, token_ids),
                      MEMORY3_LIST(input.positions, positions),
                      MEMORY3_LIST(input.logit_rows, logit_row_ids),
                      MEMORY3_LIST(input.destination, destination),
                      MEMORY3_LIST(lists.units, units),
                      MEMORY3_LIST(items, items),
                      MEMORY3_LIST(lists.tiles, tiles),
                      MEMORY3_LIST(key_tiles, key_tiles),
                      MEMORY3_LIST(lists.segments, segments),
                      MEMORY3_LIST(lists.token_order, token_order),
                      MEMORY3_LIST(lists.token_groups, token_groups)};
#undef MEMORY3_LIST
  constexpr size_t kLists = std::size(all);
  batch.capacities.resize(kLists);
  size_t total = 0;
  for (size_t i = 0; i < kLists; ++i) {
    // Twice what is asked for, so that contexts double before a recording is made again.
    if (all[i].bytes > batch.capacities[i] || batch.capacities[i] == 0) {
      batch.capacities[i] = std::bit_ceil(std::max<size_t>(2 * all[i].bytes, 256));
    }
    total += batch.capacities[i];
  }
  if (total > batch.memory_bytes) {
    cudaFree(batch.memory);  // waits for the work that reads it
    batch.memory = nullptr;
    batch.memory_bytes = 0;
    ++generation_;
    const cudaError_t error = cudaMalloc(&batch.memory, 2 * total);
    if (error != cudaSuccess) {
      cudaGetLastError();
      batch.memory = nullptr;
      Note(error, "memory for a batch");
      return &batch;
    }
    batch.memory_bytes = 2 * total;
  }
  absl::StatusOr<void*> staged = staging_.Next(total);
  if (!staged.ok()) {
    Note(staged.status());
    return &batch;
  }
  size_t at = 0;
  for (size_t i = 0; i < kLists; ++i) {
    if (all[i].bytes > 0) std::memcpy(static_cast<char*>(*staged) + at, all[i].data, all[i].bytes);
    all[i].place(batch, static_cast<char*>(batch.memory) + at);
    at += batch.capacities[i];
  }
  if (input.destination.empty()) batch.destination = nullptr;
  absl::Status status = staging_.Send(batch.memory, total, stream_);
  if (!status.ok()) {
    Note(std::move(status));
    return &batch;
  }
  batch.valid = true;

  Signature signature;
  signature.Add(batch.rows).Add(batch.logit_rows).Add(batch.short_items).Add(batch.all_items);
  signature.Add(batch.tile_count).Add(batch.token_group_count).Add(batch.key_waves.size());
  for (const auto& [begin, count] : batch.key_waves) signature.Add(begin).Add(count);
  signature.Add(batch.aligned).Add(batch.destination_source).Add(input.destination.empty());
  signature.Add(reinterpret_cast<uintptr_t>(batch.memory));
  for (const size_t capacity : batch.capacities) signature.Add(capacity);
  for (const KvSource& s : batch.sources) {
    signature.Add(static_cast<uint64_t>(s.dtype)).Add(s.layer_stride).Add(s.head_stride);
    signature.Add(s.token_stride).Add(s.value_offset);
  }
  batch.signature = signature.value();
  return &batch;
}

}  // namespace memory3
