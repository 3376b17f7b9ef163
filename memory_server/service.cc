#include "memory_server/service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "memory_server/conversions.h"
#include "memory_server/put_stream.h"
#include "memory_server/retrieve_wire.h"
#include "serving/status.h"

namespace memory3 {

MemoryServiceImpl::MemoryServiceImpl(MemoryStore* store, MemoryServerMetrics* metrics,
                                     const RetrieveOptionsOfServer& retrieve)
    : store_(store),
      metrics_(metrics),
      keys_(std::make_shared<const ApiKeys>()),
      streams_(store, metrics, retrieve) {}

void MemoryServiceImpl::SetApiKeys(ApiKeys keys) {
  auto next = std::make_shared<const ApiKeys>(std::move(keys));
  absl::MutexLock lock(&mutex_);
  keys_ = std::move(next);
}

void MemoryServiceImpl::Drain(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return running_ == 0; };
    mutex_.AwaitWithDeadline(absl::Condition(&idle), deadline);
  }
  streams_.Drain(deadline);
}

// ---- what every call has in common ----

absl::StatusOr<Identity> MemoryServiceImpl::Authenticate(
    const grpc::ServerContextBase& context) const {
  std::shared_ptr<const ApiKeys> keys;
  {
    absl::MutexLock lock(&mutex_);
    keys = keys_;
  }
  const auto header = context.client_metadata().find("authorization");
  if (header == context.client_metadata().end()) return keys->Authenticate("");
  return keys->Authenticate({header->second.data(), header->second.size()});
}

template <typename Response>
grpc::Status MemoryServiceImpl::Serve(grpc::ServerContext* context, const char* method,
                                      Response* response, Body body) {
  const absl::Time begun = absl::Now();
  absl::StatusOr<Identity> identity = Authenticate(*context);
  {
    absl::MutexLock lock(&mutex_);
    if (draining_) identity = absl::UnavailableError("the server is shutting down");
    ++running_;
  }
  const absl::Status status = identity.ok() ? body(*identity) : identity.status();
  {
    absl::MutexLock lock(&mutex_);
    --running_;
  }
  const absl::Duration took = absl::Now() - begun;
  if constexpr (requires { response->mutable_took(); }) *response->mutable_took() = ToProto(took);
  metrics_->CountRequest(method, status, took);
  return ToGrpc(status);
}

absl::Status MemoryServiceImpl::Require(const Identity& identity, Right right,
                                        std::string_view kb) const {
  if (identity.rights.size() == 1 && identity.RightOn("*") >= right) return absl::OkStatus();
  // Rights belong to knowledge bases: an alias grants what its target does.
  const absl::StatusOr<std::shared_ptr<const VersionPin>> pin =
      store_->Pin(identity.tenant, kb, std::nullopt);
  return identity.Require(right, pin.ok() ? std::string_view((*pin)->knowledge_base()) : kb);
}

absl::Status MemoryServiceImpl::RequireForLoad(const Identity& identity,
                                               const std::string& load_id) const {
  const absl::StatusOr<LoadInfo> load = store_->GetLoad(identity.tenant, load_id);
  if (!load.ok()) return load.status();
  return identity.Require(Right::kWrite, load->knowledge_base);
}

