// memory3.v1.MemoryService over a MemoryStore. Retrieve runs on gRPC's callback threads and an
// executor (retrieve_stream.h), everything else on gRPC's own pool, one thread a call.
//
// Thread-safety: gRPC calls it from many threads. The store must outlive it.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"
#include "memory3/v1/memory.grpc.pb.h"
#include "memory_server/memory_store.h"
#include "memory_server/metrics.h"
#include "memory_server/retrieve_stream.h"
#include "serving/api_keys.h"

namespace memory3 {

class MemoryServiceImpl final
    : public v1::MemoryService::WithRawCallbackMethod_Retrieve<v1::MemoryService::Service> {
 public:
  // Without keys until SetApiKeys.
  MemoryServiceImpl(MemoryStore* store, MemoryServerMetrics* metrics,
                    const RetrieveOptionsOfServer& retrieve);

  void SetApiKeys(ApiKeys keys);
  // Refuses new calls with UNAVAILABLE, ends Retrieve streams between answers, and waits until
  // nothing runs any more or `timeout` is over.
  void Drain(absl::Duration timeout);

  grpc::Status CreateKnowledgeBase(grpc::ServerContext*, const v1::CreateKnowledgeBaseRequest*,
                                   v1::CreateKnowledgeBaseResponse*) override;
  grpc::Status GetKnowledgeBase(grpc::ServerContext*, const v1::GetKnowledgeBaseRequest*,
                                v1::GetKnowledgeBaseResponse*) override;
  grpc::Status ListKnowledgeBases(grpc::ServerContext*, const v1::ListKnowledgeBasesRequest*,
                                  v1::ListKnowledgeBasesResponse*) override;
  grpc::Status DeleteKnowledgeBase(grpc::ServerContext*, const v1::DeleteKnowledgeBaseRequest*,
                                   v1::DeleteKnowledgeBaseResponse*) override;
  grpc::Status SetAlias(grpc::ServerContext*, const v1::SetAliasRequest*,
                        v1::SetAliasResponse*) override;
  grpc::Status DeleteAlias(grpc::ServerContext*, const v1::DeleteAliasRequest*,
                           v1::DeleteAliasResponse*) override;
  grpc::Status ListAliases(grpc::ServerContext*, const v1::ListAliasesRequest*,
                           v1::ListAliasesResponse*) override;
  grpc::Status ListVersions(grpc::ServerContext*, const v1::ListVersionsRequest*,
                            v1::ListVersionsResponse*) override;
  grpc::Status Rollback(grpc::ServerContext*, const v1::RollbackRequest*,
                        v1::RollbackResponse*) override;
  grpc::Status DropVersion(grpc::ServerContext*, const v1::DropVersionRequest*,
                           v1::DropVersionResponse*) override;

  grpc::Status Put(grpc::ServerContext*, grpc::ServerReader<v1::PutRequest>*,
                   v1::PutResponse*) override;
  grpc::Status GetRecord(grpc::ServerContext*, const v1::GetRecordRequest*,
                         grpc::ServerWriter<v1::GetRecordResponse>*) override;
  grpc::Status DeleteRecords(grpc::ServerContext*, const v1::DeleteRecordsRequest*,
                             v1::DeleteRecordsResponse*) override;
  grpc::Status DeleteDocuments(grpc::ServerContext*, const v1::DeleteDocumentsRequest*,
                               v1::DeleteDocumentsResponse*) override;
  grpc::Status ListDocuments(grpc::ServerContext*, const v1::ListDocumentsRequest*,
                             v1::ListDocumentsResponse*) override;
  grpc::Status Count(grpc::ServerContext*, const v1::CountRequest*, v1::CountResponse*) override;

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Retrieve(
      grpc::CallbackServerContext*) override;

  grpc::Status BeginLoad(grpc::ServerContext*, const v1::BeginLoadRequest*,
                         v1::BeginLoadResponse*) override;
  grpc::Status PutLoad(grpc::ServerContext*, grpc::ServerReader<v1::PutRequest>*,
                       v1::PutLoadResponse*) override;
  grpc::Status ListLoadedDocuments(grpc::ServerContext*, const v1::ListLoadedDocumentsRequest*,
                                   v1::ListDocumentsResponse*) override;
  grpc::Status CommitLoad(grpc::ServerContext*, const v1::CommitLoadRequest*,
                          v1::CommitLoadResponse*) override;
  grpc::Status AbortLoad(grpc::ServerContext*, const v1::AbortLoadRequest*,
                         v1::AbortLoadResponse*) override;
  grpc::Status GetLoad(grpc::ServerContext*, const v1::GetLoadRequest*,
                       v1::GetLoadResponse*) override;
  grpc::Status ListLoads(grpc::ServerContext*, const v1::ListLoadsRequest*,
                         v1::ListLoadsResponse*) override;

  grpc::Status CreateSnapshot(grpc::ServerContext*, const v1::CreateSnapshotRequest*,
                              v1::CreateSnapshotResponse*) override;
  grpc::Status ListSnapshots(grpc::ServerContext*, const v1::ListSnapshotsRequest*,
                             v1::ListSnapshotsResponse*) override;
  grpc::Status RestoreSnapshot(grpc::ServerContext*, const v1::RestoreSnapshotRequest*,
                               v1::RestoreSnapshotResponse*) override;
  grpc::Status DeleteSnapshot(grpc::ServerContext*, const v1::DeleteSnapshotRequest*,
                              v1::DeleteSnapshotResponse*) override;
  grpc::Status CreateBackup(grpc::ServerContext*, const v1::CreateBackupRequest*,
                            v1::CreateBackupResponse*) override;
  grpc::Status RestoreBackup(grpc::ServerContext*, const v1::RestoreBackupRequest*,
                             v1::RestoreBackupResponse*) override;
  grpc::Status GetStatus(grpc::ServerContext*, const v1::GetStatusRequest*,
                         v1::GetStatusResponse*) override;

 private:
  using Body = absl::FunctionRef<absl::Status(const Identity&)>;

  absl::StatusOr<Identity> Authenticate(const grpc::ServerContextBase& context) const;
  // One call: identity, body, metrics; `took` where the response has it.
  template <typename Response>
  grpc::Status Serve(grpc::ServerContext* context, const char* method, Response* response,
                     Body body);
  // The right on what `kb` (a name or an alias) stands for.
  absl::Status Require(const Identity& identity, Right right, std::string_view kb) const;
  absl::Status RequireForLoad(const Identity& identity, const std::string& load_id) const;
  // Put and PutLoad: reads the stream into batches for `put`.
  absl::Status TakeEntries(const Identity& identity, grpc::ServerContext* context,
                           grpc::ServerReader<v1::PutRequest>* reader, bool into_load,
                           PutResult* result, std::string* load_id);

  MemoryStore* const store_;
  MemoryServerMetrics* const metrics_;
  const absl::Time started_at_ = absl::Now();
  mutable absl::Mutex mutex_;
  std::shared_ptr<const ApiKeys> keys_ ABSL_GUARDED_BY(mutex_);
  int running_ ABSL_GUARDED_BY(mutex_) = 0;  // calls, without Retrieve streams
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  RetrieveStreams streams_;
};

}  // namespace memory3
