#include "inference_server/remote_memory_source.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "memory_server/conversions.h"

namespace memory3 {
namespace {

// The server answers DEADLINE_EXCEEDED itself; one that has not by then does not answer at all.
constexpr absl::Duration kAnswerGrace = absl::Seconds(1);
constexpr size_t kMaxHeldReported = 100'000;   // 3.2 MB
constexpr size_t kMaxNamesRemembered = 1'000;  // of bases, for when the server cannot be asked

// The hits alone.
absl::StatusOr<SourceAnswer> FromWire(v1::RetrieveResponse response) {
  SourceAnswer result;
  for (v1::RetrieveResponse::QueryHits& query : *response.mutable_queries()) {
    std::vector<SourceHit>& hits = result.queries.emplace_back();
    for (v1::RetrieveResponse::Hit& hit : *query.mutable_hits()) {
      const absl::StatusOr<RecordId> id = RecordId::FromBytes(hit.record_id());
      if (!id.ok())
        return absl::DataLossError(
            absl::StrCat("the answer has a record id of ", hit.record_id().size(), " bytes"));
      SourceHit& h = hits.emplace_back(SourceHit{*id, hit.score(), {}});
      for (v1::Source& source : *hit.mutable_sources()) h.sources.push_back(std::move(source));
    }
  }
  return result;
}

absl::StatusOr<SourceAnswer> FromWire(RetrieveAnswer answer) {
  absl::StatusOr<SourceAnswer> result = FromWire(std::move(answer.hits));
  if (!result.ok()) return result.status();
  for (auto& [id, record] : answer.records) result->records[id] = {*record, record};
  result->unreadable = std::move(answer.unreadable);
  return result;
}

}  // namespace

class RemoteMemorySource::Base final : public MemoryBase {
 public:
  Base(RemoteMemorySource* source, std::string name, uint64_t version,
       std::shared_ptr<const Codec> codec)
      : MemoryBase(source->options_.tenant, std::move(name), version, std::move(codec)),
        source_(source) {}
  void Retrieve(SourceRequest request, SourceCallback done) override {
    source_->Retrieve(*this, std::move(request), std::move(done));
  }
  void Evicted(const RecordId& id) override { source_->Evicted(id); }

 private:
  RemoteMemorySource* const source_;
};

absl::StatusOr<std::unique_ptr<RemoteMemorySource>> RemoteMemorySource::Create(
    RemoteMemoryOptions options, ReaderIdentity reader) {
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = MemoryClient::Create(options.client);
  if (!client.ok()) return client.status();
  return std::unique_ptr<RemoteMemorySource>(
      new RemoteMemorySource(std::move(options), std::move(reader), *std::move(client)));
}

RemoteMemorySource::RemoteMemorySource(RemoteMemoryOptions options, ReaderIdentity reader,
                                       std::unique_ptr<MemoryClient> client)
    : options_(std::move(options)),
      reader_(std::move(reader)),
      client_(std::move(client)),
      pause_(options_.first_pause),
      thread_([this] { Run(); }),
      watch_([this] { WatchWrites(); }) {}

RemoteMemorySource::~RemoteMemorySource() { Shutdown(); }

void RemoteMemorySource::Shutdown() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (watch_.joinable()) watch_.join();
}

absl::Status RemoteMemorySource::CheckTenant(std::string_view tenant) const {
  if (tenant == options_.tenant) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(
      "tenant \"", std::string(tenant), "\": this server reads the knowledge bases of tenant \"",
      options_.tenant, "\" only"));
}

