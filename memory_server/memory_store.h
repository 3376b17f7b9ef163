// The store of explicit memories: knowledge bases, their versions, records, entries, retrieval,
// bulk loads, snapshots. What the memory service speaks to; RocksDB stands behind it on one machine
// (rocksdb_store.h), an object store may later. Nothing here knows of a database, protobuf or gRPC.
// proto/memory3/v1/memory.proto's comments say what each call means; this says what is added or
// held.
//
// Thread-safety: every method from any thread, at any time. Reads never wait for writes.
// Ownership: what a call is given is read during the call only; what it answers owns itself
// (RecordView and VersionPin may outlive every other object but the store itself).
// Errors: absl::Status with the codes of memory.proto; the message names field and value.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "memory/codec.h"
#include "memory/hash.h"
#include "memory/record.h"

namespace memory3 {

enum class Metric : uint8_t { kCosine = 1, kInnerProduct = 2 };

// The shape of the memories of one knowledge base.
struct Geometry {
  std::vector<uint32_t> memory_layers;  // ascending
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t tokens_kept = 0;
  uint32_t reference_tokens = 0;

  bool operator==(const Geometry&) const = default;
};

// Fixed at creation.
struct KnowledgeBaseSpec {
  std::string name;
  Hash256 writer_fingerprint;
  Geometry geometry;
  CodecId codec = CodecId::kF32;
  std::string codebook;  // the file's bytes, for kVq
  Hash256 embedder_fingerprint;
  uint32_t embedding_dimension = 0;
  Metric metric = Metric::kCosine;
  std::string description;

  bool operator==(const KnowledgeBaseSpec&) const = default;
};

struct KnowledgeBaseInfo {
  KnowledgeBaseSpec spec;  // without the codebook, unless asked for
  Hash256 codebook_hash;   // zero without a codebook
  uint64_t version = 0;    // published
  uint64_t entries = 0;    // of the published version
  uint64_t records = 0;
  uint64_t documents = 0;
  uint64_t bytes_per_reference = 0;
  absl::Time created_at;
  absl::Time published_at;
  std::vector<std::string> aliases;  // ascending
  std::string index;                 // "flat", "sq8", "ivf1024,sq8,nprobe=64"
};

struct VersionInfo {
  uint64_t version = 0;
  bool published = false;
  uint64_t entries = 0;
  uint64_t records = 0;
  absl::Time published_at;
  uint32_t pins = 0;
  uint32_t layers = 0;  // parts its entries are spread over; a look-up may have to ask each
};

struct Source {
  std::string document_id;  // 1 to 512 bytes of UTF-8
  uint32_t ordinal = 0;
  std::string title;
  std::string uri;
  uint64_t char_begin = 0;
  uint64_t char_end = 0;
  std::string text;  // empty in answers unless asked for
  std::map<std::string, std::string> metadata;

  bool operator==(const Source&) const = default;
};

// An entry to put. `record` empty: the store is thought to hold it; NOT_FOUND names the id if not.
struct NewEntry {
  Source source;
  RecordId record_id;
  std::span<const float> embedding;
  std::string_view record;
};

// Bytes of one record. Copying shares; `owner` keeps `bytes` alive and may be handed to the wire so
// that the bytes are not copied again.
struct RecordView {
  std::string_view bytes;
  std::shared_ptr<const void> owner;
};

struct PutResult {
  uint64_t entries = 0;
  uint64_t new_records = 0;
};

struct StoredRecord {
  std::vector<Source> sources;  // of this knowledge base, by document id and ordinal
  RecordView record;
};

struct DeleteResult {
  uint64_t entries = 0;
  uint64_t records = 0;  // of which the knowledge base now has no entry
};

struct DocumentInfo {
  std::string document_id;
  std::string title;  // of its first entry
  std::string uri;
  uint32_t entries = 0;
};

struct DocumentPage {
  std::vector<DocumentInfo> documents;  // by id
  std::string next_page_token;          // empty: the last page
};

struct Counts {
  uint64_t entries = 0;
  uint64_t records = 0;
  uint64_t documents = 0;

  bool operator==(const Counts&) const = default;
};

struct Filter {
  std::vector<std::string> document_ids;
  std::map<std::string, std::string> metadata;

