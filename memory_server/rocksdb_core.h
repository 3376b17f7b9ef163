// Everything of the RocksDB store that lives and dies with one open database: the catalogue of
// knowledge bases, versions and loads, changes, reads, background work. RocksDbStore
// (rocksdb_store.cc) holds one, and replaces it when a snapshot is restored. docs/store.md explains
// the layout.
//
// Thread-safety: all public methods from any thread.
// Locks, in the order they are taken: write_mu_ (serialises every change to the database),
// catalog_mu_ (the maps and which version is published), Version::mu, Load::mu. Reads take no write
// lock.
#pragma once

#include <rocksdb/write_batch.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "memory_server/base_index.h"
#include "memory_server/database.h"
#include "memory_server/encoding.h"
#include "memory_server/memory_store.h"
#include "memory_server/stack.h"
#include "memory_server/version_index.h"

namespace memory3 {

struct KnowledgeBase;

// One version: a stack of segments of which the last is its own and takes its changes.
struct Version {
  std::shared_ptr<KnowledgeBase> kb;
  uint64_t number = 0;
  std::atomic<uint32_t> pins{0};
  std::atomic<bool> dropped{false};
  std::mutex index_mu;  // one thread opens or builds the index

  mutable std::mutex mu;  // guards what follows; written under the store's write lock as well
  std::shared_ptr<const Stack> stack;
  Counts counts;
  uint64_t sequence = 0;  // of changes
  absl::Time published_at;
  std::shared_ptr<VersionIndex> index;  // null: not in memory
  // The metadata row that names the file of the index's base; empty: the base is empty and has
  // none; nullopt: it is not saved.
  std::optional<std::string> index_row;

  std::shared_ptr<const Stack> GetStack() const {
    std::lock_guard lock(mu);
    return stack;
  }
  std::shared_ptr<VersionIndex> GetIndex() const {
    std::lock_guard lock(mu);
    return index;
  }
};

struct KnowledgeBase {
  std::string tenant;
  uint64_t id = 0;
  KnowledgeBaseSpec spec;  // without the codebook
  Hash256 codebook_hash;
  uint64_t bytes_per_reference = 0;
  absl::Time created_at;
  std::string tenant_prefix;
  std::string prefix;  // tenant, id: begins the keys of its segments and embeddings

  // Guarded by catalog_mu_.
  std::map<uint64_t, std::shared_ptr<Version>> versions;
  uint64_t published = 0;
  uint64_t next_version = 1;
  bool deleted = false;

  std::string SegmentPrefix(uint64_t segment) const {
    std::string key = prefix;
    AppendBig64(&key, segment);
    return key;
  }
};

struct Load {
  std::shared_ptr<KnowledgeBase> kb;
  std::shared_ptr<Segment> segment;
  // Segments that were under the live version when it began (APPEND), or came of merging such;
  // written under the store's write lock.
  std::vector<uint64_t> below;
  std::atomic<bool> cancelled{false};
  // Of the batch written last no entry and no record had been there; so it is likely of the next.
  std::atomic<bool> all_new{true};

  mutable std::mutex mu;
  std::condition_variable ended;
  LoadInfo info;
  std::shared_ptr<const Stack> building;  // segments a commit reads now
  std::deque<std::pair<absl::Time, std::pair<uint64_t, uint64_t>>> rate;  // time, entries, bytes

  bool open() const {  // its segment may still be published; mu held
    return info.state == LoadState::kLoading || info.state == LoadState::kIndexing ||
           info.state == LoadState::kFailed;
  }
};

class RocksDbCore : public std::enable_shared_from_this<RocksDbCore> {
 public:
  // `directory` holds db/ and index/.
  static absl::StatusOr<std::shared_ptr<RocksDbCore>> Open(const std::string& directory,
                                                           const RocksDbStoreOptions& options);
  ~RocksDbCore();
  // Ends background work. Called once, before the last reference goes.
  void Stop();