absl::StatusOr<std::shared_ptr<MemoryBase>> RemoteMemorySource::Open(
    std::string_view tenant, std::string_view knowledge_base, absl::Time deadline) {
  if (absl::Status status = CheckTenant(tenant); !status.ok()) return status;
  const std::string asked(knowledge_base);
  const auto known = [&]() -> std::shared_ptr<Base> {
    const std::lock_guard lock(mutex_);
    const auto found = last_known_.find(asked);
    return found == last_known_.end() ? nullptr : found->second;
  };
  if (known() != nullptr) deadline = std::min(deadline, absl::Now() + options_.patience);
  const auto get = [&](bool with_codebook) {
    v1::GetKnowledgeBaseRequest request;
    request.set_knowledge_base(asked);
    request.set_with_codebook(with_codebook);
    return Ask(request, deadline);
  };
  absl::StatusOr<v1::GetKnowledgeBaseResponse> response = get(false);
  if (absl::IsUnavailable(response.status()) || absl::IsDeadlineExceeded(response.status())) {
    if (std::shared_ptr<Base> base = known()) return base;
  }
  if (!response.ok()) return response.status();
  const v1::KnowledgeBase* info = &response->knowledge_base();
  if (absl::Status status = CheckReadable(info->spec(), reader_); !status.ok()) return status;
  if (std::shared_ptr<Base> base = known();
      base != nullptr && base->name() == info->spec().name() &&
      base->version() == info->version() &&
      base->codec()->codebook_hash().view() ==
          (info->codebook_hash().empty() ? Hash256().view() : info->codebook_hash())) {
    return base;
  }
  const std::optional<CodecId> codec_id = FromProto(info->spec().codec());
  if (!codec_id) {
    return absl::UnimplementedError(absl::StrCat("knowledge base ", asked, ": codec ",
                                                 static_cast<int>(info->spec().codec()),
                                                 " is unknown to this program"));
  }
  if (*codec_id == CodecId::kVq) {
    response = get(true);
    if (!response.ok()) return response.status();
    info = &response->knowledge_base();
    if (absl::Status status = CheckReadable(info->spec(), reader_); !status.ok()) return status;
  }
  absl::StatusOr<std::unique_ptr<Codec>> codec =
      MakeCodec(*codec_id, info->spec().geometry().head_dim(), info->spec().codebook());
  if (!codec.ok()) return codec.status();
  auto base = std::make_shared<Base>(this, info->spec().name(), info->version(), *std::move(codec));
  const std::lock_guard lock(mutex_);
  if (last_known_.size() >= kMaxNamesRemembered) last_known_.clear();
  last_known_[asked] = base;
  return base;
}

absl::StatusOr<v1::GetKnowledgeBaseResponse> RemoteMemorySource::Ask(
    const v1::GetKnowledgeBaseRequest& request, absl::Time deadline) {
  const absl::Time begin = absl::Now();
  if (begin >= deadline)
    return absl::DeadlineExceededError("the time to look the knowledge base up is over");
  {
    const std::lock_guard lock(mutex_);
    if (begin < ask_at_)
      return absl::UnavailableError(
          absl::StrCat("the memory server at ", options_.client.target, " cannot be reached"));
    // After a failure one asks; the others hear of it when the pause is over.
    if (ask_pause_ > absl::ZeroDuration()) ask_at_ = begin + ask_pause_;
  }
  absl::StatusOr<v1::GetKnowledgeBaseResponse> response =
      client_->Call(&MemoryClient::Stub::GetKnowledgeBase, request, deadline);
  const absl::Time now = absl::Now();
  const std::lock_guard lock(mutex_);
  // A deadline shorter than the patience says nothing about the server.
  if (absl::IsUnavailable(response.status()) ||
      (absl::IsDeadlineExceeded(response.status()) && now - begin >= options_.patience)) {
    ask_pause_ = std::clamp(2 * ask_pause_, options_.first_pause, options_.longest_pause);
    ask_at_ = now + ask_pause_;
  } else if (!absl::IsDeadlineExceeded(response.status())) {
    ask_pause_ = absl::ZeroDuration();
    ask_at_ = absl::InfinitePast();
  }
  return response;
}

absl::StatusOr<std::vector<std::string>> RemoteMemorySource::List(std::string_view tenant) {
  if (absl::Status status = CheckTenant(tenant); !status.ok()) return status;
  const absl::StatusOr<v1::ListKnowledgeBasesResponse> response =
      client_->Call(&MemoryClient::Stub::ListKnowledgeBases, v1::ListKnowledgeBasesRequest(),
                    absl::Now() + options_.patience);
  if (!response.ok()) return response.status();
  std::vector<std::string> names;
  for (const v1::KnowledgeBase& base : response->knowledge_bases()) {
    if (CheckReadable(base.spec(), reader_).ok()) names.push_back(base.spec().name());
  }
  return names;
}

