// The client of memory3.v1.MemoryService that inference_server, trainer and cli use.
//
// Pooled channels, one deadline for every unary call, retries with back-off only of calls that are
// safe to repeat (reads, and changes that are idempotent by their request: BeginLoad, CommitLoad,
// AbortLoad, SetAlias, deletes). Streams of entries are not repeated; a load is resumed instead.
//
// Thread-safety: MemoryClient from any thread; a PutWriter by one thread; a RetrieveStream from
// any. Errors: those of memory.proto; UNAVAILABLE where the server cannot be reached,
// DEADLINE_EXCEEDED.
#pragma once

#include <grpcpp/channel.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "memory/record.h"
#include "memory3/v1/memory.grpc.pb.h"
#include "serving/credentials.h"

namespace memory3 {

struct MemoryClientOptions {
  std::string target;  // "localhost:7070"
  std::string api_key;
  ClientTls tls;
  int channels = 2;                            // TCP connections
  absl::Duration timeout = absl::Seconds(30);  // of a unary call, its retries included
  int attempts = 4;                            // of calls that are safe to repeat
};

// Sends entries into a knowledge base or a load, with the records cut into pieces.
class PutWriter {
 public:
  ~PutWriter();  // cancels, unless Finish was called
  // Blocks while the server does not keep up. An error means the stream has ended; Finish says why.
  // `entry.record` is empty; `record` too where the server is known to hold it.
  absl::Status Write(v1::Entry entry, std::string_view record);

 protected:
  explicit PutWriter(std::string_view api_key);
  virtual grpc::ClientWriter<v1::PutRequest>* writer() = 0;
  bool finished_ = false;
  std::unique_ptr<grpc::ClientContext> context_;
};
class KnowledgeBaseWriter final : public PutWriter {
 public:
  absl::StatusOr<v1::PutResponse> Finish();

 private:
  friend class MemoryClient;
  using PutWriter::PutWriter;
  grpc::ClientWriter<v1::PutRequest>* writer() override { return writer_.get(); }
  v1::PutResponse response_;
  std::unique_ptr<grpc::ClientWriter<v1::PutRequest>> writer_;
};
class LoadWriter final : public PutWriter {
 public:
  absl::StatusOr<v1::PutLoadResponse> Finish();

 private:
  friend class MemoryClient;
  using PutWriter::PutWriter;
  grpc::ClientWriter<v1::PutRequest>* writer() override { return writer_.get(); }
  v1::PutLoadResponse response_;
  std::unique_ptr<grpc::ClientWriter<v1::PutRequest>> writer_;
};

// One complete answer of Retrieve: the hits, and the records that came with them, checked
// (CheckRecord).
struct RetrieveAnswer {
  v1::RetrieveResponse hits;  // queries, version, took; without pieces and unreadable
  absl::flat_hash_map<RecordId, std::shared_ptr<const std::string>> records;
  // Of the hits' records those that the server could not read, or that came damaged (DATA_LOSS),
  // and why. The latter the server believes to be here: report them evicted.
  absl::flat_hash_map<RecordId, absl::Status> unreadable;
};

// One Retrieve stream. Requests are answered in order; several may be under way.
class RetrieveStream {
 public:
  using Callback = std::function<void(absl::StatusOr<RetrieveAnswer>)>;
  // An answer as far as it has come: its hits, with the first call, and records, of which those
  // named are new.
  using PartCallback =
      std::function<void(const RetrieveAnswer& so_far, const std::vector<RecordId>& fresh)>;