  absl::StatusOr<KnowledgeBaseInfo> CreateKnowledgeBase(std::string_view tenant,
                                                        const KnowledgeBaseSpec& spec,
                                                        bool if_not_exists);
  absl::StatusOr<KnowledgeBaseInfo> GetKnowledgeBase(std::string_view tenant, std::string_view kb,
                                                     bool with_codebook);
  absl::StatusOr<std::vector<KnowledgeBaseInfo>> ListKnowledgeBases(std::string_view tenant);
  absl::Status DeleteKnowledgeBase(std::string_view tenant, std::string_view name);
  absl::StatusOr<std::string> SetAlias(std::string_view tenant, std::string_view alias,
                                       std::string_view kb);
  absl::Status DeleteAlias(std::string_view tenant, std::string_view alias);
  absl::StatusOr<std::map<std::string, std::string>> ListAliases(std::string_view tenant);
  absl::StatusOr<std::vector<VersionInfo>> ListVersions(std::string_view tenant,
                                                        std::string_view kb);
  absl::StatusOr<uint64_t> Rollback(std::string_view tenant, std::string_view kb,
                                    std::optional<uint64_t> version);
  absl::Status DropVersion(std::string_view tenant, std::string_view kb, uint64_t version);
  absl::StatusOr<std::shared_ptr<const VersionPin>> Pin(std::string_view tenant,
                                                        std::string_view kb,
                                                        std::optional<uint64_t> version);

  absl::StatusOr<PutResult> Put(std::string_view tenant, std::string_view kb,
                                std::span<const NewEntry> entries, bool wait);
  absl::Status Sync() { return db_->Sync(); }
  absl::StatusOr<StoredRecord> GetRecord(std::string_view tenant, std::string_view kb,
                                         const RecordId& id, bool with_text);
  absl::StatusOr<DeleteResult> DeleteRecords(std::string_view tenant, std::string_view kb,
                                             std::span<const RecordId> ids);
  absl::StatusOr<DeleteResult> DeleteDocuments(std::string_view tenant, std::string_view kb,
                                               std::span<const std::string> document_ids);
  absl::StatusOr<DocumentPage> ListDocuments(std::string_view tenant, std::string_view kb,
                                             uint32_t page_size, std::string_view page_token);
  absl::StatusOr<Counts> Count(std::string_view tenant, std::string_view kb);
  absl::StatusOr<RetrieveResult> Retrieve(const VersionPin& pin, std::span<const Query> queries,
                                          const RetrieveOptions& options);

  absl::StatusOr<BeginLoadResult> BeginLoad(std::string_view tenant, std::string_view kb,
                                            std::string_view idempotency_key, LoadMode mode,
                                            std::optional<uint64_t> expected_entries);
  absl::StatusOr<PutResult> PutLoad(std::string_view tenant, std::string_view load_id,
                                    std::span<const NewEntry> entries, bool wait);
  // PutLoad in two steps, the first of which takes no write lock. `entries` are needed until the
  // second is done.
  struct ReadyPut;
  absl::Status PreparePutLoad(std::string_view tenant, std::string_view load_id,
                              std::span<const NewEntry> entries, ReadyPut* ready);
  absl::StatusOr<PutResult> WritePutLoad(ReadyPut* ready);
  absl::StatusOr<DocumentPage> ListLoadedDocuments(std::string_view tenant,
                                                   std::string_view load_id, uint32_t page_size,
                                                   std::string_view page_token);
  absl::StatusOr<LoadInfo> CommitLoad(std::string_view tenant, std::string_view load_id);
  // Returns when it is no longer INDEXING.
  absl::StatusOr<LoadInfo> AwaitLoad(std::string_view tenant, std::string_view load_id);
  absl::StatusOr<LoadInfo> AbortLoad(std::string_view tenant, std::string_view load_id);
  absl::StatusOr<LoadInfo> GetLoad(std::string_view tenant, std::string_view load_id);
  absl::StatusOr<std::vector<LoadInfo>> ListLoads(std::string_view tenant, std::string_view kb);

  StoreStatus GetStatus();
  absl::Status Writable() const { return db_->writable(); }
  bool needs_reopen() const { return db_->needs_reopen(); }
  // True once nothing outside this object holds the database open.
  bool database_unshared() const { return db_.use_count() == 1; }

  // Checkpoints the database into `directory`/db and links or copies the index files beside it.
  absl::Status Checkpoint(const std::string& directory);
  absl::StatusOr<BackupInfo> Backup(const std::string& directory);

 private:
  struct Prepared;  // an entry that was checked, its embedding as it is stored
  struct Batch;     // distinct entries of one put
  struct Change;    // one write batch and what it does to references and index
  class PinImpl;
  class ReaderImpl;
  struct ReadView {  // what one read sees
    std::shared_ptr<KnowledgeBase> kb;
    std::shared_ptr<const Stack> stack;
    std::shared_ptr<VersionIndex> index;
    std::shared_ptr<Database::Snapshot> snapshot;
    // What the index holds but the snapshot does not yet makes the read ABORTED, to be done again.
    bool look_again = false;
  };
  struct SourceRow {  // an entry of a record
    uint64_t embedding_hash = 0;
    uint64_t record_bytes = 0;
    Source source;
  };

