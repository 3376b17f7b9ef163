#include "inference_server/memory_reader.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "memory/vq_codec.h"

namespace memory3 {
namespace {

// A record may be evicted between its retrieval and its answer; it is then asked for once more.
constexpr int kAttempts = 3;

}  // namespace

struct MemoryReader::Retrieval {
  struct Query {
    struct Hit {
      size_t rank = 0;
      SourceHit hit;
    };
    std::vector<Hit> wanted;  // hits whose records have not come
    size_t left = 0;          // hits that are not told of: `wanted` and those being decoded
    absl::Status status;      // why memories are missing
    bool ended = false;
  };

  std::vector<SourceQuery> questions;
  bool with_text = false;
  absl::Time deadline;
  absl::Time begun = absl::Now();

  std::shared_ptr<MemoryBase> base;  // until it is over

  std::mutex mutex;  // guards what follows; held while `done` runs
  Callback done;
  std::vector<Query> queries;
  bool has_hits = false;
  int attempts = 0;
  int decoding = 0;       // tasks
  bool answered = false;  // nothing more comes
  bool over = false;      // the reader may be gone

  // Tells of memories of one query, and of its end if that is all.
  void Tell(size_t q, std::vector<ReadMemory> memories) {
    Query& query = queries[q];
    if (query.ended) return;
    query.ended = query.left == 0;
    if (query.ended || !memories.empty())
      done(q, {std::move(memories), query.ended, query.ended ? query.status : absl::OkStatus()});
  }
};

// A hit whose record is in the cache.
struct MemoryReader::Arrived {
  size_t query = 0;
  ReadMemory read;
};

namespace {

// A memory without values, its codes beside it.
absl::StatusOr<ExplicitMemory> KeepCodes(std::string_view record, const Hash256& fingerprint,
                                         const VqCodec& codec, std::string* codes) {
  absl::StatusOr<RecordHeader> header = CheckRecord(record);
  if (!header.ok()) return header.status();
  if (absl::Status status = CheckRecordFits(*header, fingerprint, codec); !status.ok())
    return status;
  const std::string_view payload = RecordPayload(record);
  absl::Status status =
      codec.CheckCodes({reinterpret_cast<const uint8_t*>(payload.data()), payload.size()});
  if (!status.ok()) return status;
  *codes = payload;
  return ExplicitMemory{header->shape, header->reference_tokens, {}};
}

}  // namespace

absl::Status HostMemory::Decode(const Hash256& writer_fingerprint, const MemoryShape& shape,
                                bool keep_codes) {
  const std::lock_guard lock(mutex_);
  if (decoded_) return status_;
  decoded_ = true;
  const auto* vq = keep_codes ? dynamic_cast<const VqCodec*>(codec_.get()) : nullptr;
  absl::StatusOr<ExplicitMemory> memory =
      vq != nullptr ? KeepCodes(record_.bytes, writer_fingerprint, *vq, &codes_)
                    : DecodeRecord(record_.bytes, writer_fingerprint, *codec_);
  if (!memory.ok()) {
    status_ = absl::Status(memory.status().code(),
                           absl::StrCat("record ", id_.ToHex(), ": ", memory.status().message()));
  } else if (memory->shape.layers != shape.layers || memory->shape.kv_heads != shape.kv_heads ||
             memory->shape.head_dim != shape.head_dim || memory->shape.tokens > shape.tokens) {
    status_ = absl::FailedPreconditionError(absl::StrCat(
        "record ", id_.ToHex(), " is a memory of ", memory->shape.layers, " layers, ",
        memory->shape.kv_heads, " KV heads, ", memory->shape.tokens, " tokens, head size ",
        memory->shape.head_dim, ", which the model cannot read"));
  } else {
    memory_ = *std::move(memory);
  }
  record_ = {};
  if (vq == nullptr) codec_ = nullptr;
  return status_;
}

MemoryReader::MemoryReader(const Embedder* embedder, const Hash256& writer_fingerprint,
                           const MemoryShape& shape, const MemoryReaderOptions& options)
    : embedder_(embedder),
      writer_fingerprint_(writer_fingerprint),
      shape_(shape),
      options_(options),
      workers_(std::max(1, options.threads)) {}

MemoryReader::~MemoryReader() {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return under_way_ == 0; });
}

void MemoryReader::Read(std::shared_ptr<MemoryBase> base, std::vector<ReadQuery> queries,
                        bool with_text, absl::Time deadline, Callback done) {
  {
    const std::lock_guard lock(mutex_);
    ++under_way_;
    ++stats_.retrievals;
  }
  auto retrieval = std::make_shared<Retrieval>();
  retrieval->base = std::move(base);
  retrieval->with_text = with_text;
  retrieval->deadline = deadline;
  retrieval->done = std::move(done);
  retrieval->queries.resize(queries.size());
  workers_.Add([this, retrieval, queries = std::move(queries)]() mutable {
    std::vector<std::string_view> texts;
    for (const ReadQuery& query : queries) texts.push_back(query.text);
    const int dimension = embedder_->dimension();
    std::vector<float> vectors(texts.size() * dimension);
    if (absl::Status status = embedder_->Embed(texts, vectors); !status.ok()) {
      const std::lock_guard lock(retrieval->mutex);
      Fail(*retrieval, status);
      return;
    }
    for (size_t i = 0; i < queries.size(); ++i) {
      const auto begin = vectors.begin() + i * dimension;
      retrieval->questions.push_back({std::vector<float>(begin, begin + dimension),
                                      queries[i].top_k, queries[i].min_score,
                                      std::move(queries[i].filter)});
    }
    Ask(retrieval, {});
  });
}

