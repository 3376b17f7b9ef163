#include "inference_server/device_slots.h"

#include "absl/strings/str_cat.h"

namespace memory3 {

DeviceSlots::DeviceSlots(MemoryPool* pool) : pool_(pool), slots_(pool->slots()) {}

absl::StatusOr<std::vector<DeviceSlots::Pinned>> DeviceSlots::Pin(
    std::span<const std::shared_ptr<const HostMemory>> memories) {
  ++clock_;
  std::vector<Pinned> result;
  const auto pin = [&](int slot, bool was_there) {
    if (slots_[slot].pins++ == 0) ++pinned_;
    slots_[slot].used = clock_;
    result.push_back({slot, was_there});
  };
  const auto undo = [&](absl::Status status) {
    for (const Pinned& p : result) {
      if (--slots_[p.slot].pins == 0) --pinned_;
    }
    return status;
  };
  for (const std::shared_ptr<const HostMemory>& memory : memories) {
    if (const auto here = where_.find(memory.get()); here != where_.end()) {
      pin(here->second, /*was_there=*/true);
      continue;
    }
    int oldest = -1;
    for (int s = 0; s < static_cast<int>(slots_.size()); ++s) {
      if (slots_[s].pins == 0 && (oldest < 0 || slots_[s].used < slots_[oldest].used)) oldest = s;
    }
    if (oldest < 0) {
      return undo(absl::ResourceExhaustedError(
          absl::StrCat("all ", slots_.size(), " memory slots of the device are being read")));
    }
    Slot& slot = slots_[oldest];
    if (slot.memory != nullptr) {
      where_.erase(slot.memory.get());
      slot.memory = nullptr;
      pool_->Unload(oldest);
    }
    absl::Status loaded =
        memory->codec() == nullptr
            ? pool_->Load(oldest, memory->memory())
            : pool_->LoadEncoded(oldest, memory->memory().shape, memory->codes(), *memory->codec());
    if (!loaded.ok()) return undo(std::move(loaded));
    slot.memory = memory;
    where_[memory.get()] = oldest;
    pin(oldest, /*was_there=*/false);
  }
  return result;
}

void DeviceSlots::Unpin(std::span<const int> slots) {
  for (const int slot : slots) {
    if (--slots_[slot].pins == 0) --pinned_;
  }
}

}  // namespace memory3