  RocksDbCore() = default;

  // --- opening (rocksdb_core.cc) ---
  absl::Status LoadCatalog();
  void LoadSegmentFlags(const KnowledgeBase& kb, Segment* segment);
  void StartWorkers();

  // --- catalogue (rocksdb_core.cc, rocksdb_catalog.cc) ---
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> Resolve(std::string_view tenant,
                                                         std::string_view kb) const;
  std::shared_ptr<Version> Published(const KnowledgeBase& kb) const;
  absl::StatusOr<std::shared_ptr<Version>> PublishedOf(std::string_view tenant,
                                                       std::string_view kb) const;
  KnowledgeBaseInfo InfoOf(const KnowledgeBase& kb) const;          // catalog_mu_ held
  std::shared_ptr<Segment> NewSegment(rocksdb::WriteBatch* batch);  // write_mu_ held
  void PutKnowledgeBaseRow(const KnowledgeBase& kb, uint64_t published, uint64_t next_version,
                           rocksdb::WriteBatch* batch) const;
  void PutVersionRow(const Version& v, const Stack& stack, absl::Time published_at,
                     rocksdb::WriteBatch* batch) const;
  void PutCountsRow(const Version& v, const Counts& counts, uint64_t sequence,
                    rocksdb::WriteBatch* batch) const;
  void PutLoadRow(const Load& load, const LoadInfo& info, rocksdb::WriteBatch* batch) const;
  std::string VersionKey(char kind, const KnowledgeBase& kb, uint64_t version) const;
  // Deletes a version's rows and marks for collection the segments only it had.
  void DropVersionRows(const std::shared_ptr<Version>& v,
                       const std::vector<std::shared_ptr<Version>>& others,
                       rocksdb::WriteBatch* batch, std::vector<std::shared_ptr<Segment>>* garbage);
  void MarkGarbage(const KnowledgeBase& kb, uint64_t segment, rocksdb::WriteBatch* batch) const;
  absl::Status WriteSynced(rocksdb::WriteBatch* batch);
  // The version takes changes into an empty segment of its own from now on. write_mu_ held.
  absl::Status FreezeTop(const std::shared_ptr<Version>& v, bool even_if_empty);

  // --- changes (rocksdb_write.cc) ---
  absl::StatusOr<Batch> Prepare(const KnowledgeBase& kb, std::span<const NewEntry> entries) const;
  absl::Status CheckNoReplace(const KnowledgeBase& kb) const;
  bool HasOpenAppend(const KnowledgeBase& kb) const;
  // The keys of the batch's distinct records, ascending.
  static std::vector<std::string> RecordKeysOf(const KnowledgeBase& kb, const Batch& batch);
  // The bytes of those records that are held.
  using HeldBytes = std::vector<std::optional<uint64_t>>;
  absl::StatusOr<HeldBytes> LookUpRecords(std::span<const std::string> keys) const;
  absl::Status PutEntries(const KnowledgeBase& kb, const std::string& segment_prefix,
                          uint64_t segment, const Batch& batch,
                          std::span<const std::string> record_keys, const HeldBytes& held,
                          const std::vector<bool>& replaced, Change* change,
                          uint64_t* new_records) const;
  absl::Status RemoveRow(const KnowledgeBase& kb, const std::string& segment_prefix,
                         uint64_t segment, std::string_view suffix, const EntryRow& row,
                         bool leave_tombstone, Change* change);
  // Records and embeddings whose last reference the change takes go with it.
  absl::Status DropUnreferenced(const KnowledgeBase& kb, Change* change);
  // Completes the change (index, counters, log), writes it and applies it in memory.
  absl::Status CommitChange(const std::shared_ptr<Version>& v, const Stack& stack, Change* change,
                            uint64_t* dead_records);
  absl::StatusOr<std::set<uint64_t>> VisibleEmbeddings(const KnowledgeBase& kb, const Stack& stack,
                                                       const RecordId& id, const Change* change,
                                                       const rocksdb::Snapshot* snapshot) const;
  absl::StatusOr<std::vector<float>> ReadEmbedding(const KnowledgeBase& kb, const RecordId& id,
                                                   uint64_t hash,
                                                   const rocksdb::Snapshot* snapshot) const;