// Without the retrieval's mutex: a source may answer at once.
void MemoryReader::Ask(const std::shared_ptr<Retrieval>& retrieval, std::vector<RecordId> missing) {
  SourceRequest request{retrieval->questions, retrieval->with_text, retrieval->deadline,
                        std::move(missing)};
  request.part = [this, retrieval](SourceAnswer part) {
    const std::lock_guard lock(retrieval->mutex);
    if (retrieval->over || retrieval->answered) return;
    Take(retrieval, part, /*whole=*/false);
  };
  {
    const std::lock_guard lock(retrieval->mutex);
    ++retrieval->attempts;
  }
  const std::shared_ptr<MemoryBase> base = retrieval->base;  // the answer may be quicker
  base->Retrieve(std::move(request), [this, retrieval](absl::StatusOr<SourceAnswer> answer) {
    Received(retrieval, std::move(answer));
  });
}

void MemoryReader::Received(const std::shared_ptr<Retrieval>& retrieval,
                            absl::StatusOr<SourceAnswer> answer) {
  std::vector<RecordId> missing;
  {
    const std::lock_guard lock(retrieval->mutex);
    if (answer.ok() && answer->queries.size() != retrieval->queries.size()) {
      answer =
          absl::InternalError(absl::StrCat("the memory source answered ", answer->queries.size(),
                                           " of ", retrieval->queries.size(), " queries"));
    }
    if (!answer.ok()) {
      {
        const std::lock_guard cache_lock(mutex_);
        Shrink();  // parts of it may have come
      }
      Fail(*retrieval, answer.status());
      return;
    }
    Take(retrieval, *answer, /*whole=*/true);
    missing = Missing(*retrieval, *answer);
    if (missing.empty()) {
      retrieval->answered = true;
      {
        const std::lock_guard cache_lock(mutex_);
        Shrink();
      }
      FinishIfOver(*retrieval);
      return;
    }
  }
  Ask(retrieval, std::move(missing));
}

void MemoryReader::Take(const std::shared_ptr<Retrieval>& retrieval, SourceAnswer& answer,
                        bool whole) {
  Retrieval& r = *retrieval;
  const bool fresh = !r.has_hits && answer.queries.size() == r.queries.size();
  if (fresh) {
    r.has_hits = true;
    for (size_t q = 0; q < r.queries.size(); ++q) {
      std::vector<SourceHit>& hits = answer.queries[q];
      r.queries[q].left = hits.size();
      for (size_t rank = 0; rank < hits.size(); ++rank)
        r.queries[q].wanted.push_back(
            {rank, {hits[rank].id, hits[rank].score, std::move(hits[rank].sources)}});
    }
  }
  // In the order of answers: a record that a later answer believes to be here is in the cache,
  // decoded or not.
  std::vector<Arrived> arrived;
  {
    const std::lock_guard lock(mutex_);
    for (size_t q = 0; q < r.queries.size(); ++q) {
      std::erase_if(r.queries[q].wanted, [&](Retrieval::Query::Hit& wanted) {
        const auto brought = answer.records.find(wanted.hit.id);
        const bool from_store = brought != answer.records.end();
        if (!from_store && !fresh && !whole) return false;
        const Key key(r.base->tenant(), wanted.hit.id);
        if (from_store) Keep(r, key, brought->second);  // a copy: two queries may have it
        const auto entry = cache_.find(key);
        if (entry == cache_.end()) return false;
        ages_.splice(ages_.begin(), ages_, entry->second.age);
        ++(from_store ? stats_.store_hits : stats_.host_hits);
        arrived.push_back({q,
                           {wanted.rank, wanted.hit.score, std::move(wanted.hit.sources),
                            from_store, entry->second.memory}});
        return true;
      });
    }
  }
  for (size_t q = 0; q < r.queries.size() && fresh; ++q) r.Tell(q, {});  // of what has no hits
  if (arrived.empty()) return;
  ++r.decoding;
  workers_.Add([this, retrieval, arrived = std::move(arrived)]() mutable {
    Decode(retrieval, std::move(arrived));
  });
}

