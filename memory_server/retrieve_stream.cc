#include "memory_server/retrieve_stream.h"

#include <grpcpp/impl/codegen/proto_utils.h>

#include <algorithm>
#include <list>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "memory_server/conversions.h"
#include "memory_server/held_records.h"
#include "memory_server/retrieve_wire.h"
#include "serving/status.h"

namespace memory3 {
namespace {

// Of records in a message, and read from the store at a time, unless a single one is longer. Well
// below gRPC's default limit of 4 MiB. Shorter ones overlap reading, wire and the client's checks
// more, but each costs some ten context switches; only the first is, so that the wire waits less.
constexpr uint64_t kMessageBytes = kMaxPieceBytes;
constexpr uint64_t kFirstMessageBytes = kMessageBytes / 2;
// Streams, and queries of theirs, whose requests are searched in one pass over the index.
constexpr size_t kMaxStreamsTogether = 16;
constexpr size_t kMaxQueriesTogether = 64;
// Versions a stream keeps readable.
constexpr size_t kMaxPins = 64;

// The versions this stream read last, by knowledge base name (or alias) and version asked for.
class Pins {
 public:
  absl::StatusOr<std::shared_ptr<const VersionPin>> Get(MemoryStore* store,
                                                        const Identity& identity,
                                                        const v1::RetrieveRequest& request) {
    std::optional<uint64_t> version;
    if (request.has_version()) version = request.version();
    if (version) {
      for (auto it = pins_.begin(); it != pins_.end(); ++it) {
        if (it->asked == request.knowledge_base() && it->pin->version() == *version) {
          pins_.splice(pins_.begin(), pins_, it);
          return pins_.front().pin;
        }
      }
    }
    absl::StatusOr<std::shared_ptr<const VersionPin>> pin =
        store->Pin(identity.tenant, request.knowledge_base(), version);
    if (!pin.ok()) {
      // What may not be read is not known to be there either.
      const absl::Status allowed = identity.Require(Right::kRead, request.knowledge_base());
      return allowed.ok() ? pin.status() : allowed;
    }
    if (absl::Status allowed = identity.Require(Right::kRead, (*pin)->knowledge_base());
        !allowed.ok()) {
      return allowed;
    }
    if (!version) {  // the published version: it replaces the one read before
      pins_.remove_if(
          [&](const Pinned& p) { return p.asked == request.knowledge_base() && p.published; });
    }
    pins_.push_front({request.knowledge_base(), !version.has_value(), *pin});
    if (pins_.size() > kMaxPins) pins_.pop_back();
    return *pin;
  }
  void Forget(const std::shared_ptr<const VersionPin>& pin) {
    pins_.remove_if([&](const Pinned& p) { return p.pin == pin; });
  }

 private:
  struct Pinned {
    std::string asked;
    bool published;
    std::shared_ptr<const VersionPin> pin;
  };
  std::list<Pinned> pins_;  // last read first
};

}  // namespace

class RetrieveStreams::Stream : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  Stream(RetrieveStreams* streams, Identity identity)
      : streams_(streams), identity_(std::move(identity)), held_(streams->options_.held_limit) {
    streams_->metrics_->StreamOpened();
  }

  void Start() { StartRead(&incoming_); }

  // Ends the stream now if it waits for a request, else when the answer is written.
  void Drain() {
    {
      absl::MutexLock lock(&mutex_);
      draining_ = true;
      if (busy_ || finished_) return;
      finished_ = true;
    }
    Finish(ToGrpc(absl::UnavailableError("the server is shutting down")));
  }

  // Reads the request. True: Search is to follow; false: the answer is an error, or the stream
  // ends.
  bool BeginAnswer() {
    {
      absl::MutexLock lock(&mutex_);
      producing_ = true;
      last_written_ = false;
    }
    answer_ = {};
    answer_.begun = absl::Now();
    v1::RetrieveRequest& request = answer_.request;
    if (grpc::Status parsed =
            grpc::GenericDeserialize<grpc::ProtoBufferReader, v1::RetrieveRequest>(&incoming_,
                                                                                   &request);
        !parsed.ok()) {
      End(absl::InvalidArgumentError("the message is no RetrieveRequest"));
      return false;
    }
    answer_.request_id = request.request_id();
    if (!greeted_) answer_.head.set_held_limit(streams_->options_.held_limit);
    greeted_ = true;
    absl::Status ready = PrepareSearch();
    if (ready.ok()) return true;
    FailAnswer(std::move(ready));
    Produce();
    return false;
  }

