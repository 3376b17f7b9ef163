// What the model test does not reach: bad input, damage on disk, snapshots, backups, pins, and many
// threads at once (run under ThreadSanitizer by `make check`).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <thread>

#include "memory/vq_codebook.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using store_testing::MakeEntry;
using store_testing::MakeId;
using store_testing::MakeRecord;
using store_testing::MakeVector;
using store_testing::OwnedEntry;
using store_testing::SmallSpec;
using testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kPrecondition = absl::StatusCode::kFailedPrecondition;
constexpr absl::StatusCode kNotFound = absl::StatusCode::kNotFound;

class StoreTest : public testing::Test {
 protected:
  StoreTest() {
    options_.directory = directory_.path() + "/store";
    options_.backup_root = directory_.path() + "/backups";
    options_.cache_bytes = 8 << 20;
    options_.write_buffer_bytes = 1 << 20;
    options_.index.build_threads = 1;
    Open();
    EXPECT_TRUE(store_->CreateKnowledgeBase("default", SmallSpec("kb"), false).ok());
  }
  void Open() {
    store_ = nullptr;
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  absl::Status PutOne(const OwnedEntry& e, bool wait = true) {
    return store_->Put("default", "kb", {&e.entry, 1}, wait).status();
  }
  absl::StatusOr<std::vector<Hit>> Ask(const std::vector<float>& vector, uint32_t top_k = 5) {
    return store_testing::HitsOf(store_testing::Ask(*store_, vector, top_k));
  }
  // Loads references [from, to), one document each.
  absl::StatusOr<LoadInfo> LoadAll(const std::string& key, LoadMode mode, uint64_t from,
                                   uint64_t to) {
    absl::StatusOr<BeginLoadResult> load =
        store_->BeginLoad("default", "kb", key, mode, std::nullopt);
    if (!load.ok()) return load.status();
    for (uint64_t n = from; n < to; ++n) {
      auto e = MakeEntry("doc" + std::to_string(n), 0, n);
      absl::StatusOr<PutResult> put =
          store_->PutLoad("default", load->load.load_id, {&e->entry, 1}, false);
      if (!put.ok()) return put.status();
    }
    return store_->CommitLoad("default", load->load.load_id, true);
  }

  store_testing::TemporaryDirectory directory_;
  RocksDbStoreOptions options_;
  std::unique_ptr<MemoryStore> store_;
};

#define EXPECT_CODE(expression, expected_code, part)                             \
  do {                                                                           \
    absl::Status status_ = (expression);                                         \
    EXPECT_EQ(status_.code(), expected_code) << status_;                         \
    EXPECT_THAT(std::string(status_.message()), HasSubstr(part)) << #expression; \
  } while (false)

TEST_F(StoreTest, RefusesBadEntries) {
  auto good = MakeEntry("doc", 3, 1);
  {
    auto e = MakeEntry("doc", 3, 1);
    e->embedding.pop_back();
    e->entry.embedding = e->embedding;
    EXPECT_CODE(PutOne(*e), kInvalid, "embedding has 7 numbers");
  }
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto e = MakeEntry("doc", 3, 1);
    e->embedding[5] = bad;
    EXPECT_CODE(PutOne(*e), kInvalid, "number 5 is");
  }
  {
    auto e = MakeEntry("doc", 3, 1);
    e->record = MakeRecord(1, "another model");
    e->entry.record = e->record;
    EXPECT_CODE(PutOne(*e), kPrecondition, "writer fingerprint");
  }
  for (const char* id : {"", "\xff\xfe"}) {
    auto e = MakeEntry("doc", 3, 1);
    e->entry.source.document_id = id;
    EXPECT_CODE(PutOne(*e), kInvalid, "document_id");
  }
  {
    auto e = MakeEntry(std::string(513, 'x'), 3, 1);
    EXPECT_CODE(PutOne(*e), kInvalid, "document_id of 513 bytes");
  }
  {
    auto e = MakeEntry("doc", 3, 1);
    e->entry.record = {};
    EXPECT_CODE(PutOne(*e), kNotFound, MakeId(1).ToHex());
  }
  // All or none: the good one before a bad one is not there.
  auto bad = MakeEntry("doc", 4, 2);
  bad->entry.record = {};
  std::vector<NewEntry> both{good->entry, bad->entry};
  EXPECT_CODE(store_->Put("default", "kb", both, true).status(), kNotFound, MakeId(2).ToHex());
  EXPECT_EQ(*store_->Count("default", "kb"), Counts{});
  EXPECT_TRUE(PutOne(*good).ok());
  good->entry.record = {};  // held by now
  good->entry.source.ordinal = 9;
  EXPECT_TRUE(PutOne(*good).ok());
  EXPECT_EQ(*store_->Count("default", "kb"), (Counts{2, 1, 1}));
}

