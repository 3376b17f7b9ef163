// The store: one RocksDbCore at a time, and the files around it. A store's directory holds
//   CURRENT           the name of the directory in use, e.g. "store-3"
//   store-N/db/       the database;  store-N/index/ the index files
//   snapshots/NAME/   db/, index/, MANIFEST.json
#include "memory_server/rocksdb_store.h"

#include <rocksdb/utilities/backup_engine.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <shared_mutex>
#include <thread>

#include "absl/strings/str_format.h"
#include "memory_server/encoding.h"
#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"
#include "memory_server/snapshot_files.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

constexpr auto kReopenWait = std::chrono::seconds(5);
constexpr auto kReopenCheck = std::chrono::milliseconds(200);

class RocksDbStore : public MemoryStore {
 public:
  explicit RocksDbStore(RocksDbStoreOptions options) : options_(std::move(options)) {}
  ~RocksDbStore() override {
    {
      std::lock_guard lock(reopen_mu_);
      stop_ = true;
    }
    reopen_wake_.notify_all();
    if (reopener_.joinable()) reopener_.join();
    if (core_) core_->Stop();
  }

  absl::Status Open() {
    std::error_code error;
    fs::create_directories(options_.directory + "/snapshots", error);
    if (error) {
      return absl::UnavailableError(Message("making ", options_.directory, ": ", error.message()));
    }
    absl::StatusOr<std::string> current = ReadSmallFile(CurrentFile());
    if (absl::IsNotFound(current.status())) {
      generation_ = 1;
      if (absl::Status s = WriteSmallFile(CurrentFile(), "store-1"); !s.ok()) return s;
    } else if (!current.ok()) {
      return current.status();
    } else if (current->rfind("store-", 0) != 0 || current->size() > 24 ||
               !absl::SimpleAtoi(current->substr(6), &generation_)) {
      return absl::DataLossError(Message(CurrentFile(), " does not name a store"));
    }
    // What an interrupted restore left, or one left behind when it was done.
    for (const auto& entry : fs::directory_iterator(options_.directory, error)) {
      std::string name = entry.path().filename();
      if (name.rfind("store-", 0) == 0 && name != Message("store-", generation_)) {
        fs::remove_all(entry.path(), error);
      }
    }
    absl::StatusOr<std::shared_ptr<RocksDbCore>> core =
        RocksDbCore::Open(CurrentDirectory(), options_);
    if (!core.ok()) return core.status();
    core_ = *std::move(core);
    reopener_ = std::thread([this] { ReopenLoop(); });
    return absl::OkStatus();
  }

