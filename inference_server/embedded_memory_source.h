// Memories from a store in this process: one binary, no network.
//
// Thread-safety: as MemorySource. Open reads the store's catalogue in the calling thread; searches
// and reads run on `threads` threads of the source's own. Ownership: the store must outlive the
// source; the source's bases must be gone before it is.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "inference_server/memory_source.h"
#include "inference_server/worker_threads.h"
#include "memory_server/memory_store.h"

namespace memory3 {

class EmbeddedMemorySource final : public MemorySource {
 public:
  EmbeddedMemorySource(MemoryStore* store, ReaderIdentity reader);
  // Retrievals under way are answered first.
  ~EmbeddedMemorySource() override = default;

  absl::StatusOr<std::shared_ptr<MemoryBase>> Open(std::string_view tenant,
                                                   std::string_view knowledge_base,
                                                   absl::Time deadline) override;
  absl::StatusOr<std::vector<std::string>> List(std::string_view tenant) override;

 private:
  class Base;

  MemoryStore* const store_;
  const ReaderIdentity reader_;
  std::mutex mutex_;
  // The base last opened of each (tenant, name), so that requests share what it knows to be here.
  absl::flat_hash_map<std::pair<std::string, std::string>, std::weak_ptr<Base>> bases_;
  WorkerThreads worker_;  // one thread: answers keep the order of requests
};

}  // namespace memory3