void RemoteMemorySource::Retrieve(const Base& base, SourceRequest request, SourceCallback done) {
  Pending pending;
  pending.done = std::move(done);
  pending.part = std::move(request.part);
  pending.deadline = request.deadline;
  v1::RetrieveRequest& wire = pending.request;
  wire.set_knowledge_base(base.name());
  wire.set_version(base.version());
  wire.set_with_text(request.with_text);
  for (SourceQuery& query : request.queries) {
    v1::RetrieveRequest::Query& q = *wire.add_queries();
    q.mutable_embedding()->Add(query.embedding.begin(), query.embedding.end());
    q.set_top_k(query.top_k);
    if (query.min_score) q.set_min_score(*query.min_score);
    *q.mutable_filter() = std::move(query.filter);
  }
  {
    const std::lock_guard lock(mutex_);
    for (const RecordId& id : request.missing) {
      here_.erase(id);
      evicted_.push_back(id);
    }
    if (!ending_) {
      pending_.emplace(next_number_++, std::move(pending));
      changed_.notify_all();
      return;
    }
  }
  pending.done(absl::CancelledError("the memory source is shutting down"));
}

void RemoteMemorySource::Evicted(const RecordId& id) {
  const std::lock_guard lock(mutex_);
  if (here_.erase(id) > 0) evicted_.push_back(id);
}

bool RemoteMemorySource::Runnable() const {
  if (ending_) return true;
  const absl::Time now = absl::Now();
  bool unsent = false;
  for (const auto& [number, pending] : pending_) {
    if (now >= pending.deadline + (pending.sent ? kAnswerGrace : absl::ZeroDuration())) return true;
    unsent = unsent || !pending.sent;
  }
  return unsent && (!lost_ || now >= try_at_ || now >= lost_at_ + options_.patience);
}

absl::Time RemoteMemorySource::NextEvent() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [number, pending] : pending_) {
    next = std::min(next, pending.deadline + (pending.sent ? kAnswerGrace : absl::ZeroDuration()));
    if (!pending.sent) next = std::min(next, std::min(try_at_, lost_at_ + options_.patience));
  }
  return next;
}

bool RemoteMemorySource::TakeExpired(absl::Time now, std::vector<SourceCallback>* expired) {
  bool hung = false;
  for (auto it = pending_.begin(); it != pending_.end();) {
    const bool sent = it->second.sent;
    if (now < it->second.deadline + (sent ? kAnswerGrace : absl::ZeroDuration())) {
      ++it;
      continue;
    }
    hung = hung || sent;
    expired->push_back(std::move(it->second.done));
    it = pending_.erase(it);
  }
  return hung;
}

void RemoteMemorySource::Run() {
  while (true) {
    std::vector<SourceCallback> expired, refused;
    std::vector<std::pair<uint64_t, v1::RetrieveRequest>> to_send;
    bool hung = false, open = false;
    uint64_t generation = 0;
    {
      std::unique_lock lock(mutex_);
      while (!Runnable()) changed_.wait_until(lock, absl::ToChronoTime(NextEvent()));
      if (ending_) break;
      const absl::Time now = absl::Now();
      hung = TakeExpired(now, &expired);
      if (!hung && lost_ && now < try_at_ && now >= lost_at_ + options_.patience) {
        for (auto it = pending_.begin(); it != pending_.end();) {
          if (it->second.sent) {
            ++it;
            continue;
          }
          refused.push_back(std::move(it->second.done));
          it = pending_.erase(it);
        }
      } else if (!hung && (!lost_ || now >= try_at_)) {
        open = lost_;
        if (open) ++generation_;
        generation = generation_;
        for (auto& [number, pending] : pending_) {
          if (pending.sent) continue;
          pending.sent = true;
          pending.generation = generation;
          to_send.emplace_back(number, pending.request);
          if (pending.deadline < absl::InfiniteFuture())
            *to_send.back().second.mutable_timeout() = ToProto(pending.deadline - now);
        }
        if (!to_send.empty()) {
          v1::RetrieveRequest& first = to_send.front().second;
          if (open) {
            // The server has forgotten everything; what was evicted it does not know either.
            evicted_.clear();
            lost_ = false;
            size_t reported = 0;
            for (const RecordId& id : here_) {
              if (reported++ == kMaxHeldReported) break;
              first.mutable_held()->append(id.view());
            }
          }
          for (const RecordId& id : evicted_) first.mutable_evicted()->append(id.view());
          evicted_.clear();
        }
      }
    }
    for (const SourceCallback& done : expired)
      done(absl::DeadlineExceededError("the memory server did not answer in time"));
    for (const SourceCallback& done : refused)
      done(absl::UnavailableError(
          absl::StrCat("the memory server at ", options_.client.target, " cannot be reached")));
    if (hung && stream_ != nullptr) stream_->Cancel();  // what it still owes is sent again
    if (to_send.empty()) continue;
    if (open || stream_ == nullptr) {
      stream_.reset();  // without the lock: its last callbacks take it
      stream_ = client_->OpenRetrieve();
    }
    {
      const std::lock_guard lock(mutex_);
      if (ending_) break;
      writing_ = stream_.get();
      changed_.notify_all();
    }
    for (auto& [number, request] : to_send) {
      stream_->Send(
          std::move(request),
          [this, n = number, generation](absl::StatusOr<RetrieveAnswer> answer) {
            Answered(n, generation, std::move(answer));
          },
          [this, n = number](const RetrieveAnswer& so_far, const std::vector<RecordId>& fresh) {
            PartCame(n, so_far, fresh);
          });
    }
    const std::lock_guard lock(mutex_);
    writing_ = nullptr;
    changed_.notify_all();
  }
  stream_.reset();
  std::map<uint64_t, Pending> left;
  {
    const std::lock_guard lock(mutex_);
    left.swap(pending_);
  }
  for (auto& [number, pending] : left)
    pending.done(absl::CancelledError("the memory source is shutting down"));
}

