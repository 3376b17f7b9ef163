// Which records one Retrieve stream has been sent and has not reported evicted, bounded: over
// `limit` the oldest is forgotten (and would be sent again).
//
// Thread-safety: one thread at a time.
#pragma once

#include <cstdint>
#include <deque>

#include "absl/container/flat_hash_map.h"
#include "memory/record.h"

namespace memory3 {

class HeldRecords {
 public:
  explicit HeldRecords(size_t limit) : limit_(limit) {}

  bool Contains(const RecordId& id) const { return held_.contains(id); }
  size_t size() const { return held_.size(); }

  void Insert(const RecordId& id) {
    if (!held_.try_emplace(id, next_).second) return;
    order_.push_back({id, next_++});
    while (held_.size() > limit_) ForgetOldest();
    // What was erased leaves its place in the queue behind; clear those once they are the most.
    if (order_.size() > 2 * limit_) {
      std::erase_if(order_, [this](const Place& place) { return !IsCurrent(place); });
    }
  }
  void Erase(const RecordId& id) { held_.erase(id); }

 private:
  struct Place {
    RecordId id;
    uint64_t number;
  };
  bool IsCurrent(const Place& place) const {
    const auto it = held_.find(place.id);
    return it != held_.end() && it->second == place.number;
  }
  void ForgetOldest() {
    while (!order_.empty()) {
      const Place place = order_.front();
      order_.pop_front();
      if (IsCurrent(place)) {
        held_.erase(place.id);
        return;
      }
    }
  }

  const size_t limit_;
  uint64_t next_ = 0;
  absl::flat_hash_map<RecordId, uint64_t> held_;
  std::deque<Place> order_;
};

}  // namespace memory3
