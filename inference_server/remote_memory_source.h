// Memories from a memory server: one Retrieve stream for all bases, opened when it is first needed
// and again, with back-off, whenever it ends. The server remembers what the stream has received;
// what has been evicted here since is told with the next request, what is still here with the first
// request of a new stream.
//
// While the server cannot be reached, retrievals wait for it for `patience` from the moment it was
// lost; from then on they fail at once, but for one that tries again after each pause. A server
// that does not answer by a retrieval's deadline, or does not even read it, loses its stream too.
//
// Thread-safety: as MemorySource. Open and List are calls over the network and block for at most
// the client's time-out. Ownership: its bases must be gone before the source is.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/time/time.h"
#include "inference_server/memory_source.h"
#include "memory_server/client.h"

namespace memory3 {

struct RemoteMemoryOptions {
  MemoryClientOptions client;
  // The tenant that client.api_key stands for. Requests of others are PERMISSION_DENIED: one key
  // reads one tenant's knowledge bases.
  std::string tenant = "default";
  absl::Duration patience = absl::Seconds(5);
  absl::Duration first_pause = absl::Milliseconds(100);  // doubles up to longest_pause
  absl::Duration longest_pause = absl::Seconds(5);
};

class RemoteMemorySource final : public MemorySource {
 public:
  static absl::StatusOr<std::unique_ptr<RemoteMemorySource>> Create(RemoteMemoryOptions options,
                                                                    ReaderIdentity reader);
  // Retrievals under way get CANCELLED.
  ~RemoteMemorySource() override;

  // While the server cannot be reached, or has not answered for `patience`: what the name meant
  // last, where it is known. A server that has just failed to answer is not asked again before a
  // pause is over.
  absl::StatusOr<std::shared_ptr<MemoryBase>> Open(std::string_view tenant,
                                                   std::string_view knowledge_base,
                                                   absl::Time deadline) override;
  absl::StatusOr<std::vector<std::string>> List(std::string_view tenant) override;
  void Shutdown() override;

 private:
  class Base;
  struct Pending {
    v1::RetrieveRequest request;
    SourceCallback done;
    std::function<void(SourceAnswer)> part;
    bool told_hits = false;  // to `part`
    absl::Time deadline;
    bool sent = false;
    uint64_t generation = 0;  // of the stream it was sent on
  };

  RemoteMemorySource(RemoteMemoryOptions options, ReaderIdentity reader,
                     std::unique_ptr<MemoryClient> client);
  absl::Status CheckTenant(std::string_view tenant) const;
  // The server's answer about a base, unless it is known not to answer just now.
  absl::StatusOr<v1::GetKnowledgeBaseResponse> Ask(const v1::GetKnowledgeBaseRequest& request,
                                                   absl::Time deadline);
  void Retrieve(const Base& base, SourceRequest request, SourceCallback done);
  void Evicted(const RecordId& id);
  void Run();
  // Ends the stream of a write that blocks beyond a retrieval's deadline, or while shutting down.
  void WatchWrites();
  // The next three: mutex_ is held.
  bool Runnable() const;
  absl::Time NextEvent() const;
  // Takes the callbacks of what is past its deadline; says whether the stream owes one of them.
  bool TakeExpired(absl::Time now, std::vector<SourceCallback>* expired);
  void Answered(uint64_t number, uint64_t generation, absl::StatusOr<RetrieveAnswer> answer);
  void PartCame(uint64_t number, const RetrieveAnswer& so_far, const std::vector<RecordId>& fresh);

  const RemoteMemoryOptions options_;
  const ReaderIdentity reader_;
  const std::unique_ptr<MemoryClient> client_;
  std::unique_ptr<RetrieveStream> stream_;  // the thread's

  mutable std::mutex mutex_;  // guards what follows but the thread
  std::condition_variable changed_;
  bool ending_ = false;
  uint64_t next_number_ = 1;
  std::map<uint64_t, Pending> pending_;          // by order of arrival
  uint64_t generation_ = 0;                      // streams opened so far
  bool lost_ = true;                             // there is no stream to send on
  absl::Time lost_at_ = absl::InfiniteFuture();  // since when it failed
  absl::Time try_at_ = absl::InfinitePast();
  absl::Duration pause_;
  absl::flat_hash_set<RecordId> here_;  // received and not evicted
  std::vector<RecordId> evicted_;       // to be told
  // By the name asked for, alias or not: what it was when the server last said.
  absl::flat_hash_map<std::string, std::shared_ptr<Base>> last_known_;
  absl::Time ask_at_ = absl::InfinitePast();  // not before
  absl::Duration ask_pause_;                  // zero: the server answered last time
  RetrieveStream* writing_ = nullptr;         // what the thread is writing to
  std::thread thread_;
  std::thread watch_;
};

}  // namespace memory3
