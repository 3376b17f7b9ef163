// The server's side of Retrieve (proto/memory3/v1/memory.proto): one reactor a stream. A stream has
// one request in work at a time; what the client sends meanwhile waits in the transport, so that a
// client that does not read its answers stops only itself.
//
// Thread-safety: RetrieveStreams from any thread.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <deque>
#include <memory>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "memory_server/executor.h"
#include "memory_server/memory_store.h"
#include "memory_server/metrics.h"
#include "serving/api_keys.h"

namespace memory3 {

struct RetrieveOptionsOfServer {
  size_t held_limit = 262'144;  // records remembered per stream, about 80 bytes each
  size_t max_streams = 4096;
  int search_threads = 0;  // 0: one per core
};

// All open streams of a server.
class RetrieveStreams {
 public:
  RetrieveStreams(MemoryStore* store, MemoryServerMetrics* metrics,
                  const RetrieveOptionsOfServer& options);
  ~RetrieveStreams();

  // A new stream of `identity`; gRPC owns the reactor. An error becomes the stream's status.
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Open(
      absl::StatusOr<Identity> identity);
  // Refuses new streams, ends idle ones with UNAVAILABLE, the others after the answer they are at,
  // and waits for that until `deadline`.
  void Drain(absl::Time deadline);

 private:
  class Stream;

  // The stream has a request to be answered. Requests that wait at the same time and ask the same
  // version share a pass over its index.
  void SearchSoon(Stream* stream);
  void QueueSearch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(asked_mutex_);
  void SearchSome();

  MemoryStore* const store_;
  MemoryServerMetrics* const metrics_;
  const RetrieveOptionsOfServer options_;
  absl::Mutex mutex_;
  absl::flat_hash_set<Stream*> open_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Mutex asked_mutex_;
  std::deque<Stream*> asked_ ABSL_GUARDED_BY(asked_mutex_);
  bool search_queued_ ABSL_GUARDED_BY(asked_mutex_) = false;
  const size_t threads_;
  Executor executor_;  // last: its threads end before the rest goes
};

}  // namespace memory3