  // --- forwarded to the core ---
  absl::StatusOr<KnowledgeBaseInfo> CreateKnowledgeBase(std::string_view tenant,
                                                        const KnowledgeBaseSpec& spec,
                                                        bool if_not_exists) override {
    return With([&](RocksDbCore& c) { return c.CreateKnowledgeBase(tenant, spec, if_not_exists); });
  }
  absl::StatusOr<KnowledgeBaseInfo> GetKnowledgeBase(std::string_view tenant, std::string_view kb,
                                                     bool with_codebook) override {
    return With([&](RocksDbCore& c) { return c.GetKnowledgeBase(tenant, kb, with_codebook); });
  }
  absl::StatusOr<std::vector<KnowledgeBaseInfo>> ListKnowledgeBases(
      std::string_view tenant) override {
    return With([&](RocksDbCore& c) { return c.ListKnowledgeBases(tenant); });
  }
  absl::Status DeleteKnowledgeBase(std::string_view tenant, std::string_view name) override {
    return With([&](RocksDbCore& c) { return c.DeleteKnowledgeBase(tenant, name); });
  }
  absl::StatusOr<std::string> SetAlias(std::string_view tenant, std::string_view alias,
                                       std::string_view kb) override {
    return With([&](RocksDbCore& c) { return c.SetAlias(tenant, alias, kb); });
  }
  absl::Status DeleteAlias(std::string_view tenant, std::string_view alias) override {
    return With([&](RocksDbCore& c) { return c.DeleteAlias(tenant, alias); });
  }
  absl::StatusOr<std::map<std::string, std::string>> ListAliases(std::string_view tenant) override {
    return With([&](RocksDbCore& c) { return c.ListAliases(tenant); });
  }
  absl::StatusOr<std::vector<VersionInfo>> ListVersions(std::string_view tenant,
                                                        std::string_view kb) override {
    return With([&](RocksDbCore& c) { return c.ListVersions(tenant, kb); });
  }
  absl::StatusOr<uint64_t> Rollback(std::string_view tenant, std::string_view kb,
                                    std::optional<uint64_t> version) override {
    return With([&](RocksDbCore& c) { return c.Rollback(tenant, kb, version); });
  }
  absl::Status DropVersion(std::string_view tenant, std::string_view kb,
                           uint64_t version) override {
    return With([&](RocksDbCore& c) { return c.DropVersion(tenant, kb, version); });
  }
  absl::StatusOr<std::shared_ptr<const VersionPin>> Pin(std::string_view tenant,
                                                        std::string_view kb,
                                                        std::optional<uint64_t> version) override {
    return With([&](RocksDbCore& c) { return c.Pin(tenant, kb, version); });
  }
  absl::StatusOr<PutResult> Put(std::string_view tenant, std::string_view kb,
                                std::span<const NewEntry> entries, bool wait) override {
    return With([&](RocksDbCore& c) { return c.Put(tenant, kb, entries, wait); });
  }
  absl::Status Sync() override {
    return With([&](RocksDbCore& c) { return c.Sync(); });
  }
  absl::StatusOr<StoredRecord> GetRecord(std::string_view tenant, std::string_view kb,
                                         const RecordId& id, bool with_text) override {
    return With([&](RocksDbCore& c) { return c.GetRecord(tenant, kb, id, with_text); });
  }
  absl::StatusOr<DeleteResult> DeleteRecords(std::string_view tenant, std::string_view kb,
                                             std::span<const RecordId> ids) override {
    return With([&](RocksDbCore& c) { return c.DeleteRecords(tenant, kb, ids); });
  }
  absl::StatusOr<DeleteResult> DeleteDocuments(std::string_view tenant, std::string_view kb,
                                               std::span<const std::string> document_ids) override {
    return With([&](RocksDbCore& c) { return c.DeleteDocuments(tenant, kb, document_ids); });
  }
  absl::StatusOr<DocumentPage> ListDocuments(std::string_view tenant, std::string_view kb,
                                             uint32_t page_size,
                                             std::string_view page_token) override {
    return With([&](RocksDbCore& c) { return c.ListDocuments(tenant, kb, page_size, page_token); });
  }
  absl::StatusOr<Counts> Count(std::string_view tenant, std::string_view kb) override {
    return With([&](RocksDbCore& c) { return c.Count(tenant, kb); });
  }
  absl::StatusOr<RetrieveResult> Retrieve(const VersionPin& pin, std::span<const Query> queries,
                                          const RetrieveOptions& options) override {
    return With([&](RocksDbCore& c) { return c.Retrieve(pin, queries, options); });
  }
  absl::StatusOr<BeginLoadResult> BeginLoad(std::string_view tenant, std::string_view kb,
                                            std::string_view idempotency_key, LoadMode mode,
                                            std::optional<uint64_t> expected_entries) override {
    return With([&](RocksDbCore& c) {
      return c.BeginLoad(tenant, kb, idempotency_key, mode, expected_entries);
    });
  }
  absl::StatusOr<PutResult> PutLoad(std::string_view tenant, std::string_view load_id,
                                    std::span<const NewEntry> entries, bool wait) override {
    return With([&](RocksDbCore& c) { return c.PutLoad(tenant, load_id, entries, wait); });
  }
  absl::StatusOr<std::unique_ptr<LoadPutter>> OpenLoadPutter(std::string_view tenant,
                                                             std::string_view load_id) override;
  absl::StatusOr<DocumentPage> ListLoadedDocuments(std::string_view tenant,
                                                   std::string_view load_id, uint32_t page_size,
                                                   std::string_view page_token) override {
    return With([&](RocksDbCore& c) {
      return c.ListLoadedDocuments(tenant, load_id, page_size, page_token);
    });
  }
  absl::StatusOr<LoadInfo> CommitLoad(std::string_view tenant, std::string_view load_id,
                                      bool wait) override {
    std::shared_ptr<RocksDbCore> core = Core();
    if (core == nullptr) return Closed();
    absl::StatusOr<LoadInfo> begun =
        With([&](RocksDbCore& c) { return c.CommitLoad(tenant, load_id); });
    if (!begun.ok() || !wait) return begun;
    // Not behind the gate: a restore must not hold up everybody until an index is built.
    return core->AwaitLoad(tenant, load_id);
  }
  absl::StatusOr<LoadInfo> AbortLoad(std::string_view tenant, std::string_view load_id) override {
    return With([&](RocksDbCore& c) { return c.AbortLoad(tenant, load_id); });
  }
  absl::StatusOr<LoadInfo> GetLoad(std::string_view tenant, std::string_view load_id) override {
    return With([&](RocksDbCore& c) { return c.GetLoad(tenant, load_id); });
  }
  absl::StatusOr<std::vector<LoadInfo>> ListLoads(std::string_view tenant,
                                                  std::string_view kb) override {
    return With([&](RocksDbCore& c) { return c.ListLoads(tenant, kb); });
  }
  StoreStatus GetStatus() override {
    std::shared_ptr<RocksDbCore> c = Core();
    if (c) return c->GetStatus();
    StoreStatus status;
    status.writable = Closed();
    return status;
  }
  absl::Status Writable() override {
    std::shared_ptr<RocksDbCore> c = Core();
    return c ? c->Writable() : Closed();
  }