void RemoteMemorySource::WatchWrites() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ending_ || writing_ != nullptr; });
    absl::Time limit = absl::InfiniteFuture();
    for (const auto& [number, pending] : pending_) {
      if (pending.sent) limit = std::min(limit, pending.deadline + kAnswerGrace);
    }
    const auto over = [this] { return ending_ || writing_ == nullptr; };
    if (!changed_.wait_until(lock, absl::ToChronoTime(limit), over) || ending_) {
      if (writing_ != nullptr) writing_->Cancel();
      changed_.wait(lock, [this] { return writing_ == nullptr; });
    }
    if (ending_) return;
  }
}

void RemoteMemorySource::Answered(uint64_t number, uint64_t generation,
                                  absl::StatusOr<RetrieveAnswer> answer) {
  SourceCallback done;
  {
    const std::lock_guard lock(mutex_);
    const auto found = pending_.find(number);
    if (absl::IsUnavailable(answer.status()) || absl::IsCancelled(answer.status())) {
      // The stream has ended; a thread that is waiting for a new one sends this again.
      if (found != pending_.end() && found->second.generation == generation)
        found->second.sent = false;
      if (!lost_ && generation == generation_) {
        const absl::Time now = absl::Now();
        lost_ = true;
        lost_at_ = std::min(lost_at_, now);
        try_at_ = now + pause_;
        pause_ = std::min(2 * pause_, options_.longest_pause);
      }
      changed_.notify_all();
      return;
    }
    lost_at_ = absl::InfiniteFuture();
    pause_ = options_.first_pause;
    if (answer.ok()) {
      for (const auto& [id, record] : answer->records) {
        // What nobody waits for any more goes nowhere, so it is not here, unless as a part it went.
        if (found != pending_.end()) {
          here_.insert(id);
        } else if (!here_.contains(id)) {
          evicted_.push_back(id);
        }
      }
      // The server may believe that these are here: what came damaged.
      for (const auto& [id, why] : answer->unreadable) {
        if (!here_.contains(id)) evicted_.push_back(id);
      }
    }
    if (found == pending_.end()) return;
    done = std::move(found->second.done);
    pending_.erase(found);
  }
  if (!answer.ok()) {
    done(answer.status());
  } else {
    done(FromWire(*std::move(answer)));
  }
}

void RemoteMemorySource::PartCame(uint64_t number, const RetrieveAnswer& so_far,
                                  const std::vector<RecordId>& fresh) {
  std::function<void(SourceAnswer)> part;
  bool with_hits = false;
  {
    const std::lock_guard lock(mutex_);
    const auto found = pending_.find(number);
    if (found == pending_.end() || !found->second.part) return;
    part = found->second.part;
    with_hits = !std::exchange(found->second.told_hits, true);
    here_.insert(fresh.begin(), fresh.end());
  }
  absl::StatusOr<SourceAnswer> answer =
      with_hits ? FromWire(so_far.hits) : absl::StatusOr<SourceAnswer>(SourceAnswer());
  if (!answer.ok()) return;  // so will the answer say
  for (const RecordId& id : fresh) {
    const std::shared_ptr<const std::string>& record = so_far.records.at(id);
    answer->records[id] = {*record, record};
  }
  part(*std::move(answer));
}

}  // namespace memory3
