// Which memory lies in which slot of the device's pool: a cache of decoded memories on the device,
// least recently used first out, shared by all sequences; slots that a sequence reads are pinned.
//
// Thread-safety: the engine's thread. Ownership: the pool must outlive it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "inference_server/memory_reader.h"
#include "transformer/memory_pool.h"

namespace memory3 {

class DeviceSlots {
 public:
  explicit DeviceSlots(MemoryPool* pool);

  struct Pinned {
    int slot = 0;
    bool was_there = false;  // nothing was loaded
  };
  // Pins a slot for each memory, loading those that are not there. All or none:
  // RESOURCE_EXHAUSTED where too many slots are pinned; errors of MemoryPool::Load. Memories are
  // told apart by their objects: two objects of one record take two slots.
  absl::StatusOr<std::vector<Pinned>> Pin(
      std::span<const std::shared_ptr<const HostMemory>> memories);
  // Takes back one pin of each. No forward pass may be reading them.
  void Unpin(std::span<const int> slots);

  int slots() const { return static_cast<int>(slots_.size()); }
  int pinned() const { return pinned_; }

 private:
  struct Slot {
    std::shared_ptr<const HostMemory> memory;  // keeps the address its own while it is here
    int pins = 0;
    uint64_t used = 0;
  };

  MemoryPool* const pool_;
  std::vector<Slot> slots_;
  absl::flat_hash_map<const HostMemory*, int> where_;
  uint64_t clock_ = 0;
  int pinned_ = 0;
};

}  // namespace memory3
