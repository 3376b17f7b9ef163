#include "memory_server/database.h"

#include <rocksdb/cache.h>
#include <rocksdb/convenience.h>
#include <rocksdb/env.h>
#include <rocksdb/file_system.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/table.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>

#include "memory_server/log_check.h"
#include "memory_server/message.h"
#include "memory_server/retryable_file_system.h"
#include "memory_server/rocksdb_crc32c.h"

namespace memory3 {
namespace {

constexpr const char* kFamilyNames[kFamilyCount] = {"records",    "references", "entries", "texts",
                                                    "embeddings", "documents",  "metadata"};
constexpr auto kRecoveryPause = std::chrono::milliseconds(200);

}  // namespace

absl::Status FromRocksDb(const rocksdb::Status& status, std::string_view doing) {
  if (status.ok()) return absl::OkStatus();
  std::string message = Message(doing, ": ", status.ToString());
  if (status.IsNoSpace() || status.subcode() == rocksdb::Status::kSpaceLimit ||
      message.find(kNoSpaceMark) != std::string::npos) {
    return absl::ResourceExhaustedError(message);
  }
  if (status.IsCorruption()) return absl::DataLossError(message);
  if (status.IsNotSupported() || status.IsInvalidArgument()) return absl::InternalError(message);
  return absl::UnavailableError(message);
}

rocksdb::DBOptions DatabaseOptions(const RocksDbStoreOptions& options) {
  rocksdb::DBOptions o;
  o.create_if_missing = true;
  o.create_missing_column_families = true;
  if (options.env != nullptr) o.env = options.env;
  o.max_background_jobs = 4;
  o.bytes_per_sync = uint64_t{1} << 20;
  o.wal_bytes_per_sync = uint64_t{1} << 20;  // so that no sync finds much to do
  o.max_total_wal_size = 4 * options.write_buffer_bytes;
  o.max_open_files = 4096;
  o.keep_log_file_num = 4;
  o.max_log_file_size = uint64_t{8} << 20;
  // A torn tail ends the replay of the log, and of logs after it: what is left is one moment of the
  // database whatever reached the disk. Damage elsewhere CheckLogs has found before.
  o.wal_recovery_mode = rocksdb::WALRecoveryMode::kPointInTimeRecovery;
  // The recovery loop resumes, so that health follows the same state as writes.
  o.max_bgerror_resume_count = 0;
  return o;
}

rocksdb::ColumnFamilyOptions FamilyOptions(Family family, const RocksDbStoreOptions& options,
                                           const std::shared_ptr<rocksdb::Cache>& cache) {
  rocksdb::ColumnFamilyOptions o;
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = cache;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  table.format_version = 5;
  // Ours is several times as fast as RocksDB's XXH3, which Debian builds for SSE2.
  static const bool kOurCrc32c = RocksDbUsesOurCrc32c();
  table.checksum = kOurCrc32c ? rocksdb::kCRC32c : rocksdb::kXXH3;
  o.level_compaction_dynamic_level_bytes = true;
  o.write_buffer_size = std::max<uint64_t>(options.write_buffer_bytes / 4, uint64_t{64} << 10);
  o.compression = rocksdb::kNoCompression;
  switch (family) {
    case kRecords:
      o.write_buffer_size = options.write_buffer_bytes;
      o.max_write_buffer_number = 4;
      // Tables, not blob files: read several times as fast, see docs/store.md. Large files and
      // levels keep the compactions few.
      o.level0_file_num_compaction_trigger = 8;
      o.target_file_size_base = 4 * options.write_buffer_bytes;
      o.max_bytes_for_level_base = 16 * options.write_buffer_bytes;
      // Puts ask here whether a record is held.
      o.memtable_whole_key_filtering = true;
      o.memtable_prefix_bloom_size_ratio = 0.001;
      break;
    case kEmbeddings:
      o.write_buffer_size = options.write_buffer_bytes;
      o.max_write_buffer_number = 3;
      break;
    case kReferences:
      break;
    case kEntries:
      o.memtable_whole_key_filtering = true;
      o.memtable_prefix_bloom_size_ratio = 0.02;
      break;
    case kTexts:
      o.compression = rocksdb::kLZ4Compression;
      break;
    case kDocuments:
    case kMetadata:
    case kFamilyCount:
      break;
  }
  o.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return o;
}

std::vector<rocksdb::ColumnFamilyDescriptor> FamilyDescriptors(
    const RocksDbStoreOptions& options, const std::shared_ptr<rocksdb::Cache>& cache) {
  std::vector<rocksdb::ColumnFamilyDescriptor> d;
  d.emplace_back(rocksdb::kDefaultColumnFamilyName, rocksdb::ColumnFamilyOptions());
  for (int f = 0; f < kFamilyCount; ++f) {
    d.emplace_back(kFamilyNames[f], FamilyOptions(static_cast<Family>(f), options, cache));
  }
  return d;
}

// Background errors (a flush or compaction that failed) make the store not writable too.
class Database::Listener : public rocksdb::EventListener {
 public:
  explicit Listener(Database* db) : db_(db) {}
  void OnBackgroundError(rocksdb::BackgroundErrorReason, rocksdb::Status* status) override {
    absl::Status ignored = db_->NoteWriteError(*status, "the database's background work");
    (void)ignored;
  }