TEST_F(StoreTest, EveryFlippedBitOfASentRecordIsRefused) {
  auto e = MakeEntry("doc", 0, 1);
  const std::string sound = e->record;
  for (size_t bit = 0; bit < 8 * sound.size(); ++bit) {
    e->record = sound;
    e->record[bit / 8] = static_cast<char>(e->record[bit / 8] ^ (1 << (bit % 8)));
    e->entry.record = e->record;
    ASSERT_EQ(PutOne(*e).code(), kInvalid) << "bit " << bit;
  }
}

TEST_F(StoreTest, RefusesBadQueriesAndNames) {
  EXPECT_CODE(Ask({1, 2, 3}).status(), kInvalid, "embedding has 3 numbers");
  std::vector<float> nan = MakeVector(1);
  nan[0] = NAN;
  EXPECT_CODE(Ask(nan).status(), kInvalid, "NaN");
  EXPECT_CODE(Ask(MakeVector(1), 0).status(), kInvalid, "top_k is 0");
  EXPECT_CODE(Ask(MakeVector(1), 1001).status(), kInvalid, "top_k is 1001");
  EXPECT_TRUE(Ask(std::vector<float>(8, 0))->empty());
  EXPECT_CODE(store_->Count("default", "../kb").status(), kInvalid, "knowledge_base");
  EXPECT_CODE(store_->Count("default", "nothing").status(), kNotFound, "nothing");
  EXPECT_CODE(store_->Count("", "kb").status(), kInvalid, "tenant");
  EXPECT_CODE(store_->Count("someone else", "kb").status(), kNotFound, "kb");
  EXPECT_CODE(store_->CreateSnapshot("../../x").status(), kInvalid, "snapshot");
  EXPECT_CODE(store_->RestoreSnapshot("nothing"), kNotFound, "nothing");
  for (const char* path : {"", "/etc", "../up", "a/../../b", "a//b", "."}) {
    EXPECT_CODE(store_->CreateBackup(path).status(), kInvalid, "directory");
  }
  fs::create_directories(options_.backup_root);
  fs::create_directory_symlink("/", options_.backup_root + "/out");
  EXPECT_CODE(store_->CreateBackup("out/tmp").status(), kInvalid, "leads out");
  EXPECT_CODE(store_->ListDocuments("default", "kb", 1001, "").status(), kInvalid, "page_size");
  EXPECT_CODE(store_->ListDocuments("default", "kb", 10, "!").status(), kInvalid, "page_token");
  KnowledgeBaseSpec spec = SmallSpec("other");
  spec.embedding_dimension = 0;
  EXPECT_CODE(store_->CreateKnowledgeBase("default", spec, false).status(), kInvalid,
              "embedding_dimension");
  EXPECT_CODE(store_->CreateKnowledgeBase("default", SmallSpec("kb"), false).status(),
              absl::StatusCode::kAlreadyExists, "kb");
  EXPECT_TRUE(store_->CreateKnowledgeBase("default", SmallSpec("kb"), true).ok());
  EXPECT_CODE(store_->CreateKnowledgeBase("default", SmallSpec("kb", 9), true).status(),
              absl::StatusCode::kAlreadyExists, "another spec");
}