  // --- reads (rocksdb_read.cc) ---
  absl::StatusOr<ReadView> MakeView(const std::shared_ptr<Version>& v);
  absl::StatusOr<std::vector<SourceRow>> SourcesOf(const ReadView& view, const RecordId& id,
                                                   bool with_text) const;
  absl::StatusOr<DocumentPage> PageOf(const KnowledgeBase& kb, const Stack& stack,
                                      const rocksdb::Snapshot* snapshot, uint32_t page_size,
                                      std::string_view page_token) const;
  // Those of queries [first, last), in order, appended to `hits`. ABORTED: look again.
  absl::Status RetrieveSome(const ReadView& view, std::span<const Query> queries,
                            std::span<const std::vector<float>> vectors, size_t first, size_t last,
                            const RetrieveOptions& options,
                            std::vector<std::vector<Hit>>* hits) const;
  // `lookup`: of the whole index by FirstLookup, searched already; null: not yet.
  absl::StatusOr<std::vector<Hit>> RetrieveOne(const ReadView& view, const Query& query,
                                               VersionIndex::Lookup* lookup, const float* vector,
                                               bool with_text) const;
  absl::StatusOr<bool> TakeHits(const ReadView& view, const Query& query,
                                const std::vector<VersionIndex::Candidate>& candidates,
                                bool with_text, std::vector<Hit>* hits) const;
  absl::StatusOr<bool> TakeFound(const ReadView& view, const Query& query,
                                 VersionIndex::Lookup* lookup, bool with_text,
                                 std::vector<Hit>* hits) const;
  absl::StatusOr<std::optional<std::vector<SlotKey>>> FilteredSlots(const ReadView& view,
                                                                    const Filter& filter,
                                                                    size_t limit) const;
  absl::StatusOr<std::vector<Hit>> BestOf(const ReadView& view, const Query& query,
                                          const float* vector, std::vector<SlotKey> slots,
                                          bool with_text) const;
  absl::Status ScoreStored(const ReadView& view, const float* vector,
                           std::vector<VersionIndex::Candidate>* candidates) const;

  // --- loads (rocksdb_load.cc) ---
  absl::StatusOr<std::shared_ptr<Load>> FindLoad(std::string_view tenant,
                                                 std::string_view load_id) const;
  LoadInfo SnapshotOf(const Load& load) const;
  void CommitLoop();
  absl::Status CommitOne(const std::shared_ptr<Load>& load);
  void FailLoad(const std::shared_ptr<Load>& load, const absl::Status& why);
  // Above how many segments of the live version the load's goes.
  static size_t InsertionPoint(const Load& load, const Stack& live);
  Stack PlannedStack(const Load& load, const Stack& live) const;
  // What a commit is about to publish.
  struct Planned {
    Stack stack;
    uint64_t number = 0;
    Counts counts;
    std::shared_ptr<VersionIndex> index;
    std::string index_row;
    // Set where the index shares the base of this version's, and its file.
    std::shared_ptr<Version> shares;
    std::string shared_row;  // the row it had then
  };
  absl::Status PlanFromScratch(const std::shared_ptr<Load>& load, const BaseIndex* previous,
                               const std::shared_ptr<Database::Snapshot>& snapshot,
                               Planned* planned);
  absl::StatusOr<bool> PublishLoad(const std::shared_ptr<Load>& load, const Planned& planned,
                                   bool must);
  // What lies between two stacks that differ by the segments `between`.
  struct Delta {
    std::vector<RecordId> records;  // whose visible entries may differ
    size_t touched = 0;             // documents looked at
    int64_t entries = 0;
    int64_t documents = 0;
  };
  absl::StatusOr<Delta> DeltaOf(const KnowledgeBase& kb, const Stack& before, const Stack& after,
                                std::span<const std::shared_ptr<Segment>> between,
                                const rocksdb::Snapshot* snapshot) const;
  absl::Status Resync(const KnowledgeBase& kb, const Stack& stack,
                      std::span<const RecordId> records, const rocksdb::Snapshot* snapshot,
                      VersionIndex* index) const;

  // --- merging (rocksdb_merge.cc); in the thread of the commits ---
  struct Merge {
    std::shared_ptr<KnowledgeBase> kb;
    Stack run;
    std::shared_ptr<Segment> into;
    // Nothing stands below or can come to: tombstones hide nothing.
    bool bottom = false;
  };
  void MergeAll();
  // Merges until the version has at most so many frozen segments or nothing is left to merge.
  // `yield`: gives up when a commit waits.
  absl::Status MergeDownTo(const std::shared_ptr<KnowledgeBase>& kb, size_t frozen, bool yield);
  absl::StatusOr<std::optional<Merge>> PlanMerge(const std::shared_ptr<KnowledgeBase>& kb,
                                                 size_t frozen);
  absl::StatusOr<size_t> CountSegment(const KnowledgeBase& kb, Segment* segment,
                                      size_t limit) const;
  // Where open APPEND loads go into the live version's segments. write_mu_ held.
  std::vector<size_t> InsertionPoints(const KnowledgeBase& kb, const Stack& live) const;
  absl::StatusOr<bool> CopyRun(const Merge& merge, bool yield);
  absl::StatusOr<bool> PublishMerge(const Merge& merge);
  void AbandonMerge(const Merge& merge);