namespace {

// Copies a store's answer into a field of the response.
template <typename T, typename Field>
absl::Status Fill(const absl::StatusOr<T>& result, Field* field) {
  if (!result.ok()) return result.status();
  *field = ToProto(*result);
  return absl::OkStatus();
}
template <typename T, typename Repeated>
absl::Status FillAll(const absl::StatusOr<std::vector<T>>& result, Repeated* repeated) {
  if (!result.ok()) return result.status();
  for (const T& item : *result) *repeated->Add() = ToProto(item);
  return absl::OkStatus();
}

absl::Status FillPage(const absl::StatusOr<DocumentPage>& page,
                      v1::ListDocumentsResponse* response) {
  if (!page.ok()) return page.status();
  for (const DocumentInfo& document : page->documents)
    *response->add_documents() = ToProto(document);
  response->set_next_page_token(page->next_page_token);
  return absl::OkStatus();
}

#define RETURN_IF_ERROR(expression)                                         \
  do {                                                                      \
    if (absl::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

}  // namespace

// ---- knowledge bases ----

grpc::Status MemoryServiceImpl::CreateKnowledgeBase(grpc::ServerContext* context,
                                                    const v1::CreateKnowledgeBaseRequest* request,
                                                    v1::CreateKnowledgeBaseResponse* response) {
  return Serve(context, "CreateKnowledgeBase", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.Require(Right::kAdmin, request->spec().name()));
    const absl::StatusOr<KnowledgeBaseSpec> spec = FromProto(request->spec());
    if (!spec.ok()) return spec.status();
    return Fill(store_->CreateKnowledgeBase(who.tenant, *spec, request->if_not_exists()),
                response->mutable_knowledge_base());
  });
}

grpc::Status MemoryServiceImpl::GetKnowledgeBase(grpc::ServerContext* context,
                                                 const v1::GetKnowledgeBaseRequest* request,
                                                 v1::GetKnowledgeBaseResponse* response) {
  return Serve(context, "GetKnowledgeBase", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kRead, request->knowledge_base()));
    return Fill(
        store_->GetKnowledgeBase(who.tenant, request->knowledge_base(), request->with_codebook()),
        response->mutable_knowledge_base());
  });
}

grpc::Status MemoryServiceImpl::ListKnowledgeBases(grpc::ServerContext* context,
                                                   const v1::ListKnowledgeBasesRequest* /*request*/,
                                                   v1::ListKnowledgeBasesResponse* response) {
  return Serve(context, "ListKnowledgeBases", response, [&](const Identity& who) -> absl::Status {
    const absl::StatusOr<std::vector<KnowledgeBaseInfo>> all =
        store_->ListKnowledgeBases(who.tenant);
    if (!all.ok()) return all.status();
    for (const KnowledgeBaseInfo& info : *all) {
      if (who.RightOn(info.spec.name) >= Right::kRead)
        *response->add_knowledge_bases() = ToProto(info);
    }
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::DeleteKnowledgeBase(grpc::ServerContext* context,
                                                    const v1::DeleteKnowledgeBaseRequest* request,
                                                    v1::DeleteKnowledgeBaseResponse* response) {
  return Serve(context, "DeleteKnowledgeBase", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kAdmin, request->knowledge_base()));
    return store_->DeleteKnowledgeBase(who.tenant, request->knowledge_base());
  });
}

grpc::Status MemoryServiceImpl::SetAlias(grpc::ServerContext* context,
                                         const v1::SetAliasRequest* request,
                                         v1::SetAliasResponse* response) {
  return Serve(context, "SetAlias", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.Require(Right::kAdmin, request->alias()));
    RETURN_IF_ERROR(Require(who, Right::kAdmin, request->knowledge_base()));
    absl::StatusOr<std::string> previous =
        store_->SetAlias(who.tenant, request->alias(), request->knowledge_base());
    if (!previous.ok()) return previous.status();
    response->set_previous(*std::move(previous));
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::DeleteAlias(grpc::ServerContext* context,
                                            const v1::DeleteAliasRequest* request,
                                            v1::DeleteAliasResponse* response) {
  return Serve(context, "DeleteAlias", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.Require(Right::kAdmin, request->alias()));
    return store_->DeleteAlias(who.tenant, request->alias());
  });
}

grpc::Status MemoryServiceImpl::ListAliases(grpc::ServerContext* context,
                                            const v1::ListAliasesRequest* /*request*/,
                                            v1::ListAliasesResponse* response) {
  return Serve(context, "ListAliases", response, [&](const Identity& who) -> absl::Status {
    const absl::StatusOr<std::map<std::string, std::string>> aliases =
        store_->ListAliases(who.tenant);
    if (!aliases.ok()) return aliases.status();
    for (const auto& [alias, name] : *aliases) {
      if (who.RightOn(name) >= Right::kRead) (*response->mutable_aliases())[alias] = name;
    }
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::ListVersions(grpc::ServerContext* context,
                                             const v1::ListVersionsRequest* request,
                                             v1::ListVersionsResponse* response) {
  return Serve(context, "ListVersions", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kRead, request->knowledge_base()));
    return FillAll(store_->ListVersions(who.tenant, request->knowledge_base()),
                   response->mutable_versions());
  });
}

