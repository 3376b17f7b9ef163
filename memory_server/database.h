// The RocksDB database under the store: its column families and options, group-committed syncs, and
// what to do when the disk fails. Keys and values are encoding.h's.
//
// Thread-safety: all methods from any thread. Ownership: by shared_ptr, so that bytes handed out
// stay readable until the last of them is let go.
#pragma once

#include <rocksdb/db.h>
#include <rocksdb/utilities/backup_engine.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory_server/rocksdb_store.h"

namespace memory3 {

// As canonical codes: no space RESOURCE_EXHAUSTED, corruption DATA_LOSS, else UNAVAILABLE.
absl::Status FromRocksDb(const rocksdb::Status& status, std::string_view doing);

inline rocksdb::Slice ToSlice(std::string_view v) { return {v.data(), v.size()}; }
inline std::string_view ToView(const rocksdb::Slice& s) { return {s.data(), s.size()}; }

enum Family {
  kRecords,     // tenant, record id → record
  kReferences,  // tenant, record id, kb, embedding hash, segment, entry → nothing: who needs it
  kEntries,     // tenant, kb, segment, entry → row
  kTexts,       // tenant, kb, segment, entry → the reference's text
  kEmbeddings,  // tenant, kb, record id, embedding hash → f32 numbers
  kDocuments,   // tenant, kb, segment → tombstones, metadata postings
  kMetadata,    // knowledge bases, versions, loads, counters
  kFamilyCount
};

// Options of one column family, also for benchmarks that hold the store against bare RocksDB.
rocksdb::ColumnFamilyOptions FamilyOptions(Family family, const RocksDbStoreOptions& options,
                                           const std::shared_ptr<rocksdb::Cache>& cache);
rocksdb::DBOptions DatabaseOptions(const RocksDbStoreOptions& options);
std::vector<rocksdb::ColumnFamilyDescriptor> FamilyDescriptors(
    const RocksDbStoreOptions& options, const std::shared_ptr<rocksdb::Cache>& cache);

class Database : public std::enable_shared_from_this<Database> {
 public:
  // A moment of the database, held while this lives.
  class Snapshot {
   public:
    explicit Snapshot(std::shared_ptr<Database> db)
        : db_(std::move(db)), snapshot_(db_->db_->GetSnapshot()) {}
    ~Snapshot() { db_->db_->ReleaseSnapshot(snapshot_); }
    Snapshot(const Snapshot&) = delete;
    Snapshot& operator=(const Snapshot&) = delete;
    const rocksdb::Snapshot* get() const { return snapshot_; }
    const std::shared_ptr<Database>& database() const { return db_; }

   private:
    std::shared_ptr<Database> db_;
    const rocksdb::Snapshot* snapshot_;
  };

  static absl::StatusOr<std::shared_ptr<Database>> Open(const std::string& directory,
                                                        const RocksDbStoreOptions& options);
  ~Database();

  rocksdb::DB* db() const { return db_.get(); }
  rocksdb::ColumnFamilyHandle* family(Family f) const { return families_[f]; }
  rocksdb::Env* env() const { return env_; }

  // Applies the batch; readers see it at once, Sync makes it last.
  absl::Status Write(rocksdb::WriteBatch* batch);
  // Returns when all writes that returned before are synced. Callers that overlap share a sync.
  absl::Status Sync();

  // False: not there. `snapshot` null: now.
  absl::StatusOr<bool> Get(Family f, std::string_view key, const rocksdb::Snapshot* snapshot,
                           rocksdb::PinnableSlice* value) const;
  // Now, of ascending keys, with less work a key than Get: calls `each` with position and value, in
  // order; null: not there. A value is `each`'s only while it runs. Ends with the first error.
  absl::Status GetEach(
      Family f, std::span<const std::string> keys,
      absl::FunctionRef<absl::Status(size_t, const rocksdb::PinnableSlice*)> each) const;
  absl::StatusOr<bool> Has(Family f, std::string_view key, const rocksdb::Snapshot* snapshot) const;
  std::unique_ptr<rocksdb::Iterator> Iterate(Family f, const rocksdb::ReadOptions& options) const;

  // OK, or why writes fail.
  absl::Status writable() const;
  // True: RocksDB cannot come back by itself, and the disk takes writes again: it must be closed
  // and opened again.
  bool needs_reopen() const { return needs_reopen_.load(std::memory_order_relaxed); }
  uint64_t disk_bytes() const;

 private:
  class Listener;

  Database() = default;
  absl::Status NoteWriteError(const rocksdb::Status& status, std::string_view doing);
  void RecoverLoop();

  // Whether a file can be written and synced now.
  bool DiskTakesWrites() const;

  std::string directory_;
  std::unique_ptr<rocksdb::Env> retryable_env_;  // outlives the database
  std::unique_ptr<rocksdb::DB> db_;
  std::array<rocksdb::ColumnFamilyHandle*, kFamilyCount> families_{};
  rocksdb::Env* env_ = nullptr;

  std::atomic<uint64_t> written_{0};
  std::mutex sync_mu_;
  std::condition_variable sync_done_;
  uint64_t synced_ = 0;
  bool syncing_ = false;

  mutable std::mutex error_mu_;
  std::condition_variable error_changed_;
  absl::Status error_;  // the reason writes fail now
  bool stop_ = false;
  std::atomic<bool> failing_{false};
  std::atomic<bool> needs_reopen_{false};
  std::thread recovery_;
};

}  // namespace memory3