TEST_F(StoreTest, RefusesACodebookThatIsNone) {
  VqCodebook codebook;
  codebook.head_dim = 8;
  codebook.coarse_bits = 1;
  codebook.fine_bits = 1;
  codebook.rotation.resize(64);
  for (size_t i = 0; i < 8; ++i) codebook.rotation[9 * i] = 1;
  codebook.coarse.resize(2 * 2 * 4);
  codebook.fine.resize(8 * 2 * 1);
  KnowledgeBaseSpec spec = SmallSpec("vq");
  spec.codec = CodecId::kVq;
  spec.geometry.head_dim = 8;
  const std::string sound = *SerializeCodebook(codebook);
  for (size_t at : {size_t{0}, sound.size() / 2, sound.size() - 1}) {
    spec.codebook = sound;
    spec.codebook[at] = static_cast<char>(spec.codebook[at] ^ 8);
    EXPECT_CODE(store_->CreateKnowledgeBase("default", spec, false).status(), kInvalid, "codebook");
  }
  spec.codebook = sound.substr(0, sound.size() - 1);
  EXPECT_CODE(store_->CreateKnowledgeBase("default", spec, false).status(), kInvalid, "codebook");
  spec.codebook = sound;
  spec.geometry.head_dim = 16;
  EXPECT_CODE(store_->CreateKnowledgeBase("default", spec, false).status(), kInvalid, "codebook");
  spec.geometry.head_dim = 8;
  auto made = store_->CreateKnowledgeBase("default", spec, false);
  ASSERT_TRUE(made.ok()) << made.status();
  // 2 layers, 2 of keys and values, 1 head, 2 tokens; 1 byte of coarse bits, 1 of fine ones.
  EXPECT_EQ(made->bytes_per_reference, kRecordHeaderBytes + 2 * 2 * 1 * 2 * 2);
  Open();
  EXPECT_EQ(store_->GetKnowledgeBase("default", "vq", true)->spec.codebook, sound);
  EXPECT_EQ(store_->GetKnowledgeBase("default", "vq", false)->bytes_per_reference,
            made->bytes_per_reference);
}

TEST_F(StoreTest, AliasesSwitchAndFollowTheirKnowledgeBase) {
  ASSERT_TRUE(store_->CreateKnowledgeBase("default", SmallSpec("kb2"), false).ok());
  EXPECT_EQ(*store_->SetAlias("default", "now", "kb"), "");
  EXPECT_EQ(*store_->SetAlias("default", "now", "kb2"), "kb");
  EXPECT_EQ((*store_->Pin("default", "now", std::nullopt))->knowledge_base(), "kb2");
  EXPECT_CODE(store_->DeleteKnowledgeBase("default", "now"), kInvalid, "alias");
  EXPECT_CODE(store_->SetAlias("default", "kb", "kb2").status(), absl::StatusCode::kAlreadyExists,
              "kb");
  EXPECT_CODE(store_->CreateKnowledgeBase("default", SmallSpec("now"), false).status(),
              absl::StatusCode::kAlreadyExists, "alias");
  Open();
  EXPECT_EQ(store_->ListAliases("default")->at("now"), "kb2");
  ASSERT_TRUE(store_->DeleteKnowledgeBase("default", "kb2").ok());
  EXPECT_TRUE(store_->ListAliases("default")->empty());
}

TEST_F(StoreTest, LoadsKeepTheirKeyStateAndProgress) {
  auto begun = store_->BeginLoad("default", "kb", "nightly", LoadMode::kAppend, 10);
  ASSERT_TRUE(begun.ok());
  const std::string id = begun->load.load_id;
  auto e = MakeEntry("doc", 0, 1);
  // One batch says how fast it goes, of a load that was resumed as of a new one.
  const auto expect_rates = [&](uint64_t entries) {
    const LoadInfo info = *store_->GetLoad("default", id);
    EXPECT_EQ(info.entries, entries);
    EXPECT_GT(info.entries_per_second, 0);
    EXPECT_GT(info.bytes_per_second, 0);
    ASSERT_TRUE(info.time_left);
    EXPECT_GT(*info.time_left, absl::ZeroDuration());
  };
  EXPECT_EQ(begun->load.entries_per_second, 0);
  EXPECT_FALSE(begun->load.time_left);
  ASSERT_TRUE(store_->PutLoad("default", id, {&e->entry, 1}, true).ok());
  expect_rates(1);
  EXPECT_EQ(store_->Count("default", "kb")->entries, 0);
  EXPECT_TRUE(Ask(MakeVector(1))->empty());
  Open();
  auto again = store_->BeginLoad("default", "kb", "nightly", LoadMode::kAppend, 10);
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE(again->resumed);
  EXPECT_EQ(again->load.load_id, id);
  EXPECT_EQ(again->load.entries, 1);
  EXPECT_CODE(
      store_->BeginLoad("default", "kb", "nightly", LoadMode::kReplace, std::nullopt).status(),
      kPrecondition, "nightly");
  // Sent again: taken once.
  ASSERT_TRUE(store_->PutLoad("default", id, {&e->entry, 1}, true).ok());
  EXPECT_EQ(store_->GetLoad("default", id)->entries, 1);
  auto other = MakeEntry("doc", 1, 2);
  ASSERT_TRUE(store_->PutLoad("default", id, {&other->entry, 1}, true).ok());
  expect_rates(2);
  EXPECT_EQ(store_->ListLoadedDocuments("default", id, 0, "")->documents.size(), 1);
  auto done = store_->CommitLoad("default", id, true);
  ASSERT_TRUE(done.ok());
  EXPECT_EQ(done->state, LoadState::kCommitted);
  EXPECT_EQ(done->version, 2);
  EXPECT_EQ(done->indexing_fraction, 1);
  EXPECT_EQ(Ask(MakeVector(1))->size(), 2);
  EXPECT_CODE(store_->PutLoad("default", id, {&e->entry, 1}, true).status(), kPrecondition,
              "COMMITTED");
  EXPECT_CODE(store_->AbortLoad("default", id).status(), kPrecondition, "COMMITTED");
  EXPECT_TRUE(store_->CommitLoad("default", id, true).ok());
  EXPECT_CODE(store_->GetLoad("default", "load-1").status(), kNotFound, "load-1");
}