grpc::Status MemoryServiceImpl::Rollback(grpc::ServerContext* context,
                                         const v1::RollbackRequest* request,
                                         v1::RollbackResponse* response) {
  return Serve(context, "Rollback", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kAdmin, request->knowledge_base()));
    std::optional<uint64_t> version;
    if (request->has_version()) version = request->version();
    const absl::StatusOr<uint64_t> published =
        store_->Rollback(who.tenant, request->knowledge_base(), version);
    if (!published.ok()) return published.status();
    response->set_version(*published);
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::DropVersion(grpc::ServerContext* context,
                                            const v1::DropVersionRequest* request,
                                            v1::DropVersionResponse* response) {
  return Serve(context, "DropVersion", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kAdmin, request->knowledge_base()));
    return store_->DropVersion(who.tenant, request->knowledge_base(), request->version());
  });
}

// ---- memories ----

absl::Status MemoryServiceImpl::TakeEntries(const Identity& who, grpc::ServerContext* context,
                                            grpc::ServerReader<v1::PutRequest>* reader,
                                            bool into_load, PutResult* result,
                                            std::string* load_id) {
  v1::PutRequest message;
  if (!reader->Read(&message))
    return absl::InvalidArgumentError("the stream is empty: `header` comes first");
  if (!message.has_header())
    return absl::InvalidArgumentError("the first message must be `header`");
  const v1::PutRequest::Header header = message.header();
  if (into_load) {
    if (!header.knowledge_base().empty()) {
      return absl::InvalidArgumentError(
          "header.knowledge_base must be empty for PutLoad: the load has one");
    }
    RETURN_IF_ERROR(RequireForLoad(who, header.load_id()));
  } else {
    if (!header.load_id().empty()) {
      return absl::InvalidArgumentError("header.load_id must be empty for Put: use PutLoad");
    }
    RETURN_IF_ERROR(Require(who, Right::kWrite, header.knowledge_base()));
  }
  *load_id = header.load_id();
  const bool wait = !header.has_wait() || header.wait();
  std::unique_ptr<LoadPutter> putter;
  if (into_load) {
    absl::StatusOr<std::unique_ptr<LoadPutter>> opened =
        store_->OpenLoadPutter(who.tenant, header.load_id());
    if (!opened.ok()) return opened.status();
    putter = *std::move(opened);
  }
  PutStream stream([&](std::shared_ptr<const std::vector<NewEntry>> entries) -> absl::Status {
    if (putter != nullptr) return putter->Put(std::move(entries));
    const absl::StatusOr<PutResult> put =
        store_->Put(who.tenant, header.knowledge_base(), *entries, /*wait=*/false);
    if (!put.ok()) return put.status();
    result->entries += put->entries;
    result->new_records += put->new_records;
    return absl::OkStatus();
  });
  while (reader->Read(&message)) RETURN_IF_ERROR(stream.Take(message));
  // Not the end of the stream but of its client: what waits for a full batch is not put any more.
  if (context->IsCancelled()) return absl::CancelledError("the client went away");
  RETURN_IF_ERROR(stream.Finish());
  if (putter == nullptr) return wait ? store_->Sync() : absl::OkStatus();
  const absl::StatusOr<PutResult> put = putter->Finish(wait);
  if (put.ok()) *result = *put;
  return put.status();
}

grpc::Status MemoryServiceImpl::Put(grpc::ServerContext* context,
                                    grpc::ServerReader<v1::PutRequest>* reader,
                                    v1::PutResponse* response) {
  return Serve(context, "Put", response, [&](const Identity& who) -> absl::Status {
    PutResult result;
    std::string load_id;
    const absl::Status status =
        TakeEntries(who, context, reader, /*into_load=*/false, &result, &load_id);
    if (context->IsCancelled()) return absl::CancelledError("the client went away");
    response->set_entries(result.entries);
    response->set_new_records(result.new_records);
    return status;
  });
}

