// Where the memories that a model reads come from: a memory server over the wire
// (remote_memory_source.h) or a store in this process (embedded_memory_source.h).
//
// Thread-safety: every method from any thread. Open may block for as long as its implementation
// says; Retrieve never blocks and answers through its callback, exactly once.
// Ownership: a MemoryBase is shared by the requests that read it and keeps its version readable; it
// must not outlive its source.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory3/v1/memory.pb.h"

namespace memory3 {

// What a knowledge base must have been made with for this process to read it.
struct ReaderIdentity {
  Hash256 writer_fingerprint;
  Hash256 embedder_fingerprint;
  uint32_t embedding_dimension = 0;
  v1::Geometry geometry;
};

// FAILED_PRECONDITION naming the knowledge base and what differs.
absl::Status CheckReadable(const v1::KnowledgeBaseSpec& spec, const ReaderIdentity& reader);

struct SourceQuery {
  std::vector<float> embedding;
  uint32_t top_k = 0;
  std::optional<float> min_score;
  v1::Filter filter;
};

// A record's bytes, kept alive by `owner`. Checked (CheckRecord), not yet decoded.
struct RecordBytes {
  std::string_view bytes;
  std::shared_ptr<const void> owner;
};

struct SourceHit {
  RecordId id;
  float score = 0;
  std::vector<v1::Source> sources;
};

struct SourceAnswer {
  std::vector<std::vector<SourceHit>> queries;  // by falling score, at most one hit a record
  // Of records that the source believes are not here yet.
  absl::flat_hash_map<RecordId, RecordBytes> records;
  // Of the hits' records those that the store cannot read, and why; never of a part. They are not
  // here, and their next hit tries again.
  absl::flat_hash_map<RecordId, absl::Status> unreadable = {};
};

struct SourceRequest {
  std::vector<SourceQuery> queries;
  bool with_text = false;
  // The answer is of no use later. The callback comes at about this time at the latest.
  absl::Time deadline = absl::InfiniteFuture();
  // Records whose bytes are wanted although the source may believe that they are here.
  std::vector<RecordId> missing;
  // Told of what comes before the end, by sources that know: of all queries' hits, once, then of
  // records. The answer has them too. Runs as `done` does, and may run beside or after it.
  std::function<void(SourceAnswer)> part = nullptr;
};

using SourceCallback = std::function<void(absl::StatusOr<SourceAnswer>)>;

// One version of one knowledge base.
class MemoryBase {
 public:
  virtual ~MemoryBase() = default;

  const std::string& tenant() const { return tenant_; }
  const std::string& name() const { return name_; }  // aliases resolved
  uint64_t version() const { return version_; }
  const std::shared_ptr<const Codec>& codec() const { return codec_; }

  // `done` runs on a thread of the source and must not block. Answers of one base come in the order
  // of their requests. UNAVAILABLE: the store cannot be reached. DEADLINE_EXCEEDED.
  virtual void Retrieve(SourceRequest request, SourceCallback done) = 0;
  // These records are no longer here; their bytes are wanted again with their next hit.
  virtual void Evicted(const RecordId& id) = 0;

 protected:
  MemoryBase(std::string tenant, std::string name, uint64_t version,
             std::shared_ptr<const Codec> codec)
      : tenant_(std::move(tenant)),
        name_(std::move(name)),
        version_(version),
        codec_(std::move(codec)) {}

 private:
  const std::string tenant_;
  const std::string name_;
  const uint64_t version_;
  const std::shared_ptr<const Codec> codec_;
};

class MemorySource {
 public:
  virtual ~MemorySource() = default;

  // The published version of `knowledge_base` (a name or alias) now. NOT_FOUND,
  // FAILED_PRECONDITION (CheckReadable); UNAVAILABLE or DEADLINE_EXCEEDED where the store does not
  // say by `deadline`.
  virtual absl::StatusOr<std::shared_ptr<MemoryBase>> Open(std::string_view tenant,
                                                           std::string_view knowledge_base,
                                                           absl::Time deadline) = 0;
  // Names of those that Open would accept now.
  virtual absl::StatusOr<std::vector<std::string>> List(std::string_view tenant) = 0;
  // Retrievals under way, and those that come later, may end with CANCELLED at once.
  virtual void Shutdown() {}
};

}  // namespace memory3