  ~RetrieveStream();  // ends the stream; callbacks under way get CANCELLED before it returns
  // `done` runs on the stream's reading thread, exactly once; it must not block for long, nor
  // destroy the stream. DATA_LOSS where the answer's messages do not fit together. After
  // UNAVAILABLE the stream is dead: open another (the server has forgotten what this client holds;
  // say so with `held`). `part`, where given, is told on the same thread of what comes before the
  // last message of the answer, whose parts are in it all the same.
  void Send(v1::RetrieveRequest request, Callback done, PartCallback part = nullptr);
  // Send, and wait for the answer.
  absl::StatusOr<RetrieveAnswer> Retrieve(v1::RetrieveRequest request);
  // Ends the stream without waiting: a Send that blocks returns, callbacks under way get CANCELLED.
  void Cancel() { context_->TryCancel(); }
  // What ended the stream; OK while it lives.
  absl::Status ended() const {
    absl::MutexLock lock(&mutex_);
    return ended_;
  }

 private:
  friend class MemoryClient;
  explicit RetrieveStream(std::string_view api_key);
  void Read();

  struct Pending {
    RetrieveAnswer answer;
    absl::flat_hash_map<RecordId, uint64_t> sizes;       // of the hits' records
    absl::flat_hash_map<RecordId, std::string> partial;  // not all here yet
    bool has_hits = false;
    Callback done;
    PartCallback part;
  };
  // What a message adds to the answer it belongs to; `head` is all of it but the pieces, `fresh`
  // what is now complete of its records. True: the answer is complete.
  static absl::StatusOr<bool> Add(v1::RetrieveResponse head, grpc::ByteBuffer* message,
                                  Pending& pending, std::vector<RecordId>* fresh);

  std::unique_ptr<grpc::ClientContext> context_;
  // Answers are parsed by retrieve_wire.h.
  std::unique_ptr<grpc::ClientReaderWriter<v1::RetrieveRequest, grpc::ByteBuffer>> stream_;
  absl::Mutex write_mutex_;  // one writer at a time, and requests in the order of their numbers
  mutable absl::Mutex mutex_;
  absl::Status ended_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  absl::flat_hash_map<uint64_t, Pending> pending_ ABSL_GUARDED_BY(mutex_);
  std::thread reader_;
};

class MemoryClient {
 public:
  // Connects lazily: a server that is not there yet is no error.
  static absl::StatusOr<std::unique_ptr<MemoryClient>> Create(MemoryClientOptions options);

  // Any unary method, e.g. Call(&MemoryClient::Stub::GetKnowledgeBase, request). It ends by
  // `deadline`, or by the client's time-out where that is sooner.
  using Stub = v1::MemoryService::Stub;
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request,
                                absl::Time deadline = absl::InfiniteFuture()) {
    Response response;
    absl::Status status = Attempt(IsSafeToRepeat(Request::descriptor()->name()), deadline,
                                  [&](Stub& stub, grpc::ClientContext* context) {
                                    return (stub.*method)(context, request, &response);
                                  });
    if (!status.ok()) return status;
    return response;
  }

  struct FetchedRecord {
    std::vector<v1::Source> sources;
    std::string record;  // checked
  };
  absl::StatusOr<FetchedRecord> GetRecord(const v1::GetRecordRequest& request);
  // Whether the published version has the record; its bytes stay where they are.
  absl::StatusOr<bool> HasRecord(const std::string& knowledge_base, const RecordId& id);
  std::unique_ptr<KnowledgeBaseWriter> Put(const std::string& knowledge_base, bool wait = true);
  std::unique_ptr<LoadWriter> PutLoad(const std::string& load_id);
  std::unique_ptr<RetrieveStream> OpenRetrieve();

 private:
  explicit MemoryClient(MemoryClientOptions options) : options_(std::move(options)) {}
  static bool IsSafeToRepeat(std::string_view request_type);
  absl::Status Attempt(bool repeat, absl::Time deadline,
                       const std::function<grpc::Status(Stub&, grpc::ClientContext*)>& call);
  Stub& NextStub() { return *stubs_[next_++ % stubs_.size()]; }

  const MemoryClientOptions options_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::vector<std::unique_ptr<Stub>> stubs_;  // one a channel
  std::atomic<size_t> next_ = 0;
};

}  // namespace memory3