  // --- files ---
  absl::StatusOr<SnapshotInfo> CreateSnapshot(std::string_view name) override;
  absl::StatusOr<std::vector<SnapshotInfo>> ListSnapshots() override;
  absl::Status RestoreSnapshot(std::string_view name) override;
  absl::Status DeleteSnapshot(std::string_view name) override;
  absl::StatusOr<BackupInfo> CreateBackup(std::string_view directory) override;
  absl::Status RestoreBackup(std::string_view directory,
                             std::optional<uint64_t> backup_id) override;

 private:
  class Putter;

  template <typename F>
  auto With(const F& f) -> decltype(f(std::declval<RocksDbCore&>())) {
    // The turnstile lets an exclusive holder in although readers overlap without end.
    { std::lock_guard lock(turnstile_); }
    std::shared_lock gate(gate_);
    if (core_ == nullptr) return Closed();
    return f(*core_);
  }
  std::shared_ptr<RocksDbCore> Core() {
    { std::lock_guard lock(turnstile_); }
    std::shared_lock gate(gate_);
    return core_;
  }
  static absl::Status Closed() {
    return absl::UnavailableError("the store's disk failed; it is being opened again");
  }
  std::string CurrentFile() const { return options_.directory + "/CURRENT"; }
  std::string CurrentDirectory() const {
    return Message(options_.directory, "/store-", generation_);
  }
  std::string SnapshotDirectory(std::string_view name) const {
    return Message(options_.directory, "/snapshots/", name);
  }
  absl::Status SwitchTo(const std::function<absl::Status(const std::string& directory)>& fill);
  absl::StatusOr<std::string> BackupDirectory(std::string_view directory) const;
  void ReopenLoop();

  const RocksDbStoreOptions options_;
  std::mutex snapshots_mu_;  // one of snapshot, restore, backup at a time
  std::mutex turnstile_;
  std::shared_mutex gate_;  // held shared by every call, alone by a change of core_
  std::shared_ptr<RocksDbCore> core_;
  uint64_t generation_ = 1;

  std::mutex reopen_mu_;
  std::condition_variable reopen_wake_;
  bool stop_ = false;
  std::thread reopener_;
};

