#include "inference_server/device_slots.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace memory3 {

DeviceSlots::DeviceSlots(MemoryPool* pool, std::function<void()> on_loaded)
    : pool_(pool), on_loaded_(std::move(on_loaded)), slots_(pool->slots()), loader_(1) {}

int DeviceSlots::Oldest() const {
  int oldest = -1;
  for (int s = 0; s < static_cast<int>(slots_.size()); ++s) {
    if (slots_[s].pins > 0 || slots_[s].state.load(std::memory_order_acquire) == State::kLoading)
      continue;
    if (oldest < 0 || slots_[s].used < slots_[oldest].used) oldest = s;
  }
  return oldest;
}

absl::StatusOr<std::vector<DeviceSlots::Pinned>> DeviceSlots::Pin(
    std::span<const std::shared_ptr<const HostMemory>> memories) {
  ++clock_;
  std::vector<Pinned> result;
  for (const std::shared_ptr<const HostMemory>& memory : memories) {
    const auto here = where_.find(memory.get());
    int s = here == where_.end() ? -1 : here->second;
    const bool was_there =
        s >= 0 && slots_[s].state.load(std::memory_order_acquire) != State::kFailed;
    // What failed is tried again in its slot.
    if (s < 0) s = Oldest();
    if (s < 0) {
      // What has been begun stays as a cache of what is wanted next.
      for (const Pinned& p : result) Unpin({&p.slot, 1});
      return absl::ResourceExhaustedError(
          absl::StrCat("all ", slots_.size(), " memory slots of the device are in use"));
    }
    Slot& slot = slots_[s];
    if (slot.pins++ == 0) ++pinned_;
    slot.used = clock_;
    result.push_back({s, was_there});
    if (was_there) continue;
    if (slot.memory != nullptr) where_.erase(slot.memory.get());
    slot.memory = memory;
    where_[memory.get()] = s;
    slot.state.store(State::kLoading, std::memory_order_release);
    loader_.Add([this, s, memory] {
      Slot& loading = slots_[s];
      loading.status =
          memory->codec() == nullptr
              ? pool_->Load(s, memory->memory())
              : pool_->LoadEncoded(s, memory->memory().shape, memory->codes(), *memory->codec());
      loading.state.store(loading.status.ok() ? State::kLoaded : State::kFailed,
                          std::memory_order_release);
      on_loaded_();
    });
  }
  return result;
}

void DeviceSlots::Unpin(std::span<const int> slots) {
  for (const int slot : slots) {
    if (--slots_[slot].pins == 0) --pinned_;
  }
}

absl::StatusOr<bool> DeviceSlots::Loaded(int slot) const {
  switch (slots_[slot].state.load(std::memory_order_acquire)) {
    case State::kLoaded:
      return true;
    case State::kFailed:
      return slots_[slot].status;
    default:
      return false;
  }
}

}  // namespace memory3