grpc::Status MemoryServiceImpl::GetRecord(grpc::ServerContext* context,
                                          const v1::GetRecordRequest* request,
                                          grpc::ServerWriter<v1::GetRecordResponse>* writer) {
  v1::GetRecordResponse head;
  return Serve(context, "GetRecord", &head, [&](const Identity& who) -> absl::Status {
    const absl::Time begun = absl::Now();
    RETURN_IF_ERROR(Require(who, Right::kRead, request->knowledge_base()));
    const absl::StatusOr<RecordId> id = RecordIdFromProto(request->record_id(), "record_id");
    if (!id.ok()) return id.status();
    const absl::StatusOr<StoredRecord> stored =
        store_->GetRecord(who.tenant, request->knowledge_base(), *id, request->with_text());
    if (!stored.ok()) return stored.status();
    for (const Source& source : stored->sources) *head.add_sources() = ToProto(source);
    const std::string_view record = stored->record.bytes;
    head.set_record_bytes(record.size());
    *head.mutable_took() = ToProto(absl::Now() - begun);
    for (size_t at = 0; at < record.size(); at += kMaxPieceBytes) {
      head.set_record_piece(std::string(record.substr(at, kMaxPieceBytes)));
      if (!writer->Write(head)) return absl::CancelledError("the client went away");
      head.Clear();
    }
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::DeleteRecords(grpc::ServerContext* context,
                                              const v1::DeleteRecordsRequest* request,
                                              v1::DeleteRecordsResponse* response) {
  return Serve(context, "DeleteRecords", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kWrite, request->knowledge_base()));
    std::vector<RecordId> ids;
    for (int i = 0; i < request->record_ids_size(); ++i) {
      const absl::StatusOr<RecordId> id =
          RecordIdFromProto(request->record_ids(i), absl::StrCat("record_ids[", i, "]"));
      if (!id.ok()) return id.status();
      ids.push_back(*id);
    }
    const absl::StatusOr<DeleteResult> deleted =
        store_->DeleteRecords(who.tenant, request->knowledge_base(), ids);
    if (!deleted.ok()) return deleted.status();
    response->set_deleted_entries(deleted->entries);
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::DeleteDocuments(grpc::ServerContext* context,
                                                const v1::DeleteDocumentsRequest* request,
                                                v1::DeleteDocumentsResponse* response) {
  return Serve(context, "DeleteDocuments", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kWrite, request->knowledge_base()));
    const std::vector<std::string> ids(request->document_ids().begin(),
                                       request->document_ids().end());
    const absl::StatusOr<DeleteResult> deleted =
        store_->DeleteDocuments(who.tenant, request->knowledge_base(), ids);
    if (!deleted.ok()) return deleted.status();
    response->set_deleted_entries(deleted->entries);
    response->set_deleted_records(deleted->records);
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::ListDocuments(grpc::ServerContext* context,
                                              const v1::ListDocumentsRequest* request,
                                              v1::ListDocumentsResponse* response) {
  return Serve(context, "ListDocuments", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kRead, request->knowledge_base()));
    return FillPage(store_->ListDocuments(who.tenant, request->knowledge_base(),
                                          request->page_size(), request->page_token()),
                    response);
  });
}

grpc::Status MemoryServiceImpl::Count(grpc::ServerContext* context, const v1::CountRequest* request,
                                      v1::CountResponse* response) {
  return Serve(context, "Count", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kRead, request->knowledge_base()));
    const absl::StatusOr<Counts> counts = store_->Count(who.tenant, request->knowledge_base());
    if (!counts.ok()) return counts.status();
    response->set_entries(counts->entries);
    response->set_records(counts->records);
    response->set_documents(counts->documents);
    return absl::OkStatus();
  });
}