  // Whether both ask for what one pass over an index can answer.
  bool SharesSearchWith(const Stream& other) const {
    const VersionPin &a = *answer_.pin, &b = *other.answer_.pin;
    // A knowledge base's specification is one object, also where one of its name came after it.
    return &a.spec() == &b.spec() && a.version() == b.version() &&
           answer_.options.with_text == other.answer_.options.with_text;
  }
  size_t queries() const { return answer_.queries.size(); }

  // Searches for all of them (which share a search) and hands their answers on.
  static void Search(std::span<Stream* const> streams) {
    RetrieveStreams& all = *streams[0]->streams_;
    std::vector<Query> queries;
    RetrieveOptions options = streams[0]->answer_.options;
    for (const Stream* stream : streams) {
      queries.insert(queries.end(), stream->answer_.queries.begin(), stream->answer_.queries.end());
      options.deadline = std::min(options.deadline, stream->answer_.options.deadline);
    }
    absl::StatusOr<RetrieveResult> result =
        all.store_->Retrieve(*streams[0]->answer_.pin, queries, options);
    if (!result.ok() && streams.size() > 1) {  // whose fault it is shows each alone
      for (Stream* const& stream : streams) Search({&stream, 1});
      return;
    }
    if (absl::IsAborted(result.status())) {  // a snapshot was restored under the pin
      result = streams[0]->SearchAgain();
    }
    auto hits = result.ok() ? result->queries.begin() : std::vector<std::vector<Hit>>::iterator();
    for (Stream* stream : streams) {
      if (result.ok()) {
        stream->TakeHits({hits, stream->queries()}, result->records);
        hits += static_cast<ptrdiff_t>(stream->queries());
      } else {
        stream->FailAnswer(result.status());
      }
    }
    // Before requests that came later are searched: an answer that has been found frees its client.
    for (Stream* stream : streams.subspan(1)) {
      all.executor_.RunFirst([stream] { stream->Produce(); });
    }
    streams[0]->Produce();
  }

 private:
  void OnReadDone(bool ok) override {
    {
      absl::MutexLock lock(&mutex_);
      if (finished_) return;
      if (!ok) {
        finished_ = true;
      } else {
        busy_ = true;
      }
    }
    if (!ok) {
      Finish(grpc::Status::OK);
    } else {
      streams_->SearchSoon(this);
    }
  }

  void OnWriteDone(bool ok) override {
    enum { kNothing, kProduce, kEndAnswer, kEnd } then = kNothing;
    {
      absl::MutexLock lock(&mutex_);
      writing_ = false;
      if (!ok) {
        broken_ = true;
        if (!producing_) then = kEnd;  // else Produce does it: it must not outlive the stream
      } else if (next_) {
        WriteLocked(*std::exchange(next_, std::nullopt));
        producing_ = !last_written_;
        if (producing_) then = kProduce;
      } else if (last_written_) {
        then = kEndAnswer;
      }
    }
    if (then == kProduce) streams_->executor_.Run([this] { Produce(); });
    if (then == kEndAnswer) EndAnswer();
    if (then == kEnd) End(absl::CancelledError("the client went away"));
  }

  void OnDone() override {
    {
      absl::MutexLock lock(&streams_->mutex_);
      streams_->open_.erase(this);
    }
    streams_->metrics_->StreamClosed();
    delete this;
  }

  // The answer under way: what is to be searched, then what remains to be sent.
  struct Answer {
    uint64_t request_id = 0;
    v1::RetrieveRequest request;
    std::shared_ptr<const VersionPin> pin;
    std::vector<Query> queries;  // point into the request
    RetrieveOptions options;
    v1::RetrieveResponse head;  // of the next message, without its number
    std::shared_ptr<const RecordReader> records;
    std::vector<std::pair<RecordId, uint64_t>> to_read;  // id, bytes; in order
    size_t next_to_read = 0;
    std::vector<WirePiece> ready;  // read and cut, not sent
    size_t next_ready = 0;
    absl::Status status;
    absl::Time begun;
    uint64_t hits = 0, held_hits = 0, bytes = 0, unreadable = 0;
  };