// Batches that follow each other: new, replacing what the batch before put, without bytes the store
// holds, across a restore; and one that fails ends it.
TEST_F(StoreTest, BatchesOfALoadAreWrittenOneBehindTheOther) {
  const std::string id =
      store_->BeginLoad("default", "kb", "k", LoadMode::kAppend, std::nullopt)->load.load_id;
  std::vector<std::unique_ptr<OwnedEntry>> owned;
  const auto batch = [&](std::vector<std::pair<int, uint64_t>> numbers, bool bytes = true) {
    auto entries = std::make_shared<std::vector<NewEntry>>();
    for (const auto& [ordinal, n] : numbers) {
      owned.push_back(MakeEntry("doc", ordinal, n));
      if (!bytes) owned.back()->entry.record = {};
      entries->push_back(owned.back()->entry);
    }
    return entries;
  };
  ASSERT_TRUE(store_->CreateSnapshot("begun").ok());
  auto putter = *store_->OpenLoadPutter("default", id);
  EXPECT_TRUE(putter->Put(batch({{0, 10}, {1, 11}, {2, 12}})).ok());
  EXPECT_TRUE(putter->Put(batch({{3, 13}, {1, 21}})).ok());
  EXPECT_TRUE(putter->Put(batch({{4, 10}, {5, 13}}, /*bytes=*/false)).ok());
  absl::StatusOr<PutResult> put = putter->Finish(true);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_EQ(put->entries, 6);
  EXPECT_EQ(put->new_records, 5);
  EXPECT_EQ(store_->GetLoad("default", id)->entries, 6);

  // The restore takes away what was put, also the bytes of 12; what comes then is put anew.
  ASSERT_TRUE(store_->RestoreSnapshot("begun").ok());
  EXPECT_TRUE(putter->Put(batch({{0, 30}})).ok());
  EXPECT_TRUE(putter->Put(batch({{1, 31}})).ok());
  ASSERT_TRUE(putter->Finish(true).ok());
  EXPECT_EQ(store_->GetLoad("default", id)->entries, 2);

  (void)putter->Put(batch({{2, 12}}, /*bytes=*/false));
  EXPECT_CODE(putter->Put(batch({{3, 33}})), kNotFound, "is not held");
  EXPECT_CODE(putter->Put(batch({{3, 33}})), kNotFound, "is not held");
  EXPECT_CODE(putter->Finish(true).status(), kNotFound, "is not held");
  putter = nullptr;
  EXPECT_EQ(store_->CommitLoad("default", id, true)->state, LoadState::kCommitted);
  EXPECT_EQ(*store_->Count("default", "kb"), (Counts{2, 2, 1}));
  EXPECT_EQ(Ask(MakeVector(31))->at(0).record_id, MakeId(31));

  putter = *store_->OpenLoadPutter("default", id);
  (void)putter->Put(batch({{9, 39}}));
  EXPECT_CODE(putter->Finish(false).status(), kPrecondition, "COMMITTED");
  EXPECT_CODE(store_->OpenLoadPutter("default", "load-1").status(), kNotFound, "load-1");
}

