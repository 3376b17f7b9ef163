// MemoryStore on RocksDB and FAISS, one machine. docs/store.md: the bytes on disk, versions as
// stacks of segments, the rule that chooses the index, what a crash leaves.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "memory_server/memory_store.h"

namespace rocksdb {
class Env;
}

namespace memory3 {

struct IndexOptions {
  // Up to so many vectors: flat, exact. Default: 20,000.
  uint64_t flat_max = 20000;
  // Smallest recall@5 (against exact search, on held-out vectors of the same data) an approximate
  // index is accepted with. Default: 0.995.
  double recall_target = 0.995;
  // The mutable tail is folded into a new snapshot above so many vectors, or a quarter of the
  // snapshot if that is more. Default: 4,096.
  uint64_t tail_max = 4096;
  // Threads of a build (never of a query). Default: 0, all cores.
  int build_threads = 0;
};

struct RocksDbStoreOptions {
  std::string directory;    // made if missing
  std::string backup_root;  // empty: no backups (FAILED_PRECONDITION)
  uint64_t cache_bytes = uint64_t{512} << 20;
  uint64_t write_buffer_bytes = uint64_t{64} << 20;  // of each of the large column families
  // So many frozen segments a version may have before some are merged in the background; from three
  // times as many on, a commit merges first. Default: 8.
  uint64_t merge_above = 8;
  // Open although a log is damaged (log_check.h), with what stands before the damage. For once, by
  // an operator who has no better copy. Default: false, DATA_LOSS names file and offset.
  bool accept_log_damage = false;
  IndexOptions index;
  // Tests inject faults through it. Not owned; null: the system's.
  rocksdb::Env* env = nullptr;
};

// Opens or creates. DATA_LOSS when the database is damaged, UNAVAILABLE when another process has it
// open, UNIMPLEMENTED for a layout of another version. Ready for every call when it returns.
absl::StatusOr<std::unique_ptr<MemoryStore>> OpenRocksDbStore(const RocksDbStoreOptions& options);

}  // namespace memory3