// ---- retrieval ----

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* MemoryServiceImpl::Retrieve(
    grpc::CallbackServerContext* context) {
  return streams_.Open(Authenticate(*context));
}

// ---- bulk load ----

grpc::Status MemoryServiceImpl::BeginLoad(grpc::ServerContext* context,
                                          const v1::BeginLoadRequest* request,
                                          v1::BeginLoadResponse* response) {
  return Serve(context, "BeginLoad", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(Require(who, Right::kWrite, request->knowledge_base()));
    if (!v1::LoadMode_IsValid(request->mode())) {
      return absl::InvalidArgumentError(
          absl::StrCat("mode must be append or replace, not ", static_cast<int>(request->mode())));
    }
    std::optional<uint64_t> expected;
    if (request->has_expected_entries()) expected = request->expected_entries();
    const absl::StatusOr<BeginLoadResult> begun = store_->BeginLoad(
        who.tenant, request->knowledge_base(), request->idempotency_key(),
        request->mode() == v1::LOAD_MODE_REPLACE ? LoadMode::kReplace : LoadMode::kAppend,
        expected);
    if (!begun.ok()) return begun.status();
    *response->mutable_load() = ToProto(begun->load);
    response->set_resumed(begun->resumed);
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::PutLoad(grpc::ServerContext* context,
                                        grpc::ServerReader<v1::PutRequest>* reader,
                                        v1::PutLoadResponse* response) {
  return Serve(context, "PutLoad", response, [&](const Identity& who) -> absl::Status {
    PutResult result;
    std::string load_id;
    RETURN_IF_ERROR(TakeEntries(who, context, reader, /*into_load=*/true, &result, &load_id));
    if (context->IsCancelled()) return absl::CancelledError("the client went away");
    return Fill(store_->GetLoad(who.tenant, load_id), response->mutable_load());
  });
}

grpc::Status MemoryServiceImpl::ListLoadedDocuments(grpc::ServerContext* context,
                                                    const v1::ListLoadedDocumentsRequest* request,
                                                    v1::ListDocumentsResponse* response) {
  return Serve(context, "ListLoadedDocuments", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(RequireForLoad(who, request->load_id()));
    return FillPage(store_->ListLoadedDocuments(who.tenant, request->load_id(),
                                                request->page_size(), request->page_token()),
                    response);
  });
}

grpc::Status MemoryServiceImpl::CommitLoad(grpc::ServerContext* context,
                                           const v1::CommitLoadRequest* request,
                                           v1::CommitLoadResponse* response) {
  return Serve(context, "CommitLoad", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(RequireForLoad(who, request->load_id()));
    return Fill(store_->CommitLoad(who.tenant, request->load_id(), request->wait()),
                response->mutable_load());
  });
}

grpc::Status MemoryServiceImpl::AbortLoad(grpc::ServerContext* context,
                                          const v1::AbortLoadRequest* request,
                                          v1::AbortLoadResponse* response) {
  return Serve(context, "AbortLoad", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(RequireForLoad(who, request->load_id()));
    return Fill(store_->AbortLoad(who.tenant, request->load_id()), response->mutable_load());
  });
}

grpc::Status MemoryServiceImpl::GetLoad(grpc::ServerContext* context,
                                        const v1::GetLoadRequest* request,
                                        v1::GetLoadResponse* response) {
  return Serve(context, "GetLoad", response, [&](const Identity& who) -> absl::Status {
    const absl::StatusOr<LoadInfo> load = store_->GetLoad(who.tenant, request->load_id());
    if (load.ok()) RETURN_IF_ERROR(who.Require(Right::kRead, load->knowledge_base));
    return Fill(load, response->mutable_load());
  });
}

