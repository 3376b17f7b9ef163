#include "memory_server/client.h"

#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/impl/codegen/rpc_method.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/sync_stream.h>

#include <algorithm>
#include <future>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "memory_server/retrieve_wire.h"
#include "serving/status.h"

namespace memory3 {
namespace {

constexpr const char* kRetrieveMethod = "/memory3.v1.MemoryService/Retrieve";

std::unique_ptr<grpc::ClientContext> NewContext(std::string_view api_key) {
  auto context = std::make_unique<grpc::ClientContext>();
  if (!api_key.empty()) context->AddMetadata("authorization", "Bearer " + std::string(api_key));
  return context;
}

absl::StatusOr<RecordId> IdOf(const std::string& bytes) {
  absl::StatusOr<RecordId> id = RecordId::FromBytes(bytes);
  if (!id.ok())
    return absl::DataLossError(
        absl::StrCat("the answer has a record id of ", bytes.size(), " bytes"));
  return id;
}

absl::Status Damaged(const RecordId& id, const absl::Status& why) {
  return absl::DataLossError(
      absl::StrCat("record ", id.ToHex(), " came damaged: ", std::string(why.message())));
}

}  // namespace

// ---- PutWriter ----

PutWriter::PutWriter(std::string_view api_key) : context_(NewContext(api_key)) {}

PutWriter::~PutWriter() {
  if (!finished_) context_->TryCancel();
}

absl::Status PutWriter::Write(v1::Entry entry, std::string_view record) {
  const auto ended = [] {
    return absl::UnavailableError("the stream of entries has ended; Finish says why");
  };
  v1::PutRequest message;
  const bool in_pieces = static_cast<int64_t>(record.size()) > kMaxPieceBytes;
  if (in_pieces) {
    entry.set_record_bytes(record.size());
  } else {
    entry.set_record(std::string(record));
  }
  *message.mutable_entry() = std::move(entry);
  if (!writer()->Write(message)) return ended();
  for (size_t at = 0; in_pieces && at < record.size(); at += kMaxPieceBytes) {
    message.set_record_piece(std::string(record.substr(at, kMaxPieceBytes)));
    if (!writer()->Write(message)) return ended();
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::PutResponse> KnowledgeBaseWriter::Finish() {
  finished_ = true;
  writer_->WritesDone();
  if (absl::Status status = FromGrpc(writer_->Finish()); !status.ok()) return status;
  return response_;
}

absl::StatusOr<v1::PutLoadResponse> LoadWriter::Finish() {
  finished_ = true;
  writer_->WritesDone();
  if (absl::Status status = FromGrpc(writer_->Finish()); !status.ok()) return status;
  return response_;
}

// ---- RetrieveStream ----

RetrieveStream::RetrieveStream(std::string_view api_key) : context_(NewContext(api_key)) {}

RetrieveStream::~RetrieveStream() {
  context_->TryCancel();
  reader_.join();
}

void RetrieveStream::Send(v1::RetrieveRequest request, Callback done, PartCallback part) {
  // Held over the write, so that the order of numbers is the order on the wire.
  absl::MutexLock write_lock(&write_mutex_);
  uint64_t id = 0;
  absl::Status ended;
  {
    absl::MutexLock lock(&mutex_);
    ended = ended_;
    if (ended.ok()) {
      id = next_id_++;
      Pending& pending = pending_[id];
      pending.done = std::move(done);
      pending.part = std::move(part);
    }
  }
  if (!ended.ok()) {
    done(ended);  // NOLINT(bugprone-use-after-move): moved only while the stream lives
    return;
  }
  request.set_request_id(id);
  stream_->Write(request);  // a failed write ends the reading too, which answers everything pending
}

absl::StatusOr<RetrieveAnswer> RetrieveStream::Retrieve(v1::RetrieveRequest request) {
  std::promise<absl::StatusOr<RetrieveAnswer>> answer;
  Send(std::move(request),
       [&](absl::StatusOr<RetrieveAnswer> a) { answer.set_value(std::move(a)); });
  return answer.get_future().get();
}

absl::StatusOr<bool> RetrieveStream::Add(v1::RetrieveResponse head, grpc::ByteBuffer* message,
                                         Pending& pending, std::vector<RecordId>* fresh) {
  for (const v1::RetrieveResponse::QueryHits& query : head.queries()) {
    for (const v1::RetrieveResponse::Hit& hit : query.hits()) {
      const absl::StatusOr<RecordId> id = IdOf(hit.record_id());
      if (!id.ok()) return id.status();
      if (hit.record_bytes() > kMaxRecordBytes)
        return Damaged(*id, absl::DataLossError("it is longer than any record"));
      pending.sizes[*id] = hit.record_bytes();
    }
  }
  std::vector<RecordId> touched;
  absl::Status taken = TakeRetrievePieces(
      message,
      [&](const RecordId& id, uint64_t offset, uint64_t size) -> absl::StatusOr<std::string*> {
        std::string& record = pending.partial[id];
        const auto whole = pending.sizes.find(id);
        if (whole == pending.sizes.end())
          return Damaged(id, absl::DataLossError("it belongs to no hit"));
        if (offset != record.size()) {
          return Damaged(id, absl::DataLossError(absl::StrCat("a piece begins at ", offset,
                                                              ", not ", record.size())));
        }
        if (size > whole->second - record.size())
          return Damaged(id, absl::DataLossError("it is longer than its hit says"));
        if (record.empty()) record.reserve(whole->second);
        touched.push_back(id);
        return &record;
      });
  if (!taken.ok()) return taken;
  // Checked as soon as it is whole, while the processor's cache has it.
  for (const RecordId& id : touched) {
    const auto partial = pending.partial.find(id);
    if (partial == pending.partial.end() || partial->second.size() != pending.sizes[id]) continue;
    const absl::StatusOr<RecordHeader> checked = CheckRecord(partial->second);
    if (checked.ok()) {
      pending.answer.records[id] = std::make_shared<const std::string>(std::move(partial->second));
      fresh->push_back(id);
    } else {
      pending.answer.unreadable[id] = Damaged(id, checked.status());
    }
    pending.partial.erase(partial);
  }
  for (const v1::RetrieveResponse::UnreadableRecord& unreadable : head.unreadable()) {
    const absl::StatusOr<RecordId> id = IdOf(unreadable.record_id());
    if (!id.ok()) return id.status();
    if (!pending.sizes.contains(*id))
      return Damaged(*id, absl::DataLossError("it belongs to no hit"));
    const absl::Status why(static_cast<absl::StatusCode>(unreadable.code()), unreadable.message());
    pending.answer.unreadable[*id] = why.ok() ? absl::DataLossError(unreadable.message()) : why;
  }
  head.clear_unreadable();
  if (head.error_code() != 0)
    return absl::Status(static_cast<absl::StatusCode>(head.error_code()), head.error_message());
  const bool last = head.last();
  if (last && !pending.partial.empty()) {
    const auto& [id, record] = *pending.partial.begin();
    return Damaged(id, absl::DataLossError(absl::StrCat("the answer ended after ", record.size(),
                                                        " of ", pending.sizes[id], " bytes")));
  }
  if (pending.answer.hits.queries().empty()) {  // only the first message has hits
    pending.answer.hits = std::move(head);
  } else {
    pending.answer.hits.MergeFrom(head);
  }
  return last;
}

void RetrieveStream::Read() {
  grpc::ByteBuffer message;
  absl::Status broken;
  while (broken.ok() && stream_->Read(&message)) {
    absl::StatusOr<v1::RetrieveResponse> head = ParseRetrieveHead(&message);
    if (!head.ok()) {
      broken = head.status();  // whose answer it is cannot be told
      context_->TryCancel();
      break;
    }
    const uint64_t id = head->request_id();
    Pending work;  // taken out: the map may grow, and so move, meanwhile
    {
      absl::MutexLock lock(&mutex_);
      auto node = pending_.extract(id);
      if (node.empty()) continue;  // it failed before its last message; the rest is read past
      work = std::move(node.mapped());
    }
    std::vector<RecordId> fresh;
    absl::StatusOr<bool> complete = Add(*std::move(head), &message, work, &fresh);
    message.Clear();
    if (!complete.ok()) {
      work.done(complete.status());
    } else if (*complete) {
      work.done(std::move(work.answer));
    } else {
      if (work.part && (!fresh.empty() || !work.has_hits)) work.part(work.answer, fresh);
      work.has_hits = true;
      absl::MutexLock lock(&mutex_);
      pending_[id] = std::move(work);
    }
  }
  absl::Status ended = FromGrpc(stream_->Finish());
  if (!broken.ok()) ended = broken;
  if (ended.ok()) ended = absl::UnavailableError("the server ended the Retrieve stream");
  absl::flat_hash_map<uint64_t, Pending> pending;
  {
    absl::MutexLock lock(&mutex_);
    ended_ = ended;
    pending.swap(pending_);
  }
  for (auto& [id, work] : pending) work.done(ended);
}

// ---- MemoryClient ----

absl::StatusOr<std::unique_ptr<MemoryClient>> MemoryClient::Create(MemoryClientOptions options) {
  const absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> credentials =
      MakeChannelCredentials(options.tls);
  if (!credentials.ok()) return credentials.status();
  std::unique_ptr<MemoryClient> client(new MemoryClient(std::move(options)));
  for (int i = 0; i < std::max(1, client->options_.channels); ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(
        -1);  // hits of many queries may be long; records come in pieces
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    // Despite its name how long an attempt may take, its TLS handshake included.
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5000);
    client->channels_.push_back(
        grpc::CreateCustomChannel(client->options_.target, *credentials, arguments));
    client->stubs_.push_back(v1::MemoryService::NewStub(client->channels_.back()));
  }
  return client;
}

bool MemoryClient::IsSafeToRepeat(std::string_view request_type) {
  // Everything but these: a snapshot or backup would be made twice, a rollback would go back twice.
  constexpr std::string_view kNot[] = {"RollbackRequest",           "CreateSnapshotRequest",
                                       "RestoreSnapshotRequest",    "CreateBackupRequest",
                                       "RestoreBackupRequest",      "CreateKnowledgeBaseRequest",
                                       "DeleteKnowledgeBaseRequest"};
  return std::find(std::begin(kNot), std::end(kNot), request_type) == std::end(kNot);
}

absl::Status MemoryClient::Attempt(
    bool repeat, absl::Time deadline,
    const std::function<grpc::Status(Stub&, grpc::ClientContext*)>& call) {
  deadline = std::min(deadline, absl::Now() + options_.timeout);
  absl::Duration pause = absl::Milliseconds(100);
  thread_local std::minstd_rand random(std::random_device{}());
  for (int attempt = 1;; ++attempt) {
    const std::unique_ptr<grpc::ClientContext> context = NewContext(options_.api_key);
    context->set_deadline(absl::ToChronoTime(deadline));
    absl::Status status = FromGrpc(call(NextStub(), context.get()));
    if (!absl::IsUnavailable(status) || !repeat || attempt >= options_.attempts) return status;
    const absl::Duration jittered = pause * std::uniform_real_distribution<double>(0.5, 1)(random);
    if (absl::Now() + jittered >= deadline) return status;
    absl::SleepFor(jittered);
    pause *= 2;
  }
}

absl::StatusOr<MemoryClient::FetchedRecord> MemoryClient::GetRecord(
    const v1::GetRecordRequest& request) {
  FetchedRecord result;
  absl::Status status = Attempt(
      /*repeat=*/true, absl::InfiniteFuture(), [&](Stub& stub, grpc::ClientContext* context) {
        result = {};
        const auto reader = stub.GetRecord(context, request);
        v1::GetRecordResponse message;
        while (reader->Read(&message)) {
          result.sources.insert(result.sources.end(), message.sources().begin(),
                                message.sources().end());
          result.record += message.record_piece();
        }
        return reader->Finish();
      });
  if (!status.ok()) return status;
  const absl::StatusOr<RecordHeader> checked = CheckRecord(result.record);
  if (!checked.ok()) {
    const absl::StatusOr<RecordId> id = IdOf(request.record_id());
    return id.ok() ? Damaged(*id, checked.status()) : id.status();
  }
  return result;
}

absl::StatusOr<bool> MemoryClient::HasRecord(const std::string& knowledge_base,
                                             const RecordId& id) {
  v1::GetRecordRequest request;
  request.set_knowledge_base(knowledge_base);
  request.set_record_id(std::string(id.view()));
  bool has = false;
  absl::Status status = Attempt(
      /*repeat=*/true, absl::InfiniteFuture(), [&](Stub& stub, grpc::ClientContext* context) {
        const auto reader = stub.GetRecord(context, request);
        v1::GetRecordResponse message;
        has = reader->Read(&message);
        if (!has || message.record_piece().size() == message.record_bytes()) {
          return reader->Finish();
        }
        context->TryCancel();  // the first message says it all
        reader->Finish();
        return grpc::Status::OK;
      });
  if (absl::IsNotFound(status)) return false;
  if (!status.ok()) return status;
  return has;
}

std::unique_ptr<KnowledgeBaseWriter> MemoryClient::Put(const std::string& knowledge_base,
                                                       bool wait) {
  std::unique_ptr<KnowledgeBaseWriter> writer(new KnowledgeBaseWriter(options_.api_key));
  writer->writer_ = NextStub().Put(writer->context_.get(), &writer->response_);
  v1::PutRequest header;
  header.mutable_header()->set_knowledge_base(knowledge_base);
  header.mutable_header()->set_wait(wait);
  writer->writer_->Write(header);  // where it fails, so does what follows, and Finish says why
  return writer;
}

std::unique_ptr<LoadWriter> MemoryClient::PutLoad(const std::string& load_id) {
  std::unique_ptr<LoadWriter> writer(new LoadWriter(options_.api_key));
  writer->writer_ = NextStub().PutLoad(writer->context_.get(), &writer->response_);
  v1::PutRequest header;
  header.mutable_header()->set_load_id(load_id);
  writer->writer_->Write(header);
  return writer;
}

std::unique_ptr<RetrieveStream> MemoryClient::OpenRetrieve() {
  std::unique_ptr<RetrieveStream> stream(new RetrieveStream(options_.api_key));
  // As the stub would, but for the answers' type.
  const grpc::internal::RpcMethod method(kRetrieveMethod,
                                         grpc::internal::RpcMethod::BIDI_STREAMING);
  stream->stream_.reset(
      grpc::internal::ClientReaderWriterFactory<v1::RetrieveRequest, grpc::ByteBuffer>::Create(
          channels_[next_++ % channels_.size()].get(), method, stream->context_.get()));
  stream->reader_ = std::thread([s = stream.get()] { s->Read(); });
  return stream;
}

}  // namespace memory3
