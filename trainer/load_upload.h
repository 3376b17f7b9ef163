// Sends entries into a bulk load from a thread of its own, in their order, and outlives a server
// that goes away for a while: what is not acknowledged as synced is kept and sent again on the next
// connection. Entries of one document therefore arrive as a prefix of what was given, which is what
// a resumed run relies on.
//
// Thread-safety: Add and Finish by one thread, counts from any. The client must outlive it.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "memory_server/client.h"
#include "trainer/bounded_queue.h"

namespace memory3 {

// Whether an error may pass by itself: the server is away, restarts, or ended the connection.
bool MayPass(const absl::Status& status);

struct LoadEntry {
  v1::Entry entry;     // without the record
  std::string record;  // empty: the server has it
  int64_t bytes() const {
    return static_cast<int64_t>(record.size() + entry.source().text().size()) +
           4 * entry.embedding_size() + 512;
  }
};

class LoadUpload {
 public:
  struct Options {
    std::string load_id;
    absl::Duration patience = absl::Seconds(120);  // with a server that is away
    int64_t queue_bytes = int64_t{64} << 20;       // waiting to be sent
    int64_t unacknowledged_bytes = int64_t{64} << 20;
    absl::Duration unacknowledged_time = absl::Seconds(2);
  };

  LoadUpload(MemoryClient* client, Options options);
  ~LoadUpload();  // gives up what is not sent, unless Finish was called

  // Waits while the queue is full. After an error nothing is taken any more; Finish says which.
  bool Add(LoadEntry entry);
  // Waits until everything is acknowledged. Errors: the store's (NOT_FOUND: it has not a record
  // that was sent for one it has), UNAVAILABLE once patience is spent.
  absl::Status Finish();

  int64_t entries_acknowledged() const { return entries_; }
  int64_t bytes_acknowledged() const { return bytes_; }

 private:
  void Run();
  // One connection: sends what is unacknowledged, then more, until it is time for an answer.
  absl::Status SendSome();

  MemoryClient* const client_;
  const Options options_;
  BoundedQueue<LoadEntry> queue_;
  std::deque<LoadEntry> sent_;  // unacknowledged; of the thread
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> entries_ = 0, bytes_ = 0;
  absl::Status status_;  // of the thread, read after it has ended
  std::thread thread_;
};

}  // namespace memory3
