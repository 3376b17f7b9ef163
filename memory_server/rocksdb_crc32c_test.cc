#include "memory_server/rocksdb_crc32c.h"

#include <gtest/gtest.h>
#include <rocksdb/file_checksum.h>

#include <memory>
#include <string>

namespace memory3 {
namespace {

TEST(RocksDbCrc32cTest, RocksDbCallsOurs) { EXPECT_TRUE(RocksDbUsesOurCrc32c()); }

TEST(RocksDbCrc32cTest, RocksDbsChecksumIsCrc32c) {
  // RFC 3720, B.4: 32 bytes of zeroes, of ones, ascending; here in two parts.
  std::string ascending;
  for (char c = 0; c < 32; ++c) ascending.push_back(c);
  const std::pair<std::string, std::string> vectors[] = {
      {std::string(32, '\0'), std::string("\x8A\x91\x36\xAA", 4)},
      {std::string(32, '\xFF'), std::string("\x62\xA8\xAB\x43", 4)},
      {ascending, std::string("\x46\xDD\x79\x4E", 4)}};
  for (const auto& [data, checksum] : vectors) {
    const std::unique_ptr<rocksdb::FileChecksumGenerator> generator =
        rocksdb::GetFileChecksumGenCrc32cFactory()->CreateFileChecksumGenerator({});
    generator->Update(data.data(), 5);
    generator->Update(data.data() + 5, data.size() - 5);
    generator->Finalize();
    EXPECT_EQ(generator->GetChecksum(), checksum);
  }
}

}  // namespace
}  // namespace memory3
