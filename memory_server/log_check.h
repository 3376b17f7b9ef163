// Damage in RocksDB's logs (write-ahead logs, the manifest) told from a torn tail. Both end a
// replay; but a torn tail is what a killed process leaves, bytes nobody was told are safe, while a
// flipped bit takes acknowledged changes with it. RocksDB's replay cannot always tell: a flipped
// length looks as if the file ended too early.
//
// The format: blocks of 32 KiB of records: u32 masked CRC32C of type and payload, u16 payload
// bytes, u8 type, payload; a record never crosses a block.
//
// Thread-safety: any thread. A log that is being appended to reads as one with a torn tail.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace rocksdb {
class Env;
}

namespace memory3 {

// OK for a sound log, also one that ends within a record or in zeros never written to. DATA_LOSS
// names file and offset where any byte of a record is not what was written, or where bytes follow
// zeros.
absl::Status CheckLog(rocksdb::Env* env, const std::string& path);

// The manifest that CURRENT names and all write-ahead logs (*.log) of a database. OK for a
// directory that holds none.
absl::Status CheckLogs(rocksdb::Env* env, const std::string& directory);

}  // namespace memory3