TEST_F(StoreTest, ReplaceRefusesLiveChangesAndRollbackReturns) {
  auto e = MakeEntry("old", 0, 1);
  ASSERT_TRUE(PutOne(*e).ok());
  auto begun = store_->BeginLoad("default", "kb", "r", LoadMode::kReplace, std::nullopt);
  ASSERT_TRUE(begun.ok());
  EXPECT_CODE(PutOne(*e), kPrecondition, "REPLACE");
  std::vector<std::string> documents{"old"};
  EXPECT_CODE(store_->DeleteDocuments("default", "kb", documents).status(), kPrecondition,
              "REPLACE");
  ASSERT_TRUE(store_->AbortLoad("default", begun->load.load_id).ok());
  EXPECT_TRUE(PutOne(*e).ok());
  ASSERT_EQ(LoadAll("r2", LoadMode::kReplace, 10, 20)->state, LoadState::kCommitted);
  EXPECT_EQ(*store_->Count("default", "kb"), (Counts{10, 10, 10}));
  EXPECT_EQ(*store_->Rollback("default", "kb", std::nullopt), 1);
  EXPECT_EQ(*store_->Count("default", "kb"), (Counts{1, 1, 1}));
  EXPECT_CODE(store_->Rollback("default", "kb", std::nullopt).status(), kNotFound, "below 1");
}

TEST_F(StoreTest, APinnedVersionStaysReadableAfterItsDrop) {
  ASSERT_EQ(LoadAll("a", LoadMode::kReplace, 0, 5)->version, 2);
  auto pin = *store_->Pin("default", "kb", 2);
  ASSERT_EQ(LoadAll("b", LoadMode::kReplace, 5, 6)->version, 3);
  ASSERT_TRUE(store_->DropVersion("default", "kb", 2).ok());
  Query query;
  std::vector<float> vector = MakeVector(3);
  query.embedding = vector;
  query.top_k = 5;
  auto read = [&]() -> size_t {
    auto r = store_->Retrieve(*pin, {&query, 1}, {});
    if (!r.ok()) return 0;
    for (const Hit& hit : r->queries[0]) {
      EXPECT_TRUE(r->records->Read({&hit.record_id, 1})[0].ok());
    }
    return r->queries[0].size();
  };
  EXPECT_EQ(read(), 5);
  // A reader that has its answer keeps its bytes even past the pin.
  auto r = store_->Retrieve(*pin, {&query, 1}, {});
  pin = nullptr;
  const RecordId id = r->queries[0][0].record_id;
  // The background collects: a new snapshot of the store no longer has the record.
  while (true) {
    auto e = MakeEntry("probe", 0, 3);
    e->entry.record = {};
    if (absl::IsNotFound(PutOne(*e))) break;
    std::vector<std::string> probe{"probe"};
    ASSERT_TRUE(store_->DeleteDocuments("default", "kb", probe).ok());
    std::this_thread::yield();
  }
  EXPECT_EQ(r->records->Read({&id, 1})[0]->bytes.size(), MakeRecord(3).size());
}

TEST_F(StoreTest, SnapshotsRestoreVerifyAndRefuseDamage) {
  ASSERT_EQ(LoadAll("a", LoadMode::kAppend, 0, 20)->state, LoadState::kCommitted);
  auto snapshot = store_->CreateSnapshot("one");
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  EXPECT_GT(snapshot->bytes, 0);
  EXPECT_CODE(store_->CreateSnapshot("one").status(), absl::StatusCode::kAlreadyExists, "one");
  ASSERT_EQ(LoadAll("b", LoadMode::kReplace, 20, 22)->state, LoadState::kCommitted);
  auto pin = *store_->Pin("default", "kb", std::nullopt);
  ASSERT_TRUE(store_->RestoreSnapshot("one").ok());
  EXPECT_EQ(store_->Count("default", "kb")->entries, 20);
  EXPECT_CODE(store_->Retrieve(*pin, {}, {}).status(), absl::StatusCode::kAborted, "restore");
  Open();
  EXPECT_EQ(store_->Count("default", "kb")->entries, 20);
  EXPECT_EQ(store_->ListSnapshots()->size(), 1);

  ASSERT_EQ(LoadAll("c", LoadMode::kReplace, 30, 33)->state, LoadState::kCommitted);
  const std::string root = options_.directory + "/snapshots/one";
  int damaged = 0;
  for (const auto& f : fs::recursive_directory_iterator(root)) {
    if (!f.is_regular_file() || f.file_size() == 0) continue;
    // Not through the hard link: the store's own file must stay sound.
    std::ifstream in(f.path(), std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(in)), {});
    auto write = [&](const std::string& b) {
      fs::remove(f.path());
      std::ofstream(f.path(), std::ios::binary) << b;
    };
    std::string flipped = bytes;
    flipped[flipped.size() / 2] = static_cast<char>(flipped[flipped.size() / 2] ^ 1);
    write(flipped);
    EXPECT_EQ(store_->RestoreSnapshot("one").code(), absl::StatusCode::kDataLoss) << f.path();
    write(bytes);
    ++damaged;
  }
  EXPECT_GT(damaged, 4);
  EXPECT_EQ(store_->Count("default", "kb")->entries, 3);  // a failed restore left it alone
  EXPECT_TRUE(store_->RestoreSnapshot("one").ok());
  EXPECT_EQ(store_->Count("default", "kb")->entries, 20);
  EXPECT_TRUE(store_->DeleteSnapshot("one").ok());
  EXPECT_TRUE(store_->ListSnapshots()->empty());
}