// The caller's thread makes batches ready, one of its own writes them.
class RocksDbStore::Putter : public LoadPutter {
 public:
  Putter(RocksDbStore* store, std::string_view tenant, std::string_view load_id)
      : store_(store), tenant_(tenant), load_id_(load_id), thread_([this] { Work(); }) {}
  ~Putter() override {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  absl::Status Put(std::shared_ptr<const std::vector<NewEntry>> entries) override {
    Next& next = next_[turn_];
    absl::Status prepared = store_->With([&](RocksDbCore& c) {
      next.ready.build = true;
      return c.PreparePutLoad(tenant_, load_id_, *entries, &next.ready);
    });
    next.entries = std::move(entries);
    {
      std::unique_lock lock(mu_);
      changed_.wait(lock, [this] { return writing_ == nullptr; });
      if (!status_.ok()) return status_;
      if (!prepared.ok()) return status_ = prepared;
      writing_ = &next;
    }
    changed_.notify_all();
    turn_ = 1 - turn_;
    return absl::OkStatus();
  }

  absl::StatusOr<PutResult> Finish(bool wait) override {
    {
      std::unique_lock lock(mu_);
      changed_.wait(lock, [this] { return writing_ == nullptr; });
      if (!status_.ok()) return status_;
    }
    if (wait) {
      if (absl::Status s = store_->Sync(); !s.ok()) return s;
    }
    return result_;
  }

 private:
  struct Next {
    std::shared_ptr<const std::vector<NewEntry>> entries;
    RocksDbCore::ReadyPut ready;
  };

  void Work() {
    std::unique_lock lock(mu_);
    for (;;) {
      changed_.wait(lock, [this] { return writing_ != nullptr || stop_; });
      if (writing_ == nullptr) return;
      Next& next = *writing_;
      lock.unlock();
      absl::StatusOr<PutResult> put = store_->With([&](RocksDbCore& c) {
        const std::weak_ptr<RocksDbCore> now = c.weak_from_this();
        const std::weak_ptr<RocksDbCore>& then = next.ready.core;
        // Made ready for a database that was replaced since, by a restore: from the beginning.
        if (now.owner_before(then) || then.owner_before(now)) {
          return c.PutLoad(tenant_, load_id_, *next.entries, /*wait=*/false);
        }
        return c.WritePutLoad(&next.ready);
      });
      lock.lock();
      if (put.ok()) {
        result_.entries += put->entries;
        result_.new_records += put->new_records;
      } else {
        status_ = put.status();
      }
      writing_ = nullptr;
      changed_.notify_all();
    }
  }

  RocksDbStore* const store_;
  const std::string tenant_, load_id_;
  Next next_[2];  // one is made ready while the other may be written
  int turn_ = 0;

  std::mutex mu_;
  std::condition_variable changed_;
  Next* writing_ = nullptr;
  absl::Status status_;  // what went wrong first
  PutResult result_;
  bool stop_ = false;
  std::thread thread_;  // last: it uses the rest
};

absl::StatusOr<std::unique_ptr<LoadPutter>> RocksDbStore::OpenLoadPutter(std::string_view tenant,
                                                                         std::string_view load_id) {
  if (absl::StatusOr<LoadInfo> load = GetLoad(tenant, load_id); !load.ok()) return load.status();
  return std::make_unique<Putter>(this, tenant, load_id);
}

// Some failures of the disk RocksDB gets over only by being opened again.
void RocksDbStore::ReopenLoop() {
  std::unique_lock lock(reopen_mu_);
  while (!reopen_wake_.wait_for(lock, kReopenCheck, [this] { return stop_; })) {
    {
      std::shared_lock gate(gate_);
      if (core_ != nullptr && !core_->needs_reopen()) continue;
    }
    std::lock_guard one(snapshots_mu_);
    std::lock_guard turnstile(turnstile_);
    std::unique_lock gate(gate_);
    if (core_ != nullptr) {
      core_->Stop();
      // Bytes handed out hold the old database open; they are on their way to the wire.
      const auto until = std::chrono::steady_clock::now() + kReopenWait;
      while (!core_->database_unshared() && std::chrono::steady_clock::now() < until) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      core_ = nullptr;
    }
    absl::StatusOr<std::shared_ptr<RocksDbCore>> core =
        RocksDbCore::Open(CurrentDirectory(), options_);
    if (core.ok()) {
      core_ = *std::move(core);
      spdlog::info("store: opened again after a failure of the disk");
    } else {
      spdlog::warn("store: not opened again yet: {}", core.status().ToString());
    }
  }
}

absl::StatusOr<SnapshotInfo> RocksDbStore::CreateSnapshot(std::string_view name) {
  std::string chosen(name);
  if (chosen.empty()) {
    chosen = absl::FormatTime("%Y%m%dT%H%M%E6SZ", absl::Now(), absl::UTCTimeZone());
  }
  if (absl::Status s = CheckName("snapshot", chosen); !s.ok()) return s;
  std::lock_guard one(snapshots_mu_);
  std::error_code error;
  const std::string directory = SnapshotDirectory(chosen);
  if (fs::exists(directory, error)) {
    return absl::AlreadyExistsError(Message("snapshot \"", chosen, "\" exists"));
  }
  // Made under a name no snapshot can have, renamed when it is whole.
  const std::string making = SnapshotDirectory(".making");
  fs::remove_all(making, error);
  fs::create_directories(making, error);
  if (error) return absl::UnavailableError(Message("making ", making, ": ", error.message()));
  absl::Status status = With([&](RocksDbCore& c) { return c.Checkpoint(making); });
  absl::StatusOr<SnapshotInfo> info = status.ok() ? WriteManifest(making, chosen, absl::Now())
                                                  : absl::StatusOr<SnapshotInfo>(status);
  if (info.ok()) status = RenameDurably(making, directory);
  if (!info.ok() || !status.ok()) {
    fs::remove_all(making, error);
    return info.ok() ? status : info.status();
  }
  return info;
}

absl::StatusOr<std::vector<SnapshotInfo>> RocksDbStore::ListSnapshots() {
  std::vector<SnapshotInfo> all;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(options_.directory + "/snapshots", error)) {
    std::string name = entry.path().filename();
    if (name[0] == '.') continue;
    absl::StatusOr<SnapshotInfo> info = ReadManifest(entry.path(), nullptr);
    // A damaged one is still listed, so that it can be seen and deleted.
    if (info.ok() && info->name == name) {
      all.push_back(*std::move(info));
    } else {
      all.push_back({name, absl::InfinitePast(), 0, Hash256()});
    }
  }
  std::sort(all.begin(), all.end(), [](const SnapshotInfo& a, const SnapshotInfo& b) {
    return std::tie(a.created_at, a.name) > std::tie(b.created_at, b.name);
  });
  return all;
}

