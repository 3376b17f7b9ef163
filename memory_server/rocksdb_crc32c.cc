#include "memory_server/rocksdb_crc32c.h"

#include <rocksdb/file_checksum.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "memory/hash.h"

namespace memory3 {
namespace {

std::atomic<bool> called{false};

}  // namespace

bool RocksDbUsesOurCrc32c() {
  // RocksDB's own generator of file checksums computes one through its copy of the function.
  const std::unique_ptr<rocksdb::FileChecksumGenerator> generator =
      rocksdb::GetFileChecksumGenCrc32cFactory()->CreateFileChecksumGenerator({});
  if (generator == nullptr) return false;
  called = false;
  generator->Update("123456789", 9);
  generator->Finalize();
  return called;
}

}  // namespace memory3

namespace rocksdb::crc32c {

// As RocksDB declares it (util/crc32c.h, not installed): the CRC32C of what `crc` is of followed by
// `data`.
uint32_t Extend(uint32_t crc, const char* data, size_t size) {
  if (!memory3::called.load(std::memory_order_relaxed)) memory3::called = true;
  return memory3::Crc32c({data, size}, crc);
}

}  // namespace rocksdb::crc32c
