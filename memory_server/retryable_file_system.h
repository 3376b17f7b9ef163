// A file system that reports failed writes as ones that may be tried again. RocksDB takes an I/O
// error of a write for fatal unless its file system says otherwise, and leaves a fatal one only by
// being closed, readers and all; from any other it resumes in place: unwritten memtables go into
// new files behind a new log, which is right also where a failed sync has dropped pages.
// A full disk it takes for fatal in some places and tries to get over by itself in others: that is
// handed on as any other error, marked.
//
// Thread-safety: as the file system below.
#pragma once

#include <memory>

namespace rocksdb {
class FileSystem;
}

namespace memory3 {

// Begins the message of an I/O error that is a full disk.
inline constexpr char kNoSpaceMark[] = "the disk is full";

std::shared_ptr<rocksdb::FileSystem> MakeRetryableFileSystem(
    const std::shared_ptr<rocksdb::FileSystem>& below);

}  // namespace memory3
