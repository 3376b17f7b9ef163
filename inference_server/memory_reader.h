// Reads memories for queries: embeds their texts, asks the source, keeps what came in the host's
// cache, decodes it on its own threads. The cache is bounded in bytes, evicts what was used longest
// ago, is shared by all requests, and is consulted only for ids that a retrieval has just returned.
//
// A record that is damaged, another model's or cannot be read is never handed out: the queries that
// hit it have an error status (DATA_LOSS where it is damaged or gone) beside the memories that are
// sound, other queries are not affected, and the record leaves the cache.
//
// Thread-safety: any thread. Ownership: memories that are in use stay, whatever the cache evicts; a
// reader's destructor waits for retrievals under way. The embedder must outlive the reader.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "embedder/embedder.h"
#include "inference_server/memory_source.h"
#include "inference_server/worker_threads.h"
#include "memory/explicit_memory.h"

namespace memory3 {

// A memory in host memory: its values, or the codes of its record where the device decodes them.
// Does not change once Decode has succeeded; the accessors are for then.
class HostMemory {
 public:
  HostMemory(RecordId id, RecordBytes record, std::shared_ptr<const Codec> codec)
      : id_(id), record_(std::move(record)), codec_(std::move(codec)) {}

  const RecordId& id() const { return id_; }
  // Without values where codec() is not null.
  const ExplicitMemory& memory() const { return memory_; }
  // Null: decoded. Else of codes(), which fit the shape and have been checked.
  const Codec* codec() const { return codec_.get(); }
  std::span<const uint8_t> codes() const {
    return {reinterpret_cast<const uint8_t*>(codes_.data()), codes_.size()};
  }

 private:
  friend class MemoryReader;
  // Once; later calls answer what the first did. `shape`: the largest a slot holds.
  absl::Status Decode(const Hash256& writer_fingerprint, const MemoryShape& shape, bool keep_codes);

  const RecordId id_;
  std::mutex mutex_;  // guards what follows until Decode has succeeded
  bool decoded_ = false;
  absl::Status status_;
  RecordBytes record_;  // until it is decoded
  std::shared_ptr<const Codec> codec_;
  std::string codes_;
  ExplicitMemory memory_;
};

struct ReadQuery {
  std::string text;
  uint32_t top_k = 0;
  std::optional<float> min_score;
  v1::Filter filter;
};

struct ReadMemory {
  size_t rank = 0;  // its place among the query's hits
  float score = 0;
  std::vector<v1::Source> sources;
  bool from_store = false;  // its bytes came with this answer; else they were in the cache
  std::shared_ptr<const HostMemory> memory;
};

struct ReadResult {
  std::vector<ReadMemory> memories;
  bool last = false;    // nothing more comes for this query
  absl::Status status;  // with `last`: why memories are missing
};

struct MemoryReaderOptions {
  int64_t cache_bytes = int64_t{1} << 30;  // of memories, decoded or not
  int threads = 2;                         // that embed and decode
  // Memories in the vq codec stay encoded in the cache (Device::DecodesVectors).
  bool device_decodes_vq = false;
  // Told how long a retrieval took, from texts to memories that can be read; any thread.
  std::function<void(absl::Duration)> on_retrieved = nullptr;
};

struct MemoryReaderStats {
  uint64_t retrievals = 0;
  uint64_t host_hits = 0;
  uint64_t store_hits = 0;
  uint64_t bytes_loaded = 0;  // of records
  int64_t cache_bytes = 0;
};

class MemoryReader {
 public:
  // `shape`: that of a full-length memory of the model.
  MemoryReader(const Embedder* embedder, const Hash256& writer_fingerprint,
               const MemoryShape& shape, const MemoryReaderOptions& options);
  ~MemoryReader();

  using Callback = std::function<void(size_t query, ReadResult)>;
  // One retrieval for all `queries`. `done` gets each query's memories as they come and are
  // decoded, at once or one after the other, in any order; one call is the query's last. It runs on
  // threads of the reader or the source, one call at a time, and must not block.
  void Read(std::shared_ptr<MemoryBase> base, std::vector<ReadQuery> queries, bool with_text,
            absl::Time deadline, Callback done);
  MemoryReaderStats stats() const;

 private:
  using Key = std::pair<std::string, RecordId>;  // a tenant may name what it likes by an id
  struct Entry {
    std::shared_ptr<HostMemory> memory;
    std::weak_ptr<MemoryBase> base;  // that brought it and is told when it goes
    int64_t bytes = 0;
    std::list<Key>::iterator age;
  };
  struct Retrieval;
  struct Arrived;

  void Ask(const std::shared_ptr<Retrieval>& retrieval, std::vector<RecordId> missing);
  void Received(const std::shared_ptr<Retrieval>& retrieval, absl::StatusOr<SourceAnswer> answer);
  // For the next five the retrieval's mutex is held.
  // Of the hits those whose records are here now, or in the cache, go on to be decoded. Takes
  // records and sources out of `answer`.
  void Take(const std::shared_ptr<Retrieval>& retrieval, SourceAnswer& answer, bool whole);
  void Keep(const Retrieval& retrieval, const Key& key, RecordBytes record);
  // What to ask for again; the hits of it that nobody will ever bring are given up.
  std::vector<RecordId> Missing(Retrieval& retrieval, const SourceAnswer& answer);
  void Fail(Retrieval& retrieval, const absl::Status& status);
  // Tells of the end, once all queries have theirs and nothing is being decoded.
  void FinishIfOver(Retrieval& retrieval);

  void Decode(const std::shared_ptr<Retrieval>& retrieval, std::vector<Arrived> arrived);
  void Drop(const Key& key);
  bool KeepsCodes(const Codec& codec) const {
    return options_.device_decodes_vq && codec.id() == CodecId::kVq;
  }
  void Shrink();  // mutex_ is held

  const Embedder* const embedder_;
  const Hash256 writer_fingerprint_;
  const MemoryShape shape_;
  const MemoryReaderOptions options_;
  mutable std::mutex mutex_;  // guards what follows but the threads
  std::condition_variable finished_;
  int under_way_ = 0;
  absl::flat_hash_map<Key, Entry> cache_;
  std::list<Key> ages_;  // used last first
  MemoryReaderStats stats_;
  WorkerThreads workers_;
};

}  // namespace memory3