  // --- index (rocksdb_index.cc) ---
  struct Scanned {
    std::vector<SlotKey> keys;
    Counts counts;
  };
  absl::StatusOr<Scanned> ScanStack(const KnowledgeBase& kb, const Stack& stack,
                                    const rocksdb::Snapshot* snapshot,
                                    const std::atomic<bool>* cancelled) const;
  absl::StatusOr<std::shared_ptr<const BaseIndex>> BuildBase(
      const KnowledgeBase& kb, std::vector<SlotKey> keys,
      std::shared_ptr<Database::Snapshot> snapshot, const BaseIndex* previous,
      std::function<void(double)> progress, const std::atomic<bool>* cancelled) const;
  // Writes an index file; answers the metadata row that names it.
  absl::StatusOr<std::string> SaveIndex(const KnowledgeBase& kb, uint64_t version,
                                        uint64_t sequence, const BaseIndex& base);
  absl::StatusOr<std::shared_ptr<const BaseIndex>> ReadIndexFile(const KnowledgeBase& kb,
                                                                 uint64_t version,
                                                                 std::string_view row,
                                                                 uint64_t* sequence) const;
  // A version's segments and a moment of the database that holds all of them.
  struct Moment {
    std::shared_ptr<const Stack> stack;
    std::shared_ptr<Database::Snapshot> snapshot;
  };
  Moment MomentOf(const Version& v) const;
  absl::Status EnsureIndex(const std::shared_ptr<Version>& v);
  absl::StatusOr<std::shared_ptr<VersionIndex>> OpenIndex(const std::shared_ptr<Version>& v);
  absl::Status RebuildIndex(const std::shared_ptr<Version>& v);
  absl::Status Fold(const std::shared_ptr<Version>& v);
  // The metadata row that names a version's file; empty: none. And the end of such a file.
  std::string IndexRow(const KnowledgeBase& kb, uint64_t version) const;
  // Unless another version's row names the same file.
  void RemoveIndexFile(const KnowledgeBase& kb, std::string_view row);
  void RemoveStaleIndexFiles();

  // --- background (rocksdb_catalog.cc) ---
  void MaintainLoop();
  void WakeMaintenance();
  std::vector<std::pair<std::shared_ptr<KnowledgeBase>, std::shared_ptr<Segment>>>
  CollectableSegments();
  absl::Status CollectSegment(const KnowledgeBase& kb, uint64_t segment);
  bool stopping() const { return stop_.load(std::memory_order_relaxed); }

  RocksDbStoreOptions options_;
  std::string directory_;
  std::shared_ptr<Database> db_;

  std::mutex write_mu_;
  rocksdb::WriteBatch scratch_;  // memory for the next change; write_mu_
  uint64_t next_id_ = 1;         // of knowledge bases, segments, loads, index files; write_mu_

  mutable std::shared_mutex catalog_mu_;
  std::map<std::string, std::shared_ptr<KnowledgeBase>, std::less<>> kbs_;  // tenant prefix + name
  std::map<std::string, std::string, std::less<>> aliases_;  // tenant prefix + alias → name
  std::map<std::string, std::shared_ptr<Load>, std::less<>> loads_;  // tenant prefix + load id
  // Segments nothing names any more, and dropped versions that are still pinned.
  std::vector<std::pair<std::shared_ptr<KnowledgeBase>, std::shared_ptr<Segment>>> garbage_;
  std::vector<std::shared_ptr<Version>> zombies_;
  Stack merging_;  // what a merge reads now

  std::mutex files_mu_;  // index files are removed and checkpointed under it
  uint64_t next_file_ = 0;

  std::atomic<bool> stop_{false};
  std::mutex work_mu_;
  std::condition_variable work_;
  bool maintenance_due_ = true;
  bool merge_due_ = true;
  std::deque<std::shared_ptr<Load>> commits_;
  std::thread maintenance_thread_;
  std::thread commit_thread_;
};

}  // namespace memory3
