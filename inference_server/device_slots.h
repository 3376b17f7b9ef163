// Which memory lies in which slot of the device's pool: a cache of decoded memories on the device,
// least recently used first out, shared by all sequences; slots that a sequence holds are pinned.
//
// Memories are copied into their slots by a thread of its own, beside the forward passes: Pin only
// chooses the slots, and what it pinned may be read once loaded() says so.
//
// Thread-safety: the engine's thread. `on_loaded` is called on the loading thread, after each load.
// Ownership: the pool must outlive it; the destructor waits for loads under way.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "inference_server/memory_reader.h"
#include "inference_server/worker_threads.h"
#include "transformer/memory_pool.h"

namespace memory3 {

class DeviceSlots {
 public:
  DeviceSlots(MemoryPool* pool, std::function<void()> on_loaded);

  struct Pinned {
    int slot = 0;
    bool was_there = false;  // or already on its way: nothing was begun
  };
  // Pins a slot for each memory and begins to load those that are not there. All or none:
  // RESOURCE_EXHAUSTED where too many slots are pinned or still being loaded. Memories are told
  // apart by their objects: two objects of one record take two slots.
  absl::StatusOr<std::vector<Pinned>> Pin(
      std::span<const std::shared_ptr<const HostMemory>> memories);
  // Takes back one pin of each. No forward pass may be reading them; a load may be under way.
  void Unpin(std::span<const int> slots);
  // Whether the slot can be read. An error is the load's (MemoryPool::Load).
  absl::StatusOr<bool> Loaded(int slot) const;

  int slots() const { return static_cast<int>(slots_.size()); }
  int pinned() const { return pinned_; }

 private:
  enum class State : uint8_t { kEmpty, kLoading, kLoaded, kFailed };
  struct Slot {
    std::shared_ptr<const HostMemory> memory;  // keeps the address its own while it is here
    int pins = 0;
    uint64_t used = 0;
    absl::Status status;  // the loading thread's while kLoading
    std::atomic<State> state = State::kEmpty;
  };
  // The slot to load into next; -1: none can be taken.
  int Oldest() const;

  MemoryPool* const pool_;
  const std::function<void()> on_loaded_;
  std::vector<Slot> slots_;
  absl::flat_hash_map<const HostMemory*, int> where_;
  uint64_t clock_ = 0;
  int pinned_ = 0;
  WorkerThreads loader_;  // last: it ends before the rest goes
};

}  // namespace memory3