// mutex_ is held too.
void MemoryReader::Keep(const Retrieval& retrieval, const Key& key, RecordBytes record) {
  if (cache_.contains(key)) return;
  const int64_t record_bytes = static_cast<int64_t>(record.bytes.size());
  ages_.push_front(key);
  Entry& entry = cache_[key];
  entry.memory =
      std::make_shared<HostMemory>(key.second, std::move(record), retrieval.base->codec());
  entry.base = retrieval.base;
  entry.bytes = KeepsCodes(*retrieval.base->codec())
                    ? record_bytes
                    : shape_.values() * static_cast<int64_t>(sizeof(float));
  entry.age = ages_.begin();
  stats_.cache_bytes += entry.bytes;
  stats_.bytes_loaded += record_bytes;
}

std::vector<RecordId> MemoryReader::Missing(Retrieval& retrieval, const SourceAnswer& answer) {
  std::vector<RecordId> missing;
  for (size_t q = 0; q < retrieval.queries.size(); ++q) {
    Retrieval::Query& query = retrieval.queries[q];
    const auto give_up = [&](const Retrieval::Query::Hit& wanted) {
      if (const auto bad = answer.unreadable.find(wanted.hit.id); bad != answer.unreadable.end()) {
        // A hit's record that is gone is lost as well.
        query.status = absl::Status(
            absl::IsNotFound(bad->second) ? absl::StatusCode::kDataLoss : bad->second.code(),
            bad->second.message());
        return true;
      }
      // Asked for again it is no hit any more: it has been deleted meanwhile.
      const auto same = [&](const SourceHit& hit) { return hit.id == wanted.hit.id; };
      if (std::none_of(answer.queries[q].begin(), answer.queries[q].end(), same)) return true;
      if (retrieval.attempts < kAttempts) {
        missing.push_back(wanted.hit.id);
        return false;
      }
      query.status = absl::DataLossError(
          absl::StrCat("the bytes of record ", wanted.hit.id.ToHex(), " did not come"));
      return true;
    };
    const size_t given_up = std::erase_if(query.wanted, give_up);
    query.left -= given_up;
    if (given_up > 0) retrieval.Tell(q, {});
  }
  return missing;
}

void MemoryReader::Decode(const std::shared_ptr<Retrieval>& retrieval,
                          std::vector<Arrived> arrived) {
  for (size_t begin = 0, end = 0; begin < arrived.size(); begin = end) {
    const size_t q = arrived[begin].query;
    std::vector<ReadMemory> sound;
    absl::Status failed;
    for (end = begin; end < arrived.size() && arrived[end].query == q; ++end) {
      ReadMemory& read = arrived[end].read;
      absl::Status status =
          std::const_pointer_cast<HostMemory>(read.memory)
              ->Decode(writer_fingerprint_, shape_, KeepsCodes(*retrieval->base->codec()));
      if (status.ok()) {
        sound.push_back(std::move(read));
      } else {
        Drop({retrieval->base->tenant(), read.memory->id()});
        failed = std::move(status);
      }
    }
    const std::lock_guard lock(retrieval->mutex);
    Retrieval::Query& query = retrieval->queries[q];
    if (!failed.ok()) query.status = std::move(failed);
    query.left -= end - begin;
    retrieval->Tell(q, std::move(sound));
  }
  const std::lock_guard lock(retrieval->mutex);
  --retrieval->decoding;
  FinishIfOver(*retrieval);
}

void MemoryReader::Fail(Retrieval& retrieval, const absl::Status& status) {
  for (size_t q = 0; q < retrieval.queries.size(); ++q) {
    Retrieval::Query& query = retrieval.queries[q];
    if (!query.ended) retrieval.done(q, {{}, true, status});
    query.ended = true;
  }
  retrieval.answered = true;
  FinishIfOver(retrieval);
}

void MemoryReader::FinishIfOver(Retrieval& retrieval) {
  if (!retrieval.answered || retrieval.decoding > 0) return;
  if (options_.on_retrieved) options_.on_retrieved(absl::Now() - retrieval.begun);
  retrieval.over = true;
  retrieval.done = nullptr;
  retrieval.base = nullptr;
  const std::lock_guard lock(mutex_);
  if (--under_way_ == 0) finished_.notify_all();
}

void MemoryReader::Drop(const Key& key) {
  const std::lock_guard lock(mutex_);
  const auto entry = cache_.find(key);
  if (entry == cache_.end()) return;
  if (const std::shared_ptr<MemoryBase> base = entry->second.base.lock()) base->Evicted(key.second);
  stats_.cache_bytes -= entry->second.bytes;
  ages_.erase(entry->second.age);
  cache_.erase(entry);
}

void MemoryReader::Shrink() {
  auto oldest = ages_.end();
  while (stats_.cache_bytes > options_.cache_bytes && oldest != ages_.begin()) {
    --oldest;
    const auto entry = cache_.find(*oldest);
    if (entry->second.memory.use_count() > 1) continue;  // in use: its bytes would stay anyway
    if (const std::shared_ptr<MemoryBase> base = entry->second.base.lock())
      base->Evicted(entry->first.second);
    stats_.cache_bytes -= entry->second.bytes;
    oldest = ages_.erase(oldest);
    cache_.erase(entry);
  }
}

MemoryReaderStats MemoryReader::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace memory3