 private:
  Database* db_;
};

absl::StatusOr<std::shared_ptr<Database>> Database::Open(const std::string& directory,
                                                         const RocksDbStoreOptions& options) {
  std::shared_ptr<Database> d(new Database);
  if (!RocksDbUsesOurCrc32c()) spdlog::info("RocksDB computes checksums its own way");
  rocksdb::DBOptions o = DatabaseOptions(options);
  d->directory_ = directory;
  d->retryable_env_ = rocksdb::NewCompositeEnv(MakeRetryableFileSystem(o.env->GetFileSystem()));
  o.env = d->env_ = d->retryable_env_.get();
  o.listeners.push_back(std::make_shared<Listener>(d.get()));
  auto cache = rocksdb::NewLRUCache(options.cache_bytes);
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  rocksdb::DB* db = nullptr;
  if (absl::Status sound = CheckLogs(o.env, directory); !sound.ok()) {
    if (!options.accept_log_damage) return sound;
    spdlog::warn("store: accepting a damaged log: {}", sound.ToString());
  }
  rocksdb::Status s =
      rocksdb::DB::Open(o, directory, FamilyDescriptors(options, cache), &handles, &db);
  if (!s.ok()) return FromRocksDb(s, Message("opening the database in ", directory));
  d->db_.reset(db);
  db->DestroyColumnFamilyHandle(handles[0]);
  std::copy(handles.begin() + 1, handles.end(), d->families_.begin());
  d->recovery_ = std::thread([raw = d.get()] { raw->RecoverLoop(); });
  return d;
}

Database::~Database() {
  if (recovery_.joinable()) {
    {
      std::lock_guard lock(error_mu_);
      stop_ = true;
    }
    error_changed_.notify_all();
    recovery_.join();
  }
  if (db_ == nullptr) return;
  // What was written without wait becomes durable on an orderly end.
  if (!failing_) (void)db_->SyncWAL();
  rocksdb::CancelAllBackgroundWork(db_.get(), /*wait=*/true);
  for (rocksdb::ColumnFamilyHandle* h : families_) (void)db_->DestroyColumnFamilyHandle(h);
  (void)db_->Close();
}

absl::Status Database::NoteWriteError(const rocksdb::Status& status, std::string_view doing) {
  absl::Status error = FromRocksDb(status, doing);
  std::lock_guard lock(error_mu_);
  if (error_.ok()) error_ = error;
  failing_ = true;
  error_changed_.notify_all();
  return error;
}

absl::Status Database::Write(rocksdb::WriteBatch* batch) {
  if (failing_.load(std::memory_order_relaxed)) {
    if (absl::Status s = writable(); !s.ok()) return s;
  }
  rocksdb::Status s = db_->Write(rocksdb::WriteOptions(), batch);
  if (!s.ok()) return NoteWriteError(s, "writing to the database");
  written_.fetch_add(1, std::memory_order_acq_rel);
  return absl::OkStatus();
}

absl::Status Database::Sync() {
  const uint64_t mine = written_.load(std::memory_order_acquire);
  std::unique_lock lock(sync_mu_);
  while (synced_ < mine) {
    if (syncing_) {
      sync_done_.wait(lock);
      continue;
    }
    // This thread syncs for all that wrote before now.
    syncing_ = true;
    const uint64_t target = written_.load(std::memory_order_acquire);
    lock.unlock();
    rocksdb::Status s = db_->SyncWAL();
    absl::Status status =
        s.ok() ? absl::OkStatus() : NoteWriteError(s, "syncing the write-ahead log");
    lock.lock();
    syncing_ = false;
    sync_done_.notify_all();
    if (!status.ok()) return status;
    synced_ = std::max(synced_, target);
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> Database::Get(Family f, std::string_view key,
                                   const rocksdb::Snapshot* snapshot,
                                   rocksdb::PinnableSlice* value) const {
  rocksdb::ReadOptions o;
  o.snapshot = snapshot;
  rocksdb::Status s = db_->Get(o, families_[f], ToSlice(key), value);
  if (s.ok()) return true;
  if (s.IsNotFound()) return false;
  return FromRocksDb(s, Message("reading from ", kFamilyNames[f]));
}

absl::Status Database::GetEach(
    Family f, std::span<const std::string> keys,
    absl::FunctionRef<absl::Status(size_t, const rocksdb::PinnableSlice*)> each) const {
  constexpr size_t kTogether = 64;
  rocksdb::ReadOptions options;
  options.value_size_soft_limit = uint64_t{16} << 20;  // past it keys are read one by one
  std::array<rocksdb::Slice, kTogether> slices;
  std::array<rocksdb::PinnableSlice, kTogether> values;
  std::array<rocksdb::Status, kTogether> statuses;
  for (size_t first = 0; first < keys.size(); first += kTogether) {
    const size_t n = std::min(kTogether, keys.size() - first);
    std::copy_n(keys.begin() + static_cast<ptrdiff_t>(first), n, slices.begin());
    db_->MultiGet(options, families_[f], n, slices.data(), values.data(), statuses.data(),
                  /*sorted_input=*/true);
    for (size_t i = 0; i < n; ++i) {
      if (statuses[i].IsAborted()) {
        values[i].Reset();
        statuses[i] = db_->Get(rocksdb::ReadOptions(), families_[f], slices[i], &values[i]);
      }
      if (!statuses[i].ok() && !statuses[i].IsNotFound())
        return FromRocksDb(statuses[i], Message("reading from ", kFamilyNames[f]));
      absl::Status status = each(first + i, statuses[i].ok() ? &values[i] : nullptr);
      if (!status.ok()) return status;
      values[i].Reset();
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> Database::Has(Family f, std::string_view key,
                                   const rocksdb::Snapshot* snapshot) const {
  rocksdb::PinnableSlice value;
  return Get(f, key, snapshot, &value);
}

std::unique_ptr<rocksdb::Iterator> Database::Iterate(Family f,
                                                     const rocksdb::ReadOptions& options) const {
  return std::unique_ptr<rocksdb::Iterator>(db_->NewIterator(options, families_[f]));
}

absl::Status Database::writable() const {
  if (!failing_.load(std::memory_order_relaxed)) return absl::OkStatus();
  std::lock_guard lock(error_mu_);
  return error_;
}

// While writes fail: resume the database and try a small write through to the disk; only that
// proves that space is back.
void Database::RecoverLoop() {
  std::unique_lock lock(error_mu_);
  while (!stop_) {
    if (error_.ok()) {
      error_changed_.wait(lock);
      continue;
    }
    error_changed_.wait_for(lock, kRecoveryPause, [this] { return stop_; });
    if (stop_) break;
    lock.unlock();
    rocksdb::Status s = db_->Resume();
    if (s.ok()) {
      rocksdb::WriteOptions synced;
      synced.sync = true;
      s = db_->Put(synced, families_[kMetadata], "w", "");
    } else if (s.severity() >= rocksdb::Status::kFatalError && DiskTakesWrites()) {
      needs_reopen_ = true;  // not before: until then this one still reads
    }
    lock.lock();
    if (s.ok()) {
      error_ = absl::OkStatus();
      failing_ = false;
    } else {
      error_ = FromRocksDb(s, "the store is not writable");
    }
  }
}

bool Database::DiskTakesWrites() const {
  // By its name a temporary file of RocksDB's, which removes what a crash leaves of it.
  const std::string probe = directory_ + "/000000.dbtmp";
  const bool written = rocksdb::WriteStringToFile(env_, "probe", probe, /*should_sync=*/true).ok();
  (void)env_->DeleteFile(probe);
  return written;
}

uint64_t Database::disk_bytes() const {
  uint64_t bytes = 0;
  for (rocksdb::ColumnFamilyHandle* h : families_) {
    uint64_t v = 0;
    if (db_->GetIntProperty(h, rocksdb::DB::Properties::kTotalSstFilesSize, &v)) bytes += v;
    if (db_->GetIntProperty(h, rocksdb::DB::Properties::kTotalBlobFileSize, &v)) bytes += v;
  }
  return bytes;
}

}  // namespace memory3
