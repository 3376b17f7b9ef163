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
  std::shared_ptr<MemoryBase> base;
  std::vector<SourceQuery> queries;
  bool with_text = false;
  absl::Time deadline;
  Callback done;
  int attempt = 0;
  absl::Time begun = absl::Now();
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
  workers_.Add([this, retrieval, queries = std::move(queries)]() mutable {
    std::vector<std::string_view> texts;
    for (const ReadQuery& query : queries) texts.push_back(query.text);
    const int dimension = embedder_->dimension();
    std::vector<float> vectors(texts.size() * dimension);
    if (absl::Status status = embedder_->Embed(texts, vectors); !status.ok()) {
      retrieval->queries.resize(queries.size());
      Fail(*retrieval, status);
      return;
    }
    for (size_t i = 0; i < queries.size(); ++i) {
      const auto begin = vectors.begin() + i * dimension;
      retrieval->queries.push_back({std::vector<float>(begin, begin + dimension), queries[i].top_k,
                                    queries[i].min_score, std::move(queries[i].filter)});
    }
    Ask(retrieval, {});
  });
}

void MemoryReader::Ask(std::shared_ptr<Retrieval> retrieval, std::vector<RecordId> missing) {
  ++retrieval->attempt;
  SourceRequest request{retrieval->queries, retrieval->with_text, retrieval->deadline,
                        std::move(missing)};
  MemoryBase& base = *retrieval->base;
  base.Retrieve(std::move(request),
                [this, retrieval = std::move(retrieval)](absl::StatusOr<SourceAnswer> answer) {
                  Received(retrieval, std::move(answer));
                });
}

void MemoryReader::Received(const std::shared_ptr<Retrieval>& retrieval,
                            absl::StatusOr<SourceAnswer> answer) {
  if (answer.ok() && answer->queries.size() != retrieval->queries.size()) {
    answer = absl::InternalError(absl::StrCat("the memory source answered ", answer->queries.size(),
                                              " of ", retrieval->queries.size(), " queries"));
  }
  if (!answer.ok()) {
    Fail(*retrieval, answer.status());
    return;
  }
  // In the order of answers, before the next one: a record that a later answer believes to be here
  // is in the cache, decoded or not.
  std::vector<ReadResult> results(answer->queries.size());
  std::vector<RecordId> missing;
  {
    const std::lock_guard lock(mutex_);
    for (size_t q = 0; q < results.size(); ++q) {
      for (SourceHit& hit : answer->queries[q]) {
        const Key key(retrieval->base->tenant(), hit.id);
        const auto brought = answer->records.find(hit.id);
        auto entry = cache_.find(key);
        if (entry == cache_.end()) {
          if (brought == answer->records.end()) {
            missing.push_back(hit.id);
            continue;
          }
          ages_.push_front(key);
          Entry& fresh = cache_[key];
          fresh.memory = std::make_shared<HostMemory>(hit.id, std::move(brought->second),
                                                      retrieval->base->codec());
          fresh.base = retrieval->base;
          fresh.bytes = KeepsCodes(*retrieval->base->codec())
                            ? static_cast<int64_t>(fresh.memory->record_.bytes.size())
                            : shape_.values() * static_cast<int64_t>(sizeof(float));
          fresh.age = ages_.begin();
          stats_.cache_bytes += fresh.bytes;
          stats_.bytes_loaded += fresh.memory->record_.bytes.size();
          entry = cache_.find(key);
        }
        ages_.splice(ages_.begin(), ages_, entry->second.age);
        const bool from_store = brought != answer->records.end();
        ++(from_store ? stats_.store_hits : stats_.host_hits);
        results[q].memories.push_back(
            {hit.score, std::move(hit.sources), from_store, entry->second.memory});
      }
    }
    if (missing.empty()) Shrink();
  }
  if (!missing.empty()) {
    if (retrieval->attempt < kAttempts) {
      Ask(retrieval, std::move(missing));
      return;
    }
    Fail(*retrieval, absl::DataLossError(absl::StrCat("the bytes of record ",
                                                      missing.front().ToHex(), " did not come")));
    return;
  }
  workers_.Add([this, retrieval, results = std::move(results)]() mutable {
    for (size_t q = 0; q < results.size(); ++q) {
      ReadResult& result = results[q];
      std::vector<ReadMemory> sound;
      for (ReadMemory& read : result.memories) {
        absl::Status status =
            std::const_pointer_cast<HostMemory>(read.memory)
                ->Decode(writer_fingerprint_, shape_, KeepsCodes(*retrieval->base->codec()));
        if (status.ok()) {
          sound.push_back(std::move(read));
        } else {
          Drop({retrieval->base->tenant(), read.memory->id()});
          result.status = std::move(status);
        }
      }
      result.memories = std::move(sound);
      retrieval->done(q, std::move(result));
    }
    Finish(*retrieval);
  });
}

void MemoryReader::Fail(Retrieval& retrieval, const absl::Status& status) {
  for (size_t q = 0; q < retrieval.queries.size(); ++q) retrieval.done(q, {status, {}});
  Finish(retrieval);
}

void MemoryReader::Finish(Retrieval& retrieval) {
  if (options_.on_retrieved) options_.on_retrieved(absl::Now() - retrieval.begun);
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