  // The rest of the answer is an error; the stream goes on.
  void FailAnswer(absl::Status status) {
    answer_.head.clear_queries();
    answer_.head.set_error_code(static_cast<uint32_t>(status.raw_code()));
    answer_.head.set_error_message(std::string(status.message()));
    answer_.to_read.clear();
    answer_.next_to_read = 0;
    answer_.ready.clear();
    answer_.next_ready = 0;
    answer_.records.reset();
    answer_.status = std::move(status);
  }

  absl::Status PrepareSearch() {
    const v1::RetrieveRequest& request = answer_.request;
    const absl::StatusOr<std::vector<RecordId>> evicted =
        RecordIdsFromProto(request.evicted(), "evicted");
    if (!evicted.ok()) return evicted.status();
    const absl::StatusOr<std::vector<RecordId>> held = RecordIdsFromProto(request.held(), "held");
    if (!held.ok()) return held.status();
    for (const RecordId& id : *evicted) held_.Erase(id);
    for (const RecordId& id : *held) held_.Insert(id);
    answer_.request.clear_evicted();
    answer_.request.clear_held();

    absl::StatusOr<std::shared_ptr<const VersionPin>> pin =
        pins_.Get(streams_->store_, identity_, request);
    if (!pin.ok()) return pin.status();
    answer_.pin = *std::move(pin);
    answer_.options.with_text = request.with_text();
    if (request.has_timeout())
      answer_.options.deadline = answer_.begun + FromProto(request.timeout());
    std::vector<Query>& queries = answer_.queries;
    queries.resize(request.queries_size());
    for (int i = 0; i < request.queries_size(); ++i) {
      const v1::RetrieveRequest::Query& query = request.queries(i);
      queries[i].embedding = {query.embedding().data(),
                              static_cast<size_t>(query.embedding_size())};
      queries[i].top_k = query.top_k();
      if (query.has_min_score()) queries[i].min_score = query.min_score();
      queries[i].filter = FromProto(query.filter());
    }
    return absl::OkStatus();
  }

  // With the version pinned anew.
  absl::StatusOr<RetrieveResult> SearchAgain() {
    pins_.Forget(answer_.pin);
    absl::StatusOr<std::shared_ptr<const VersionPin>> pin =
        pins_.Get(streams_->store_, identity_, answer_.request);
    if (!pin.ok()) return pin.status();
    answer_.pin = *std::move(pin);
    return streams_->store_->Retrieve(*answer_.pin, answer_.queries, answer_.options);
  }

  void TakeHits(std::span<std::vector<Hit>> queries,
                const std::shared_ptr<const RecordReader>& records) {
    const v1::RetrieveRequest& request = answer_.request;
    const bool with_records = !request.has_with_records() || request.with_records();
    answer_.head.set_version(answer_.pin->version());
    for (std::vector<Hit>& hits : queries) {
      v1::RetrieveResponse::QueryHits& out = *answer_.head.add_queries();
      for (Hit& hit : hits) AddHit(hit, with_records, *out.add_hits());
    }
    answer_.records = records;
  }

  void AddHit(Hit& hit, bool with_records, v1::RetrieveResponse::Hit& out) {
    out.set_record_id(std::string(hit.record_id.view()));
    out.set_score(hit.score);
    out.set_record_bytes(hit.record_bytes);
    for (const Source& source : hit.sources) *out.add_sources() = ToProto(source);
    ++answer_.hits;
    const bool held = held_.Contains(hit.record_id);
    out.set_held(held);
    if (held) {
      ++answer_.held_hits;
    } else if (with_records) {
      // A later hit of this answer finds it held. Should reading fail ReadSome takes it back.
      held_.Insert(hit.record_id);
      answer_.to_read.emplace_back(hit.record_id, hit.record_bytes);
    }
  }

  // One message of an answer.
  struct Message {
    grpc::ByteBuffer bytes;
    bool last = false;
  };

  // Makes the answer's messages, one ahead of that on the wire: OnWriteDone goes on where it
  // leaves.
  void Produce() {
    bool broken = false;
    for (bool more = true; more;) {
      Message message = NextMessage();
      absl::MutexLock lock(&mutex_);
      more = !message.last && !broken_ && !writing_;
      broken = broken_;
      if (!more) producing_ = false;
      if (broken) break;
      if (writing_) {
        next_ = std::move(message);
      } else {
        WriteLocked(message);
      }
    }
    if (broken) End(absl::CancelledError("the client went away"));
  }

