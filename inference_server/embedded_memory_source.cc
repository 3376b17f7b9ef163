#include "inference_server/embedded_memory_source.h"

#include <utility>

#include "absl/time/clock.h"
#include "memory_server/conversions.h"

namespace memory3 {
class EmbeddedMemorySource::Base final
    : public MemoryBase,
      public std::enable_shared_from_this<EmbeddedMemorySource::Base> {
 public:
  Base(EmbeddedMemorySource* source, std::shared_ptr<const VersionPin> pin,
       std::shared_ptr<const Codec> codec)
      : MemoryBase(pin->tenant(), pin->knowledge_base(), pin->version(), std::move(codec)),
        source_(source),
        pin_(std::move(pin)) {}

  void Retrieve(SourceRequest request, SourceCallback done) override {
    source_->worker_.Add([self = shared_from_this(), request = std::move(request),
                          done = std::move(done)] { done(self->Search(request)); });
  }

  void Evicted(const RecordId& id) override {
    const std::lock_guard lock(mutex_);
    sent_.erase(id);
  }

 private:
  absl::StatusOr<SourceAnswer> Search(const SourceRequest& request) {
    if (absl::Now() >= request.deadline) {
      return absl::DeadlineExceededError("the retrieval's time was over before it began");
    }
    std::vector<Query> queries;
    for (const SourceQuery& query : request.queries) {
      Query& q = queries.emplace_back();
      q.embedding = query.embedding;
      q.top_k = query.top_k;
      q.min_score = query.min_score;
      q.filter = FromProto(query.filter);
    }
    absl::StatusOr<RetrieveResult> found = source_->store_->Retrieve(
        *pin_, queries, {.with_text = request.with_text, .deadline = request.deadline});
    if (!found.ok()) return found.status();
    SourceAnswer answer;
    std::vector<RecordId> wanted;
    {
      const std::lock_guard lock(mutex_);
      for (const RecordId& id : request.missing) sent_.erase(id);
      for (const std::vector<Hit>& hits : found->queries) {
        std::vector<SourceHit>& out = answer.queries.emplace_back();
        for (const Hit& hit : hits) {
          SourceHit& h = out.emplace_back(SourceHit{hit.record_id, hit.score, {}});
          for (const Source& source : hit.sources) h.sources.push_back(ToProto(source));
          if (sent_.insert(hit.record_id).second) wanted.push_back(hit.record_id);
        }
      }
    }
    if (wanted.empty()) return answer;
    const std::vector<absl::StatusOr<RecordView>> records = found->records->Read(wanted);
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (records[i].ok()) {
        answer.records[wanted[i]] = {records[i]->bytes, records[i]->owner};
      } else {
        answer.unreadable[wanted[i]] = records[i].status();
        sent_.erase(wanted[i]);
      }
    }
    return answer;
  }

  EmbeddedMemorySource* const source_;
  const std::shared_ptr<const VersionPin> pin_;
  std::mutex mutex_;
  absl::flat_hash_set<RecordId> sent_;  // and not Evicted since
};

EmbeddedMemorySource::EmbeddedMemorySource(MemoryStore* store, ReaderIdentity reader)
    : store_(store), reader_(std::move(reader)), worker_(1) {}

absl::StatusOr<std::shared_ptr<MemoryBase>> EmbeddedMemorySource::Open(
    std::string_view tenant, std::string_view knowledge_base, absl::Time) {
  absl::StatusOr<std::shared_ptr<const VersionPin>> pin =
      store_->Pin(tenant, knowledge_base, std::nullopt);
  if (!pin.ok()) return pin.status();
  if (absl::Status status = CheckReadable(ToProto((*pin)->spec()), reader_); !status.ok())
    return status;
  const std::pair<std::string, std::string> key(tenant, (*pin)->knowledge_base());
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = bases_.find(key); known != bases_.end()) {
      if (std::shared_ptr<Base> base = known->second.lock();
          base != nullptr && base->version() == (*pin)->version())
        return base;
    }
  }
  std::string codebook;
  if ((*pin)->spec().codec == CodecId::kVq) {
    absl::StatusOr<KnowledgeBaseInfo> info =
        store_->GetKnowledgeBase(tenant, key.second, /*with_codebook=*/true);
    if (!info.ok()) return info.status();
    codebook = std::move(info->spec.codebook);
  }
  absl::StatusOr<std::unique_ptr<Codec>> codec =
      MakeCodec((*pin)->spec().codec, (*pin)->spec().geometry.head_dim, codebook);
  if (!codec.ok()) return codec.status();
  auto base = std::make_shared<Base>(this, *std::move(pin), *std::move(codec));
  const std::lock_guard lock(mutex_);
  bases_[key] = base;
  return base;
}

absl::StatusOr<std::vector<std::string>> EmbeddedMemorySource::List(std::string_view tenant) {
  absl::StatusOr<std::vector<KnowledgeBaseInfo>> infos = store_->ListKnowledgeBases(tenant);
  if (!infos.ok()) return infos.status();
  std::vector<std::string> names;
  for (const KnowledgeBaseInfo& info : *infos) {
    if (CheckReadable(ToProto(info.spec), reader_).ok()) names.push_back(info.spec.name);
  }
  return names;
}

}  // namespace memory3
