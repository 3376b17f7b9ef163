// The index of one version of a knowledge base while it changes: an immutable BaseIndex, a bitmap
// of what was deleted from it, and a small mutable tail of what was added since, scanned exactly.
//
// Thread-safety: Search, the counts and the description from any thread at any time, without
// waiting for writers; everything marked "writer" from one thread at a time (the store's write
// lock). A search sees each change made before it began. Readers of an old state keep it alive.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "memory_server/base_index.h"

namespace memory3 {

class VersionIndex {
 public:
  struct Addition {
    SlotKey key;
    std::vector<float> vector;
  };
  struct Candidate {
    SlotKey key;
    float score = 0;
    bool exact = false;  // else it is an estimate: score the stored vector
  };

  explicit VersionIndex(std::shared_ptr<const BaseIndex> base);
  VersionIndex(const VersionIndex&) = delete;
  VersionIndex& operator=(const VersionIndex&) = delete;

  // --- any thread ---
  // A search, and what it found.
  struct Lookup {
    const float* query = nullptr;
    size_t k = 0;
    // The best `k` live slots of the base and the best `k` of the tail, in no order.
    std::vector<Candidate> found;
    // Every live slot was among what it chose from and none was cut.
    bool all = false;
  };
  // Of one moment, in one pass over the vectors (BaseIndex::Search).
  void Search(std::span<Lookup> lookups) const;
  uint64_t records() const { return records_.load(std::memory_order_relaxed); }  // distinct, live
  uint64_t memory_bytes() const;
  std::string description() const;

  // --- writer --- A copy that changes by itself; the base is shared.
  std::shared_ptr<VersionIndex> Clone() const;
  // Records whose slots may differ from the base's, ascending.
  std::vector<RecordId> ChangedRecords() const;
  bool HasRecord(const RecordId& id) const;
  // The embeddings of one record that are live.
  std::vector<uint64_t> EmbeddingsOf(const RecordId& id) const;
  void Apply(std::vector<Addition> additions, const std::vector<SlotKey>& removals);
  // Tail slots and dead base slots: what the next fold gets rid of.
  uint64_t backlog() const;
  uint64_t base_size() const { return state_->base->size(); }

  // A fold: BeginFold gives the live keys; a new base is built of them elsewhere while changes go
  // on; FinishFold puts it in place and carries over what changed meanwhile. CancelFold forgets it.
  std::vector<SlotKey> BeginFold();
  void FinishFold(std::shared_ptr<const BaseIndex> base);
  void CancelFold();
  std::shared_ptr<const BaseIndex> base() const { return state_->base; }

 private:
  static constexpr uint32_t kChunk = 256;
  struct TailSlot {
    SlotKey key;
    std::atomic<bool> live{true};
  };
  struct TailChunk {
    std::unique_ptr<float[]> vectors;
    std::array<TailSlot, kChunk> slots;
  };
  // Grows by appending chunks; readers see slots below the published size.
  struct Tail {
    static constexpr uint32_t kMaxChunks = 1 << 16;
    std::unique_ptr<std::atomic<TailChunk*>[]> chunks {
      new std::atomic<TailChunk*>[ kMaxChunks ]()
    };
    std::atomic<uint32_t> size{0};
    ~Tail();
  };
  struct State {
    std::shared_ptr<const BaseIndex> base;
    std::unique_ptr<std::atomic<uint64_t>[]> dead;  // of the base's slots
    Tail tail;
  };
  struct Change {
    bool add;
    SlotKey key;
    std::vector<float> vector;  // of an addition
  };

  VersionIndex() = default;
  static std::shared_ptr<State> NewState(std::shared_ptr<const BaseIndex> base);
  std::shared_ptr<State> state() const;
  bool BaseLive(uint32_t slot) const;
  void AddOne(const SlotKey& key, const float* vector);
  void RemoveOne(const SlotKey& key);
  TailSlot& SlotAt(uint32_t i) const;
  const float* VectorAt(uint32_t i) const;

  mutable std::mutex state_mu_;  // guards the pointer only
  std::shared_ptr<State> state_;
  std::atomic<uint64_t> records_{0};
  // Writer only.
  absl::flat_hash_map<RecordId, std::vector<uint32_t>>
      tail_slots_;  // of each record, dead ones too
  uint64_t dead_base_ = 0;
  bool folding_ = false;
  std::vector<Change> since_fold_;
};

}  // namespace memory3
