// What the memory server tells Prometheus. Names follow its conventions: base units, _total on
// counters.
//
// Thread-safety: all methods from any thread.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "memory_server/memory_store.h"

namespace memory3 {

class MemoryServerMetrics {
 public:
  explicit MemoryServerMetrics(MemoryStore* store);

  void CountRequest(const std::string& method, const absl::Status& status, absl::Duration took);
  // `unreadable`: records of the hits that could not be read.
  void CountRetrieve(uint64_t queries, uint64_t hits, uint64_t held_hits, uint64_t record_bytes,
                     uint64_t unreadable);
  void StreamOpened() { streams_.Increment(); }
  void StreamClosed() { streams_.Decrement(); }
  uint32_t open_streams() const { return static_cast<uint32_t>(streams_.Value()); }

  // In Prometheus' text format. The store's gauges (entries, records, disk and index bytes,
  // writable) are read when it is called.
  std::string Text() const;

 private:
  MemoryStore* const store_;
  prometheus::Registry registry_;
  prometheus::Family<prometheus::Counter>& requests_;
  prometheus::Family<prometheus::Histogram>& seconds_;
  prometheus::Counter& queries_;
  prometheus::Counter& hits_;
  prometheus::Counter& held_hits_;
  prometheus::Counter& record_bytes_;
  prometheus::Counter& unreadable_;
  prometheus::Gauge& streams_;
};

}  // namespace memory3
