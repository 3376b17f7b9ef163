// A torn tail is no damage, every flipped bit is: of a log as RocksDB writes it, and through the
// whole store.
#include "memory_server/log_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using store_testing::MakeEntry;
using store_testing::MakeId;
using store_testing::TemporaryDirectory;
using testing::HasSubstr;

std::string ReadAll(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

void WriteAll(const fs::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

std::vector<fs::path> Logs(const fs::path& directory) {
  std::vector<fs::path> logs;
  for (const auto& f : fs::directory_iterator(directory)) {
    if (f.path().extension() == ".log") logs.push_back(f.path());
  }
  return logs;
}

std::string Flipped(std::string bytes, size_t bit) {
  bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
  return bytes;
}

class LogCheckTest : public testing::Test {
 protected:
  // A write-ahead log of RocksDB's with one record for each size; where each of them ends.
  std::string Log(const std::vector<size_t>& sizes, std::vector<size_t>* ends = nullptr) {
    rocksdb::Options options;
    options.create_if_missing = true;
    rocksdb::DB* raw = nullptr;
    EXPECT_TRUE(rocksdb::DB::Open(options, directory_.path() + "/db", &raw).ok());
    std::unique_ptr<rocksdb::DB> db(raw);
    const fs::path log = Logs(directory_.path() + "/db").at(0);
    std::mt19937_64 random(1);
    for (size_t size : sizes) {
      std::string value;
      while (value.size() < size) value.push_back(static_cast<char>(random()));
      EXPECT_TRUE(db->Put(rocksdb::WriteOptions(), "key", value).ok());
      if (ends != nullptr) ends->push_back(fs::file_size(log));
    }
    return ReadAll(log);
  }
  absl::Status Check(std::string_view bytes) {
    WriteAll(file_, bytes);
    return CheckLog(rocksdb::Env::Default(), file_);
  }

  TemporaryDirectory directory_;
  const std::string file_ = directory_.path() + "/copy.log";
};

TEST_F(LogCheckTest, EveryFlippedBitIsFoundAndEveryTornTailTolerated) {
  const std::string log = Log({10, 0, 60, 3});
  ASSERT_TRUE(Check(log).ok());
  for (size_t bit = 0; bit < 8 * log.size(); ++bit) {
    ASSERT_EQ(Check(Flipped(log, bit)).code(), absl::StatusCode::kDataLoss) << "bit " << bit;
  }
  for (size_t size = 0; size < log.size(); ++size) {
    ASSERT_TRUE(Check(log.substr(0, size)).ok()) << Check(log.substr(0, size));
  }
  // Preallocated, never written.
  EXPECT_TRUE(Check(log + std::string(100000, '\0')).ok());
  EXPECT_EQ(Check(log + std::string(100000, '\0') + "x").code(), absl::StatusCode::kDataLoss);
}

TEST_F(LogCheckTest, RecordsAcrossBlocksToo) {
  const std::string log = Log({40000, 20, 32768 - 100, 90000, 1, 3});
  ASSERT_TRUE(Check(log).ok());
  std::mt19937_64 random(2);
  for (int i = 0; i < 100; ++i) {
    const size_t size = random() % log.size();
    ASSERT_TRUE(Check(log.substr(0, size)).ok()) << Check(log.substr(0, size));
    const size_t bit = random() % (8 * log.size());
    const absl::Status status = Check(Flipped(log, bit));
    // Where a block's last bytes are too few for a header, nothing is stored in them.
    const size_t of_block = bit / 8 % 32768;
    if (of_block >= 32768 - 6 && status.ok()) continue;
    ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << "bit " << bit;
    EXPECT_THAT(std::string(status.message()), HasSubstr(file_));
  }
}

// The store as kill -9 leaves it, with references 0 to kReferences - 1 acknowledged.
class KilledStoreTest : public testing::Test {
 protected:
  static constexpr uint64_t kReferences = 30;
  KilledStoreTest() {
    RocksDbStoreOptions options;
    options.directory = directory_.path() + "/running";
    options.cache_bytes = 8 << 20;
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options);
    EXPECT_TRUE(store.ok()) << store.status();
    EXPECT_TRUE(
        (*store)->CreateKnowledgeBase("default", store_testing::SmallSpec("kb"), false).ok());
    for (uint64_t n = 0; n < kReferences; ++n) {
      auto e = MakeEntry("doc", static_cast<uint32_t>(n), n);
      EXPECT_TRUE((*store)->Put("default", "kb", {&e->entry, 1}, true).ok());
    }
    // What the process wrote is in the files; it never closes this copy of them.
    fs::copy(options.directory, killed_, fs::copy_options::recursive);
    options_ = options;
    options_.directory = killed_;
    const std::vector<fs::path> logs = Logs(killed_ + "/store-1/db");
    EXPECT_EQ(logs.size(), 1);
    log_ = logs.at(0);
    sound_ = ReadAll(log_);
  }
  // The references that are there.
  static uint64_t Held(MemoryStore& store) {
    uint64_t held = 0;
    for (uint64_t n = 0; n < kReferences; ++n) {
      held += store.GetRecord("default", "kb", MakeId(n), true).ok();
    }
    EXPECT_EQ(store.Count("default", "kb")->entries, held);
    return held;
  }
  void Refresh(std::string_view log) {
    fs::remove_all(copy_);
    fs::copy(killed_, copy_, fs::copy_options::recursive);
    WriteAll(copy_ + "/store-1/db/" + log_.filename().string(), log);
    options_.directory = copy_;
  }

  TemporaryDirectory directory_;
  const std::string killed_ = directory_.path() + "/killed";
  const std::string copy_ = directory_.path() + "/copy";
  RocksDbStoreOptions options_;
  fs::path log_;
  std::string sound_;
};

TEST_F(KilledStoreTest, ATornTailLosesOnlyTheLastAndAFlippedBitIsReported) {
  Refresh(sound_);
  {
    auto store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_EQ(Held(**store), kReferences);
  }
  Refresh(sound_.substr(0, sound_.size() - 3));
  {
    auto store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_EQ(Held(**store), kReferences - 1);
  }
  for (size_t part : {1, 2, 3, 4, 5, 6, 7}) {
    const std::string damaged = Flipped(sound_, sound_.size() * part + 3);  // part eighths in
    Refresh(damaged);
    auto store = OpenRocksDbStore(options_);
    EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss) << store.status();
    EXPECT_THAT(std::string(store.status().message()), HasSubstr(log_.filename().string()));
    EXPECT_THAT(std::string(store.status().message()), HasSubstr("damaged at byte"));
    // Refusing has changed nothing; who accepts the loss gets what stands before it.
    EXPECT_EQ(ReadAll(copy_ + "/store-1/db/" + log_.filename().string()), damaged);
  }
  options_.accept_log_damage = true;
  auto store = OpenRocksDbStore(options_);
  ASSERT_TRUE(store.ok()) << store.status();
  const uint64_t held = Held(**store);
  EXPECT_GT(held, 0);
  EXPECT_LT(held, kReferences);
}

TEST_F(KilledStoreTest, AFlippedBitOfTheManifestIsReported) {
  std::string name = ReadAll(killed_ + "/store-1/db/CURRENT");
  name.pop_back();
  const std::string manifest = ReadAll(killed_ + "/store-1/db/" + name);
  std::mt19937_64 random(3);
  for (int i = 0; i < 20; ++i) {
    Refresh(sound_);
    // The last bytes too: RocksDB takes a flipped length there for the end of the file.
    const size_t bit = i < 2 ? 8 * (manifest.size() - 1 - i) : random() % (8 * manifest.size());
    WriteAll(copy_ + "/store-1/db/" + name, Flipped(manifest, bit));
    auto store = OpenRocksDbStore(options_);
    EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss) << bit << ": " << store.status();
    EXPECT_THAT(std::string(store.status().message()), HasSubstr(name));
  }
}

}  // namespace
}  // namespace memory3
