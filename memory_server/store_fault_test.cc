// Failing disks: writes fail with the cause, readers never notice, and when the disk is back so are
// writes, with everything acknowledged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rocksdb/env.h>

#include <atomic>
#include <thread>

#include "memory_server/faulty_file_system.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using store_testing::FaultyFileSystem;
using store_testing::MakeEntry;
using store_testing::MakeId;
using store_testing::MakeRecord;
using store_testing::MakeVector;
using Fault = FaultyFileSystem::Fault;

class StoreFaultTest : public testing::TestWithParam<Fault> {
 protected:
  StoreFaultTest() {
    options_.directory = directory_.path() + "/store";
    options_.cache_bytes = 8 << 20;
    options_.write_buffer_bytes = 64 << 10;  // so that puts soon make tables
    options_.index.build_threads = 1;
    options_.env = env_.get();
    Open();
    EXPECT_TRUE(store_->CreateKnowledgeBase("default", store_testing::SmallSpec("kb"), false).ok());
  }
  void Open() {
    store_ = nullptr;
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  absl::Status Put(uint64_t n) {
    auto e = MakeEntry("doc" + std::to_string(n), 0, n);
    return store_->Put("default", "kb", {&e->entry, 1}, true).status();
  }
  // Reads reference `n` in every way.
  absl::Status Read(uint64_t n) {
    absl::StatusOr<StoredRecord> record = store_->GetRecord("default", "kb", MakeId(n), true);
    if (!record.ok()) return record.status();
    if (record->record.bytes != MakeRecord(n)) return absl::InternalError("other bytes");
    absl::StatusOr<RetrieveResult> found = store_testing::Ask(*store_, MakeVector(n), 1);
    if (!found.ok()) return found.status();
    if (found->queries[0].empty() || found->queries[0][0].record_id != MakeId(n)) {
      return absl::InternalError("another record");
    }
    const RecordId id = MakeId(n);
    if (absl::Status s = found->records->Read({&id, 1})[0].status(); !s.ok()) return s;
    return store_->ListDocuments("default", "kb", 3, "").status();
  }

  store_testing::TemporaryDirectory directory_;
  std::shared_ptr<FaultyFileSystem> faulty_ = std::make_shared<FaultyFileSystem>();
  std::unique_ptr<rocksdb::Env> env_ = rocksdb::NewCompositeEnv(faulty_);
  RocksDbStoreOptions options_;
  std::unique_ptr<MemoryStore> store_;
};

TEST_P(StoreFaultTest, WritesFailWithTheCauseReadersGoOnAndItRecovers) {
  ASSERT_TRUE(Put(0).ok());
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> reads{0};
  std::thread reader([&] {
    while (!stop) {
      const absl::Status read = Read(0);
      EXPECT_TRUE(read.ok()) << read;
      if (!read.ok()) return;
      ++reads;
    }
  });
  uint64_t next = 1;  // all below are acknowledged, but for the one that failed
  std::vector<uint64_t> failed;
  for (int round = 0; round < 2; ++round) {
    faulty_->fault = GetParam();
    const bool full = GetParam() == Fault::kNoSpace;
    // Background work fails after some puts, each of which is acknowledged as long as they do not.
    absl::Status status;
    const absl::Time give_up = absl::Now() + absl::Seconds(60);
    while (status.ok() && absl::Now() < give_up) status = Put(next++);
    failed.push_back(next - 1);
    EXPECT_EQ(status.code(),
              full ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kUnavailable)
        << status;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("injected"));
    EXPECT_FALSE(store_->Writable().ok());
    EXPECT_FALSE(store_->GetStatus().writable.ok());
    // Many more reads while it lasts.
    for (const uint64_t until = reads + 50; reads < until && !testing::Test::HasFailure();) {
      std::this_thread::yield();
    }
    EXPECT_FALSE(store_->Writable().ok());

    faulty_->fault = Fault::kNone;
    const absl::Time until = absl::Now() + absl::Seconds(60);
    while (!store_->Writable().ok() && absl::Now() < until) std::this_thread::yield();
    ASSERT_TRUE(store_->Writable().ok()) << store_->Writable();
    ASSERT_TRUE(Put(next++).ok());
  }
  stop = true;
  reader.join();
  for (bool reopened : {false, true}) {
    if (reopened) Open();
    for (uint64_t n = 0; n < next; ++n) {
      // One that failed may be there or not, as after any error.
      if (std::count(failed.begin(), failed.end(), n) != 0) continue;
      const absl::Status read = Read(n);
      ASSERT_TRUE(read.ok()) << n << " of " << next << ", reopened " << reopened << ": " << read;
    }
  }
}

std::string NameOf(const testing::TestParamInfo<Fault>& info) {
  switch (info.param) {
    case Fault::kNone:
      return "None";
    case Fault::kNoSpace:
      return "NoSpace";
    case Fault::kError:
      return "Error";
    case Fault::kSync:
      return "Sync";
    case Fault::kLog:
      return "Log";
    case Fault::kTable:
      return "Table";
  }
  return "?";
}

INSTANTIATE_TEST_SUITE_P(Faults, StoreFaultTest,
                         testing::Values(Fault::kNoSpace, Fault::kError, Fault::kSync, Fault::kLog,
                                         Fault::kTable),
                         NameOf);

}  // namespace
}  // namespace memory3