absl::Status RocksDbStore::DeleteSnapshot(std::string_view name) {
  if (absl::Status s = CheckName("snapshot", name); !s.ok()) return s;
  std::lock_guard one(snapshots_mu_);
  std::error_code error;
  const std::string directory = SnapshotDirectory(name);
  if (!fs::exists(directory, error)) {
    return absl::NotFoundError(Message("snapshot \"", name, "\" is unknown"));
  }
  const std::string going = SnapshotDirectory(".deleting");
  fs::remove_all(going, error);
  if (absl::Status s = RenameDurably(directory, going); !s.ok()) return s;
  fs::remove_all(going, error);
  return absl::OkStatus();
}

// Fills the next generation's directory, opens it, and makes it the one in use. On any failure the
// present one stays.
absl::Status RocksDbStore::SwitchTo(
    const std::function<absl::Status(const std::string& directory)>& fill) {
  std::error_code error;
  const uint64_t next = generation_ + 1;
  const std::string directory = Message(options_.directory, "/store-", next);
  fs::remove_all(directory, error);
  absl::Status status = fill(directory);
  std::shared_ptr<RocksDbCore> core;
  if (status.ok()) {
    absl::StatusOr<std::shared_ptr<RocksDbCore>> opened = RocksDbCore::Open(directory, options_);
    if (opened.ok()) {
      core = *std::move(opened);
    } else {
      status = opened.status();
    }
  }
  std::string old;
  std::shared_ptr<RocksDbCore> old_core;
  if (status.ok()) {
    std::lock_guard turnstile(turnstile_);
    std::unique_lock gate(gate_);
    status = WriteSmallFile(CurrentFile(), Message("store-", next));
    if (status.ok()) {
      old = CurrentDirectory();
      generation_ = next;
      old_core = std::exchange(core_, core);
    }
  }
  if (!status.ok()) {
    if (core) core->Stop();
    core = nullptr;
    fs::remove_all(directory, error);
    return status;
  }
  if (old_core) old_core->Stop();
  old_core = nullptr;
  // Bytes still handed out stay readable: their files are open.
  fs::remove_all(old, error);
  return absl::OkStatus();
}