  bool empty() const { return document_ids.empty() && metadata.empty(); }
};

// An all-zero embedding under kCosine is like nothing: no hits.
struct Query {
  std::span<const float> embedding;
  uint32_t top_k = 0;  // 1 to kMaxTopK
  std::optional<float> min_score;
  Filter filter;
};

inline constexpr uint32_t kMaxTopK = 1000;
inline constexpr size_t kMaxQueries = 1024;
inline constexpr uint32_t kMaxPageSize = 1000;
inline constexpr uint32_t kMaxEmbeddingDimension = 65536;

struct Hit {
  RecordId record_id;
  float score = 0;              // inner product (of normalised vectors for kCosine), in f32
  std::vector<Source> sources;  // all of the record's entries in this version
  uint64_t record_bytes = 0;
};

// Reads records as they stood when a retrieval answered, however much is deleted since. Holding one
// holds disk space; let it go when the answer is sent. Any thread.
class RecordReader {
 public:
  virtual ~RecordReader() = default;
  // One answer per id, in order: NOT_FOUND for an unknown id, DATA_LOSS for what is damaged on
  // disk. The record's own checksum (CheckRecord) is left to whoever uses the bytes: it guards the
  // way there too.
  virtual std::vector<absl::StatusOr<RecordView>> Read(std::span<const RecordId> ids) const = 0;
};

struct RetrieveOptions {
  bool with_text = false;
  // DEADLINE_EXCEEDED between queries once it is past.
  absl::Time deadline = absl::InfiniteFuture();
};

struct RetrieveResult {
  std::vector<std::vector<Hit>> queries;  // in order; hits by falling score, ties by rising id
  std::shared_ptr<const RecordReader> records;
};

// Keeps one version of one knowledge base readable: dropping the version or deleting the knowledge
// base waits, in the background, until its last pin is gone. Destroying it unpins. A restore of a
// snapshot ends all pins: calls with one then answer ABORTED; pin anew.
class VersionPin {
 public:
  virtual ~VersionPin() = default;
  virtual const std::string& tenant() const = 0;
  virtual const std::string& knowledge_base() const = 0;  // its name, aliases resolved
  virtual uint64_t version() const = 0;
  virtual const KnowledgeBaseSpec& spec() const = 0;  // without the codebook
};

enum class LoadMode : uint8_t { kAppend = 1, kReplace = 2 };
enum class LoadState : uint8_t {
  kLoading = 1,
  kIndexing = 2,
  kCommitted = 3,
  kAborted = 4,
  kFailed = 5
};

struct LoadInfo {
  std::string load_id;
  std::string knowledge_base;
  std::string idempotency_key;
  LoadMode mode = LoadMode::kAppend;
  LoadState state = LoadState::kLoading;
  uint64_t entries = 0;  // distinct entries taken; never falls
  uint64_t bytes = 0;    // of records taken with them; never falls
  std::optional<uint64_t> expected_entries;
  double entries_per_second = 0;  // over the last seconds
  double bytes_per_second = 0;
  std::optional<absl::Duration> time_left;
  double indexing_fraction = 0;
  std::string failure;
  uint64_t version = 0;  // once committed
  absl::Time begun_at;
  absl::Time ended_at;  // InfiniteFuture while it runs
};

struct BeginLoadResult {
  LoadInfo load;
  bool resumed = false;
};

struct SnapshotInfo {
  std::string name;
  absl::Time created_at;
  uint64_t bytes = 0;
  Hash256 manifest_sha256;
};

struct BackupInfo {
  uint64_t backup_id = 0;
  uint64_t bytes_copied = 0;
};

struct StoreStatus {
  uint64_t knowledge_bases = 0;
  uint64_t entries = 0;  // of the published versions
  uint64_t records = 0;
  uint64_t disk_bytes = 0;
  uint64_t index_bytes = 0;  // in memory
  absl::Status writable;     // not OK: why writes fail now
};

// Puts batches into a load, each checked and made ready while the one before it is written: a load
// that is sent by one caller then goes at the pace of the database's writes alone.
//
// Thread-safety: one thread. Must not outlive its store; destroying it waits for what is under way.
class LoadPutter {
 public:
  virtual ~LoadPutter() = default;
  // As MemoryStore::PutLoad without `wait`, but it may answer before `entries` are written. An
  // error, also of the batch before, is the last: later calls answer it too and put nothing.
  // `entries` keep alive what they point to.
  virtual absl::Status Put(std::shared_ptr<const std::vector<NewEntry>> entries) = 0;
  // Answers when all is written (`wait`: and synced); counts what all calls together added.
  virtual absl::StatusOr<PutResult> Finish(bool wait) = 0;
};

class MemoryStore {
 public:
  virtual ~MemoryStore() = default;

  // --- knowledge bases; `kb` is a name or an alias unless said otherwise ---
  virtual absl::StatusOr<KnowledgeBaseInfo> CreateKnowledgeBase(std::string_view tenant,
                                                                const KnowledgeBaseSpec& spec,
                                                                bool if_not_exists) = 0;
  virtual absl::StatusOr<KnowledgeBaseInfo> GetKnowledgeBase(std::string_view tenant,
                                                             std::string_view kb,
                                                             bool with_codebook) = 0;
  virtual absl::StatusOr<std::vector<KnowledgeBaseInfo>> ListKnowledgeBases(
      std::string_view tenant) = 0;
  virtual absl::Status DeleteKnowledgeBase(std::string_view tenant, std::string_view name) = 0;
  // Answers where the alias pointed before, empty if it is new.
  virtual absl::StatusOr<std::string> SetAlias(std::string_view tenant, std::string_view alias,
                                               std::string_view kb) = 0;
  virtual absl::Status DeleteAlias(std::string_view tenant, std::string_view alias) = 0;
  virtual absl::StatusOr<std::map<std::string, std::string>> ListAliases(
      std::string_view tenant) = 0;
  virtual absl::StatusOr<std::vector<VersionInfo>> ListVersions(std::string_view tenant,
                                                                std::string_view kb) = 0;
  // Answers the version now published.
  virtual absl::StatusOr<uint64_t> Rollback(std::string_view tenant, std::string_view kb,
                                            std::optional<uint64_t> version) = 0;
  virtual absl::Status DropVersion(std::string_view tenant, std::string_view kb,
                                   uint64_t version) = 0;
  // The published version by default.
  virtual absl::StatusOr<std::shared_ptr<const VersionPin>> Pin(
      std::string_view tenant, std::string_view kb, std::optional<uint64_t> version) = 0;

