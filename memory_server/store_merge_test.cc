// Many small loads: what a version's entries are spread over stays bounded, and so does the time of
// a commit and of a retrieval; nothing is lost by merging, whatever goes on beside it. (The model
// and crash tests merge at every turn, too.)
#include <gtest/gtest.h>
#include <time.h>

#include <algorithm>
#include <thread>

#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using store_testing::MakeEntry;
using store_testing::MakeId;
using store_testing::MakeVector;

class StoreMergeTest : public testing::Test {
 protected:
  StoreMergeTest() {
    options_.directory = directory_.path() + "/store";
    options_.cache_bytes = 8 << 20;
    options_.write_buffer_bytes = 4 << 20;
    options_.index.build_threads = 1;
    Open();
    EXPECT_TRUE(store_->CreateKnowledgeBase("default", store_testing::SmallSpec("kb"), false).ok());
  }
  void Open() {
    store_ = nullptr;
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  // References [from, to), eight a document; `shift` moves them to other ordinals' places.
  absl::Status Append(const std::string& key, uint64_t from, uint64_t to, uint64_t shift = 0) {
    absl::StatusOr<BeginLoadResult> load =
        store_->BeginLoad("default", "kb", key, LoadMode::kAppend, std::nullopt);
    if (!load.ok()) return load.status();
    std::vector<std::unique_ptr<store_testing::OwnedEntry>> owned;
    std::vector<NewEntry> entries;
    for (uint64_t n = from; n < to; ++n) {
      owned.push_back(
          MakeEntry("doc" + std::to_string(n / 8), static_cast<uint32_t>(n % 8), n + shift));
      entries.push_back(owned.back()->entry);
    }
    absl::Status put = store_->PutLoad("default", load->load.load_id, entries, false).status();
    if (!put.ok()) return put;
    absl::StatusOr<LoadInfo> done = store_->CommitLoad("default", load->load.load_id, true);
    if (!done.ok()) return done.status();
    return done->state == LoadState::kCommitted ? absl::OkStatus()
                                                : absl::InternalError(done->failure);
  }
  uint32_t Layers() {
    const std::vector<VersionInfo> versions = *store_->ListVersions("default", "kb");
    return std::find_if(versions.begin(), versions.end(),
                        [](const VersionInfo& v) { return v.published; })
        ->layers;
  }
  absl::StatusOr<std::vector<Hit>> Ask(uint64_t n) {
    return store_testing::HitsOf(store_testing::Ask(*store_, MakeVector(n)));
  }

  store_testing::TemporaryDirectory directory_;
  RocksDbStoreOptions options_;
  std::unique_ptr<MemoryStore> store_;
};

// Of the processor, not of the clock: other work on the machine counts nothing.
absl::Duration Spent(clockid_t whose) {
  timespec now{};
  EXPECT_EQ(clock_gettime(whose, &now), 0);
  return absl::DurationFromTimespec(now);
}

absl::Duration Median(std::vector<absl::Duration> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

TEST_F(StoreMergeTest, TwoHundredSmallAppendsStayFast) {
  constexpr uint64_t kBase = 8000, kLoads = 200, kEach = 10;
  ASSERT_TRUE(Append("base", 0, kBase).ok());
  std::vector<absl::Duration> commits, retrievals;
  for (uint64_t l = 0; l < kLoads; ++l) {
    const uint64_t from = kBase + kEach * l;
    const absl::Duration begun = Spent(CLOCK_PROCESS_CPUTIME_ID);
    // Every fourth replaces some of the base instead.
    const absl::Status appended =
        l % 4 == 3 ? Append("load" + std::to_string(l), kEach * l, kEach * (l + 1), 100000)
                   : Append("load" + std::to_string(l), from, from + kEach);
    ASSERT_TRUE(appended.ok()) << appended;
    commits.push_back(Spent(CLOCK_PROCESS_CPUTIME_ID) - begun);
    const absl::Duration asked = Spent(CLOCK_THREAD_CPUTIME_ID);
    absl::StatusOr<std::vector<Hit>> hits = Ask(from);
    ASSERT_TRUE(hits.ok()) << hits.status();
    ASSERT_FALSE(hits->empty());
    retrievals.push_back(Spent(CLOCK_THREAD_CPUTIME_ID) - asked);
    // A commit merges first where the background has not kept up.
    ASSERT_LE(Layers(), 3 * options_.merge_above + 3) << "after load " << l;
  }
  const auto part = [&](const std::vector<absl::Duration>& all, uint64_t from) {
    return Median({all.begin() + static_cast<ptrdiff_t>(from),
                   all.begin() + static_cast<ptrdiff_t>(from) + 50});
  };
  for (const auto* times : {&commits, &retrievals}) {
    const absl::Duration early = part(*times, 0), late = part(*times, kLoads - 50);
    RecordProperty(times == &commits ? "commit_ms" : "retrieve_ms",
                   absl::FormatDuration(early) + " to " + absl::FormatDuration(late));
    EXPECT_LT(late, 4 * early + absl::Milliseconds(1)) << early << " to " << late;
  }
  // The background gets it down to few.
  const absl::Time until = absl::Now() + absl::Seconds(60);
  while (Layers() > options_.merge_above + 1 && absl::Now() < until) std::this_thread::yield();
  EXPECT_LE(Layers(), options_.merge_above + 1);

  const auto check = [&] {
    const uint64_t replaced = kLoads / 4 * kEach, added = kLoads * 3 / 4 * kEach;
    Counts counts = *store_->Count("default", "kb");
    EXPECT_EQ(counts.entries, kBase + added);
    EXPECT_EQ(counts.records, kBase + added);
    for (uint64_t l = 0; l < kLoads; ++l) {
      const uint64_t n = l % 4 == 3 ? kEach * l + 100000 : kBase + kEach * l;
      absl::StatusOr<StoredRecord> record = store_->GetRecord("default", "kb", MakeId(n), true);
      ASSERT_TRUE(record.ok()) << n << ": " << record.status();
      ASSERT_EQ(record->sources.size(), 1);
      EXPECT_EQ(record->sources[0].text, "text " + std::to_string(n));
      EXPECT_EQ(Ask(n)->at(0).record_id, MakeId(n));
      if (l % 4 == 3) {
        EXPECT_TRUE(absl::IsNotFound(
            store_->GetRecord("default", "kb", MakeId(kEach * l), false).status()));
      }
    }
    EXPECT_LE(replaced, kBase);
  };
  check();
  Open();
  check();
  // Versions share index files; dropping all but the last leaves it whole.
  const std::vector<VersionInfo> versions = *store_->ListVersions("default", "kb");
  EXPECT_EQ(versions.size(), kLoads + 2);
  for (const VersionInfo& v : versions) {
    if (!v.published) {
      ASSERT_TRUE(store_->DropVersion("default", "kb", v.version).ok());
    }
  }
  check();
  Open();
  check();
}

// Documents and records deleted above a load that is still open must be hidden in it once it is
// published, also when the segment that says so was merged meanwhile.
TEST_F(StoreMergeTest, MergingKeepsWhatHidesALoadStillToCome) {
  store_ = nullptr;
  options_.merge_above = 1;
  Open();
  absl::StatusOr<BeginLoadResult> open =
      store_->BeginLoad("default", "kb", "open", LoadMode::kAppend, std::nullopt);
  ASSERT_TRUE(open.ok());
  std::vector<std::unique_ptr<store_testing::OwnedEntry>> owned;
  std::vector<NewEntry> entries;
  for (uint64_t n = 0; n < 24; ++n) {
    owned.push_back(MakeEntry("doc" + std::to_string(n / 8), static_cast<uint32_t>(n % 8), n));
    entries.push_back(owned.back()->entry);
  }
  ASSERT_TRUE(store_->PutLoad("default", open->load.load_id, entries, true).ok());
  const std::vector<std::string> documents{"doc1"};
  ASSERT_TRUE(store_->DeleteDocuments("default", "kb", documents).ok());
  const std::vector<RecordId> records{MakeId(2)};
  ASSERT_TRUE(store_->DeleteRecords("default", "kb", records).ok());
  auto live = MakeEntry("doc0", 5, 500);
  ASSERT_TRUE(store_->Put("default", "kb", {&live->entry, 1}, true).ok());
  for (int l = 0; l < 6; ++l) {
    ASSERT_TRUE(Append("other" + std::to_string(l), 1000 + 8 * l, 1008 + 8 * l).ok());
  }
  const absl::Time until = absl::Now() + absl::Seconds(60);
  while (Layers() > 5 && absl::Now() < until) std::this_thread::yield();
  ASSERT_LE(Layers(), 5);  // unmerged: 8
  for (bool reopened : {false, true}) {
    if (reopened) Open();
    if (reopened) {
      ASSERT_TRUE(store_->CommitLoad("default", open->load.load_id, true).ok());
    }
    // 6 loads of 8 and the live entry; of the load 24 less doc1's 8, record 2, and doc0/5 replaced.
    EXPECT_EQ(store_->Count("default", "kb")->entries, 49 + (reopened ? 24 - 8 - 1 - 1 : 0));
  }
  EXPECT_TRUE(store_->GetRecord("default", "kb", MakeId(1), false).ok());
  for (uint64_t n : {2, 5, 8, 15}) {
    EXPECT_TRUE(absl::IsNotFound(store_->GetRecord("default", "kb", MakeId(n), false).status()))
        << n;
  }
  EXPECT_TRUE(store_->GetRecord("default", "kb", MakeId(500), false).ok());
}

}  // namespace
}  // namespace memory3