grpc::Status MemoryServiceImpl::ListLoads(grpc::ServerContext* context,
                                          const v1::ListLoadsRequest* request,
                                          v1::ListLoadsResponse* response) {
  return Serve(context, "ListLoads", response, [&](const Identity& who) -> absl::Status {
    if (!request->knowledge_base().empty())
      RETURN_IF_ERROR(Require(who, Right::kRead, request->knowledge_base()));
    const absl::StatusOr<std::vector<LoadInfo>> loads =
        store_->ListLoads(who.tenant, request->knowledge_base());
    if (!loads.ok()) return loads.status();
    for (const LoadInfo& load : *loads) {
      if (who.RightOn(load.knowledge_base) >= Right::kRead) *response->add_loads() = ToProto(load);
    }
    return absl::OkStatus();
  });
}

// ---- the whole store ----

grpc::Status MemoryServiceImpl::CreateSnapshot(grpc::ServerContext* context,
                                               const v1::CreateSnapshotRequest* request,
                                               v1::CreateSnapshotResponse* response) {
  return Serve(context, "CreateSnapshot", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.RequireServerAdmin());
    return Fill(store_->CreateSnapshot(request->name()), response->mutable_snapshot());
  });
}

grpc::Status MemoryServiceImpl::ListSnapshots(grpc::ServerContext* context,
                                              const v1::ListSnapshotsRequest* /*request*/,
                                              v1::ListSnapshotsResponse* response) {
  return Serve(context, "ListSnapshots", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.RequireServerAdmin());
    return FillAll(store_->ListSnapshots(), response->mutable_snapshots());
  });
}

grpc::Status MemoryServiceImpl::RestoreSnapshot(grpc::ServerContext* context,
                                                const v1::RestoreSnapshotRequest* request,
                                                v1::RestoreSnapshotResponse* response) {
  return Serve(context, "RestoreSnapshot", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.RequireServerAdmin());
    return store_->RestoreSnapshot(request->name());
  });
}

grpc::Status MemoryServiceImpl::DeleteSnapshot(grpc::ServerContext* context,
                                               const v1::DeleteSnapshotRequest* request,
                                               v1::DeleteSnapshotResponse* response) {
  return Serve(context, "DeleteSnapshot", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.RequireServerAdmin());
    return store_->DeleteSnapshot(request->name());
  });
}

grpc::Status MemoryServiceImpl::CreateBackup(grpc::ServerContext* context,
                                             const v1::CreateBackupRequest* request,
                                             v1::CreateBackupResponse* response) {
  return Serve(context, "CreateBackup", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.RequireServerAdmin());
    const absl::StatusOr<BackupInfo> backup = store_->CreateBackup(request->directory());
    if (!backup.ok()) return backup.status();
    response->set_backup_id(backup->backup_id);
    response->set_bytes_copied(backup->bytes_copied);
    return absl::OkStatus();
  });
}

grpc::Status MemoryServiceImpl::RestoreBackup(grpc::ServerContext* context,
                                              const v1::RestoreBackupRequest* request,
                                              v1::RestoreBackupResponse* response) {
  return Serve(context, "RestoreBackup", response, [&](const Identity& who) -> absl::Status {
    RETURN_IF_ERROR(who.RequireServerAdmin());
    std::optional<uint64_t> id;
    if (request->has_backup_id()) id = request->backup_id();
    return store_->RestoreBackup(request->directory(), id);
  });
}

grpc::Status MemoryServiceImpl::GetStatus(grpc::ServerContext* context,
                                          const v1::GetStatusRequest* /*request*/,
                                          v1::GetStatusResponse* response) {
  return Serve(context, "GetStatus", response, [&](const Identity&) -> absl::Status {
    const StoreStatus status = store_->GetStatus();
    response->set_version(MEMORY3_VERSION);
    *response->mutable_started_at() = ToProto(started_at_);
    response->set_knowledge_bases(status.knowledge_bases);
    response->set_entries(status.entries);
    response->set_records(status.records);
    response->set_disk_bytes(status.disk_bytes);
    response->set_index_bytes(status.index_bytes);
    response->set_retrieve_streams(metrics_->open_streams());
    response->set_writable(status.writable.ok());
    response->set_not_writable_reason(std::string(status.writable.message()));
    return absl::OkStatus();
  });
}

#undef RETURN_IF_ERROR

}  // namespace memory3
