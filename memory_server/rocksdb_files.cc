// Copies of the whole database: checkpoints for snapshots, incremental backups.
#include <rocksdb/utilities/backup_engine.h>
#include <rocksdb/utilities/checkpoint.h>

#include <filesystem>

#include "memory_server/message.h"
#include "memory_server/rocksdb_core.h"

namespace memory3 {

namespace fs = std::filesystem;

absl::Status RocksDbCore::Checkpoint(const std::string& directory) {
  // No file that the checkpoint's metadata names may go before it is linked.
  std::lock_guard files(files_mu_);
  rocksdb::Checkpoint* raw = nullptr;
  rocksdb::Status s = rocksdb::Checkpoint::Create(db_->db(), &raw);
  std::unique_ptr<rocksdb::Checkpoint> checkpoint(raw);
  if (s.ok()) s = checkpoint->CreateCheckpoint(directory + "/db");
  if (!s.ok()) return FromRocksDb(s, "making a checkpoint");
  std::error_code error;
  fs::create_directories(directory + "/index", error);
  for (const auto& entry : fs::directory_iterator(directory_ + "/index", error)) {
    if (entry.path().extension() != ".idx") continue;
    fs::path target = fs::path(directory) / "index" / entry.path().filename();
    std::error_code copying;
    fs::create_hard_link(entry.path(), target, copying);
    if (copying) fs::copy_file(entry.path(), target, copying);
    if (copying) {
      return absl::UnavailableError(Message("copying ", target.string(), ": ", copying.message()));
    }
  }
  if (error) return absl::UnavailableError(Message("listing index files: ", error.message()));
  return absl::OkStatus();
}

absl::StatusOr<BackupInfo> RocksDbCore::Backup(const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return absl::UnavailableError(Message("making ", directory, ": ", error.message()));
  auto bytes_below = [&] {
    uint64_t bytes = 0;
    for (const auto& e : fs::recursive_directory_iterator(directory, error)) {
      if (e.is_regular_file()) bytes += e.file_size();
    }
    return bytes;
  };
  const uint64_t before = bytes_below();
  rocksdb::BackupEngineOptions options(directory);
  options.share_files_with_checksum = true;
  rocksdb::BackupEngine* raw = nullptr;
  rocksdb::Status s = rocksdb::BackupEngine::Open(db_->env(), options, &raw);
  std::unique_ptr<rocksdb::BackupEngine> engine(raw);
  if (!s.ok()) return FromRocksDb(s, Message("opening the backup in ", directory));
  rocksdb::BackupID id = 0;
  rocksdb::CreateBackupOptions create;
  create.flush_before_backup = true;
  s = engine->CreateNewBackup(create, db_->db(), &id);
  if (!s.ok()) return FromRocksDb(s, Message("backing up to ", directory));
  return BackupInfo{id, bytes_below() - before};
}

}  // namespace memory3