  // --- memories of the published version ---
  // All of `entries` or, on an error, none. Give a few MiB a call: each call is one atomic change.
  // `wait`: answer only when it is synced to disk (calls that wait share syncs).
  virtual absl::StatusOr<PutResult> Put(std::string_view tenant, std::string_view kb,
                                        std::span<const NewEntry> entries, bool wait) = 0;
  // Answers when everything acknowledged before, wait or not, is synced.
  virtual absl::Status Sync() = 0;
  virtual absl::StatusOr<StoredRecord> GetRecord(std::string_view tenant, std::string_view kb,
                                                 const RecordId& id, bool with_text) = 0;
  // The records' entries in this knowledge base; unknown ids count nothing.
  virtual absl::StatusOr<DeleteResult> DeleteRecords(std::string_view tenant, std::string_view kb,
                                                     std::span<const RecordId> ids) = 0;
  virtual absl::StatusOr<DeleteResult> DeleteDocuments(
      std::string_view tenant, std::string_view kb, std::span<const std::string> document_ids) = 0;
  // page_size 0: 100. INVALID_ARGUMENT above kMaxPageSize or for a token this call never gave.
  virtual absl::StatusOr<DocumentPage> ListDocuments(std::string_view tenant, std::string_view kb,
                                                     uint32_t page_size,
                                                     std::string_view page_token) = 0;
  virtual absl::StatusOr<Counts> Count(std::string_view tenant, std::string_view kb) = 0;

  // --- retrieval ---
  // Reads the pinned version as it is now. Runs in the calling thread, on one core.
  virtual absl::StatusOr<RetrieveResult> Retrieve(const VersionPin& pin,
                                                  std::span<const Query> queries,
                                                  const RetrieveOptions& options) = 0;

  // --- bulk load ---
  virtual absl::StatusOr<BeginLoadResult> BeginLoad(std::string_view tenant, std::string_view kb,
                                                    std::string_view idempotency_key, LoadMode mode,
                                                    std::optional<uint64_t> expected_entries) = 0;
  // As Put, into a load; the result counts what this call added.
  virtual absl::StatusOr<PutResult> PutLoad(std::string_view tenant, std::string_view load_id,
                                            std::span<const NewEntry> entries, bool wait) = 0;
  // NOT_FOUND: there is no such load.
  virtual absl::StatusOr<std::unique_ptr<LoadPutter>> OpenLoadPutter(std::string_view tenant,
                                                                     std::string_view load_id) = 0;
  virtual absl::StatusOr<DocumentPage> ListLoadedDocuments(std::string_view tenant,
                                                           std::string_view load_id,
                                                           uint32_t page_size,
                                                           std::string_view page_token) = 0;
  // `wait`: answers when it is committed or failed (the state says which), else at once.
  virtual absl::StatusOr<LoadInfo> CommitLoad(std::string_view tenant, std::string_view load_id,
                                              bool wait) = 0;
  virtual absl::StatusOr<LoadInfo> AbortLoad(std::string_view tenant, std::string_view load_id) = 0;
  virtual absl::StatusOr<LoadInfo> GetLoad(std::string_view tenant, std::string_view load_id) = 0;
  // `kb` empty: all. Newest first.
  virtual absl::StatusOr<std::vector<LoadInfo>> ListLoads(std::string_view tenant,
                                                          std::string_view kb) = 0;

  // --- the whole store ---
  virtual absl::StatusOr<SnapshotInfo> CreateSnapshot(std::string_view name) = 0;  // "": by time
  virtual absl::StatusOr<std::vector<SnapshotInfo>> ListSnapshots() = 0;           // newest first
  // Verifies every file against the manifest first (DATA_LOSS names the file); a failure leaves the
  // old content.
  virtual absl::Status RestoreSnapshot(std::string_view name) = 0;
  virtual absl::Status DeleteSnapshot(std::string_view name) = 0;
  // `directory`: relative, below the store's backup root.
  virtual absl::StatusOr<BackupInfo> CreateBackup(std::string_view directory) = 0;
  virtual absl::Status RestoreBackup(std::string_view directory,
                                     std::optional<uint64_t> backup_id) = 0;

  virtual StoreStatus GetStatus() = 0;
  // OK, or why writes fail now (RESOURCE_EXHAUSTED: disk full; UNAVAILABLE: it fails). Cheap; for
  // health checks. Recovery is tried in the background.
  virtual absl::Status Writable() = 0;
};

}  // namespace memory3