  // Its reaction cannot come before this thread leaves the mutex: gRPC runs it on one of its own
  // threads, and there only when the reaction under way has returned.
  void WriteLocked(const Message& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    writing_ = true;
    last_written_ = message.last;
    outgoing_ = message.bytes;  // shares the slices
    StartWrite(&outgoing_);
  }

  uint64_t MessageBytes() const { return answer_.bytes == 0 ? kFirstMessageBytes : kMessageBytes; }

  // Pieces as long as they fit, and the head before them.
  Message NextMessage() {
    std::vector<WirePiece> pieces;
    uint64_t bytes = 0;
    for (;;) {
      if (answer_.next_ready == answer_.ready.size() && (!pieces.empty() || !ReadMore())) break;
      WirePiece& piece = answer_.ready[answer_.next_ready];
      if (!pieces.empty() && bytes + piece.data.size() > MessageBytes()) break;
      bytes += piece.data.size();
      pieces.push_back(std::move(piece));
      ++answer_.next_ready;
    }
    Message message;
    message.last = answer_.next_ready == answer_.ready.size() &&
                   answer_.next_to_read == answer_.to_read.size();
    answer_.head.set_request_id(answer_.request_id);
    if (message.last) {
      answer_.head.set_last(true);
      *answer_.head.mutable_took() = ToProto(absl::Now() - answer_.begun);
    }
    answer_.bytes += bytes;
    message.bytes = SerializeRetrieveResponse(answer_.head, pieces);
    answer_.head.Clear();
    return message;
  }

  // Reads records until some can be sent, and cuts them into pieces. False: there are none.
  bool ReadMore() {
    answer_.ready.clear();
    answer_.next_ready = 0;
    while (answer_.ready.empty() && answer_.next_to_read < answer_.to_read.size()) ReadSome();
    return !answer_.ready.empty();
  }

  // The next message's records. What cannot be read is said in the head.
  void ReadSome() {
    std::vector<RecordId> ids;
    for (uint64_t bytes = 0; answer_.next_to_read < answer_.to_read.size();
         ++answer_.next_to_read) {
      const auto& [id, size] = answer_.to_read[answer_.next_to_read];
      if (!ids.empty() && bytes + size > MessageBytes()) break;
      ids.push_back(id);
      bytes += size;
    }
    const std::vector<absl::StatusOr<RecordView>> records = answer_.records->Read(ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      if (!records[i].ok()) {
        held_.Erase(ids[i]);
        ++answer_.unreadable;
        v1::RetrieveResponse::UnreadableRecord& out = *answer_.head.add_unreadable();
        out.set_record_id(std::string(ids[i].view()));
        out.set_code(static_cast<uint32_t>(records[i].status().raw_code()));
        out.set_message(std::string(records[i].status().message()));
        continue;
      }
      const std::string_view record = records[i]->bytes;
      for (size_t at = 0; at < record.size(); at += kMaxPieceBytes) {
        answer_.ready.push_back({ids[i], at, record.substr(at, kMaxPieceBytes), records[i]->owner});
      }
    }
  }

  void EndAnswer() {
    outgoing_.Clear();
    streams_->metrics_->CountRequest("Retrieve", answer_.status, absl::Now() - answer_.begun);
    streams_->metrics_->CountRetrieve(answer_.queries.size(), answer_.hits, answer_.held_hits,
                                      answer_.bytes, answer_.unreadable);
    answer_ = {};
    bool finish = false;
    {
      absl::MutexLock lock(&mutex_);
      busy_ = false;
      finish = finished_ = draining_;
      if (!finish)
        StartRead(&incoming_);  // under the mutex: Drain must not finish the stream before it
    }
    if (finish) Finish(ToGrpc(absl::UnavailableError("the server is shutting down")));
  }

  // Ends the stream from within an answer.
  void End(const absl::Status& status) {
    {
      absl::MutexLock lock(&mutex_);
      finished_ = true;
    }
    Finish(ToGrpc(status));
  }