TEST_F(StoreTest, BackupsAreIncrementalAndRestore) {
  ASSERT_EQ(LoadAll("a", LoadMode::kAppend, 0, 200)->state, LoadState::kCommitted);
  auto first = store_->CreateBackup("nightly");
  ASSERT_TRUE(first.ok()) << first.status();
  auto e = MakeEntry("later", 0, 1000);
  ASSERT_TRUE(PutOne(*e).ok());
  auto second = store_->CreateBackup("nightly");
  ASSERT_TRUE(second.ok());
  EXPECT_LT(second->bytes_copied, first->bytes_copied / 2);
  ASSERT_TRUE(store_->DeleteKnowledgeBase("default", "kb").ok());
  ASSERT_TRUE(store_->RestoreBackup("nightly", std::nullopt).ok());
  EXPECT_EQ(store_->Count("default", "kb")->entries, 201);
  EXPECT_EQ(Ask(MakeVector(1000))->at(0).record_id, MakeId(1000));
  ASSERT_TRUE(store_->RestoreBackup("nightly", first->backup_id).ok());
  EXPECT_EQ(store_->Count("default", "kb")->entries, 200);
  EXPECT_CODE(store_->RestoreBackup("nightly", 77), kNotFound, "77");
  EXPECT_CODE(store_->RestoreBackup("none", std::nullopt), kNotFound, "none");
}

// Flips bits in the files that hold records: every read gives the right bytes or DATA_LOSS.
TEST_F(StoreTest, FlippedBitsOnDiskAreDetected) {
  constexpr uint64_t kRecords = 40;
  ASSERT_EQ(LoadAll("a", LoadMode::kAppend, 0, kRecords)->state, LoadState::kCommitted);
  ASSERT_TRUE(store_->CreateBackup("flush").ok());  // into files, out of the log
  store_ = nullptr;
  std::string db = options_.directory + "/store-1/db";
  std::vector<fs::path> files;
  for (const auto& f : fs::directory_iterator(db)) {
    if (f.path().extension() == ".sst" || f.path().extension() == ".blob")
      files.push_back(f.path());
  }
  ASSERT_GT(files.size(), 2);
  int detected = 0;
  for (const fs::path& path : files) {
    std::ifstream in(path, std::ios::binary);
    const std::string sound((std::istreambuf_iterator<char>(in)), {});
    // In a record's payload where the file holds one, else in the middle.
    size_t at = sound.find(MakeRecord(7).substr(130, 16));
    if (at == std::string::npos) at = sound.size() / 3;
    std::string damaged = sound;
    damaged[at] = static_cast<char>(damaged[at] ^ 4);
    std::ofstream(path, std::ios::binary | std::ios::trunc) << damaged;
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options_);
    if (!store.ok()) {
      EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss) << store.status();
      ++detected;
    } else {
      for (uint64_t n = 0; n < kRecords; ++n) {
        auto r = (*store)->GetRecord("default", "kb", MakeId(n), true);
        if (r.ok()) {
          EXPECT_EQ(r->record.bytes, MakeRecord(n));
          EXPECT_EQ(r->sources,
                    std::vector<Source>{MakeEntry("doc" + std::to_string(n), 0, n)->entry.source});
        } else {
          EXPECT_EQ(r.status().code(), absl::StatusCode::kDataLoss)
              << path << " at " << at << ": " << r.status();
          ++detected;
        }
      }
    }
    store = absl::UnknownError("closed");
    std::ofstream(path, std::ios::binary | std::ios::trunc) << sound;
  }
  EXPECT_GT(detected, 0);
}