absl::Status RocksDbStore::RestoreSnapshot(std::string_view name) {
  if (absl::Status s = CheckName("snapshot", name); !s.ok()) return s;
  std::lock_guard one(snapshots_mu_);
  std::error_code error;
  const std::string directory = SnapshotDirectory(name);
  if (!fs::exists(directory, error)) {
    return absl::NotFoundError(Message("snapshot \"", name, "\" is unknown"));
  }
  if (absl::Status s = VerifySnapshot(directory, name); !s.ok()) return s;
  return SwitchTo([&](const std::string& to) { return CopySnapshot(directory, to); });
}

absl::StatusOr<std::string> RocksDbStore::BackupDirectory(std::string_view directory) const {
  if (options_.backup_root.empty()) {
    return absl::FailedPreconditionError("backups are off: the server has no backup root");
  }
  if (absl::Status s = CheckRelativePath("directory", directory); !s.ok()) return s;
  return ResolveBelow(options_.backup_root, directory);
}

absl::StatusOr<BackupInfo> RocksDbStore::CreateBackup(std::string_view directory) {
  absl::StatusOr<std::string> where = BackupDirectory(directory);
  if (!where.ok()) return where.status();
  std::lock_guard one(snapshots_mu_);
  return With([&](RocksDbCore& c) { return c.Backup(*where); });
}

absl::Status RocksDbStore::RestoreBackup(std::string_view directory,
                                         std::optional<uint64_t> backup_id) {
  absl::StatusOr<std::string> where = BackupDirectory(directory);
  if (!where.ok()) return where.status();
  std::lock_guard one(snapshots_mu_);
  std::error_code error;
  if (!fs::exists(*where + "/meta", error)) {
    return absl::NotFoundError(Message("directory \"", directory, "\" holds no backup"));
  }
  return SwitchTo([&](const std::string& to) -> absl::Status {
    rocksdb::BackupEngineOptions options(*where);
    rocksdb::BackupEngineReadOnly* raw = nullptr;
    rocksdb::Env* env = options_.env != nullptr ? options_.env : rocksdb::Env::Default();
    rocksdb::Status s = rocksdb::BackupEngineReadOnly::Open(env, options, &raw);
    std::unique_ptr<rocksdb::BackupEngineReadOnly> engine(raw);
    if (!s.ok()) return FromRocksDb(s, "opening the backup");
    std::vector<rocksdb::BackupInfo> all;
    engine->GetBackupInfo(&all);
    if (all.empty()) return absl::NotFoundError(Message("directory \"", directory, "\" is empty"));
    const uint64_t id = backup_id.value_or(all.back().backup_id);
    if (std::none_of(all.begin(), all.end(), [&](const auto& b) { return b.backup_id == id; })) {
      return absl::NotFoundError(Message("backup_id ", id, " is unknown"));
    }
    std::error_code made;
    fs::create_directories(to, made);
    if (made) return absl::UnavailableError(Message("making ", to, ": ", made.message()));
    s = engine->VerifyBackup(static_cast<rocksdb::BackupID>(id), /*verify_with_checksum=*/true);
    if (!s.ok()) return absl::DataLossError(Message("backup ", id, ": ", s.ToString()));
    s = engine->RestoreDBFromBackup(static_cast<rocksdb::BackupID>(id), to + "/db", to + "/db");
    return FromRocksDb(s, "restoring the backup");
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<MemoryStore>> OpenRocksDbStore(const RocksDbStoreOptions& options) {
  auto store = std::make_unique<RocksDbStore>(options);
  if (absl::Status s = store->Open(); !s.ok()) return s;
  return store;
}

}  // namespace memory3