  RetrieveStreams* const streams_;
  const Identity identity_;
  // Of the answer under way: touched by one thread at a time, handed on through gRPC and the
  // executor.
  grpc::ByteBuffer incoming_, outgoing_;
  Answer answer_;
  HeldRecords held_;
  Pins pins_;
  bool greeted_ = false;

  absl::Mutex mutex_;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;  // an answer is under way
  bool draining_ ABSL_GUARDED_BY(mutex_) = false, finished_ ABSL_GUARDED_BY(mutex_) = false;
  // Of the answer under way: whether a thread makes messages, whether one is on the wire and was
  // the last, and what waits behind it. After a write that failed, broken.
  bool producing_ ABSL_GUARDED_BY(mutex_) = false, writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool last_written_ ABSL_GUARDED_BY(mutex_) = false, broken_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<Message> next_ ABSL_GUARDED_BY(mutex_);
};

namespace {

// A stream that is over before it began.
class RefusedStream : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  explicit RefusedStream(const absl::Status& status) { Finish(ToGrpc(status)); }
  void OnDone() override { delete this; }
};

int Threads(int asked) {
  return asked > 0 ? asked : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

RetrieveStreams::RetrieveStreams(MemoryStore* store, MemoryServerMetrics* metrics,
                                 const RetrieveOptionsOfServer& options)
    : store_(store),
      metrics_(metrics),
      options_(options),
      threads_(Threads(options.search_threads)),
      executor_(static_cast<int>(threads_)) {}

RetrieveStreams::~RetrieveStreams() = default;

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* RetrieveStreams::Open(
    absl::StatusOr<Identity> identity) {
  if (!identity.ok()) return new RefusedStream(identity.status());
  Stream* stream = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    if (draining_) return new RefusedStream(absl::UnavailableError("the server is shutting down"));
    if (open_.size() >= options_.max_streams) {
      return new RefusedStream(absl::ResourceExhaustedError(absl::StrCat(
          "there are ", open_.size(), " Retrieve streams, the limit (--max_retrieve_streams)")));
    }
    stream = new Stream(this, *std::move(identity));
    open_.insert(stream);
  }
  stream->Start();
  return stream;
}

void RetrieveStreams::SearchSoon(Stream* stream) {
  absl::MutexLock lock(&asked_mutex_);
  asked_.push_back(stream);
  QueueSearch();
}

// One search in the queue is enough for all that wait. With one a request those left over when
// requests were taken together would stand before the answers found since, and let requests pass
// them that came later.
void RetrieveStreams::QueueSearch() {
  if (search_queued_ || asked_.empty()) return;
  search_queued_ = true;
  executor_.Run([this] { SearchSome(); });
}

void RetrieveStreams::SearchSome() {
  std::vector<Stream*> begun;
  {
    absl::MutexLock lock(&asked_mutex_);
    // A fair share; another thread takes of the rest.
    const size_t share = std::min(kMaxStreamsTogether, (asked_.size() + threads_ - 1) / threads_);
    begun.assign(asked_.begin(), asked_.begin() + static_cast<ptrdiff_t>(share));
    asked_.erase(asked_.begin(), asked_.begin() + static_cast<ptrdiff_t>(share));
    search_queued_ = false;
    QueueSearch();
  }
  std::erase_if(begun, [](Stream* stream) { return !stream->BeginAnswer(); });
  while (!begun.empty()) {
    std::vector<Stream*> together = {begun[0]};
    size_t queries = begun[0]->queries();
    std::vector<Stream*> others;
    for (Stream* stream : std::span(begun).subspan(1)) {
      const bool shares =
          stream->SharesSearchWith(*begun[0]) && queries + stream->queries() <= kMaxQueriesTogether;
      if (shares) queries += stream->queries();
      (shares ? together : others).push_back(stream);
    }
    Stream::Search(together);
    begun = std::move(others);
  }
}

void RetrieveStreams::Drain(absl::Time deadline) {
  // Under the mutex no stream is deleted (OnDone takes it). Finish may call OnDone only from
  // another thread: gRPC runs reactions of a stream it is told to finish on its own threads.
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  for (Stream* stream : open_) stream->Drain();
  const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return open_.empty(); };
  mutex_.AwaitWithDeadline(absl::Condition(&none), deadline);
}

}  // namespace memory3