// An index file that is damaged, stale or gone is rebuilt from the database.
TEST_F(StoreTest, IndexIsRebuiltWhenItDisagrees) {
  store_ = nullptr;
  options_.index.tail_max = 16;  // so that a load of 50 makes a file
  Open();
  ASSERT_EQ(LoadAll("a", LoadMode::kAppend, 0, 50)->state, LoadState::kCommitted);
  for (int damage = 0; damage < 3; ++damage) {
    store_ = nullptr;
    fs::path file;
    for (const auto& f : fs::directory_iterator(options_.directory + "/store-1/index")) {
      file = f.path();
    }
    ASSERT_FALSE(file.empty());
    std::ifstream in(file, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(in)), {});
    if (damage == 0) bytes[bytes.size() / 2] ^= 1;
    if (damage == 1) bytes.resize(bytes.size() / 2);
    fs::remove(file);
    if (damage < 2) std::ofstream(file, std::ios::binary) << bytes;
    Open();
    for (uint64_t n = 0; n < 50; ++n) {
      ASSERT_EQ(Ask(MakeVector(n), 1)->at(0).record_id, MakeId(n)) << "damage " << damage;
    }
  }
}

// Readers, writers and loaders at once. Each document's state is known to its writer; a reader must
// find whole entries only, and document "always" at any time.
TEST_F(StoreTest, ManyThreadsAtOnce) {
  store_ = nullptr;
  options_.index.flat_max = 32;
  options_.index.tail_max = 16;
  Open();
  auto always = MakeEntry("always", 0, 5000);
  ASSERT_TRUE(PutOne(*always).ok());
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  threads.reserve(3);
  for (int w = 0; w < 2; ++w) {
    threads.emplace_back([&, w] {
      for (uint64_t i = 0; i < 60; ++i) {
        std::string document = "writer" + std::to_string(w) + "-" + std::to_string(i % 7);
        auto e = MakeEntry(document, i % 3, 100 * w + i % 20);
        EXPECT_TRUE(store_->Put("default", "kb", {&e->entry, 1}, i % 4 == 0).ok());
        if (i % 5 == 4) {
          std::vector<std::string> documents{document};
          EXPECT_TRUE(store_->DeleteDocuments("default", "kb", documents).ok());
        }
      }
    });
  }
  threads.emplace_back([&] {
    for (int l = 0; l < 4; ++l) {
      absl::StatusOr<LoadInfo> done =
          LoadAll("load" + std::to_string(l), LoadMode::kAppend, 1000 + 20 * l, 1020 + 20 * l);
      EXPECT_TRUE(done.ok() && done->state == LoadState::kCommitted);
      if (l > 0) {
        EXPECT_TRUE(store_->DropVersion("default", "kb", done->version - 1).ok());
      }
    }
    EXPECT_TRUE(store_->CreateSnapshot("busy").ok());
  });
  std::vector<std::thread> readers;
  readers.reserve(2);
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&] {
      while (!stop) {
        absl::StatusOr<std::vector<Hit>> hits = Ask(MakeVector(5000), 3);
        ASSERT_TRUE(hits.ok()) << hits.status();
        ASSERT_FALSE(hits->empty());
        EXPECT_EQ(hits->at(0).record_id, MakeId(5000));
        EXPECT_EQ(hits->at(0).sources.at(0), [&] {
          Source s = always->entry.source;
          s.text.clear();
          return s;
        }());
        EXPECT_TRUE(store_->ListDocuments("default", "kb", 10, "").ok());
        store_->GetStatus();
      }
    });
  }
  for (std::thread& t : threads) t.join();
  stop = true;
  for (std::thread& t : readers) t.join();
  EXPECT_EQ(store_->ListVersions("default", "kb")->size(), 2);
}

TEST_F(StoreTest, TwoStoresCannotShareADirectory) {
  EXPECT_CODE(OpenRocksDbStore(options_).status(), absl::StatusCode::kUnavailable, "lock");
}

}  // namespace
}  // namespace memory3
