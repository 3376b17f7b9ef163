// The store against a plain model: a knowledge base version is a list of changes, replayed into a
// map. Random puts, deletes, shared records, loads of both modes, rollbacks, retrievals, snapshots,
// restores and reopenings must agree with it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

#include "memory_server/dot.h"
#include "memory_server/encoding.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using store_testing::MakeEntry;
using store_testing::MakeId;
using store_testing::MakeRecord;
using store_testing::OwnedEntry;

constexpr uint32_t kDimension = 8;
constexpr int kNumbers = 40;  // distinct references
constexpr int kDocuments = 12;

struct Change {
  enum Kind { kPut, kDeleteDocument, kDeleteRecord } kind;
  std::string document;
  uint32_t ordinal = 0;
  uint64_t number = 0;
};

using Name = std::pair<std::string, uint32_t>;
using Entries = std::map<Name, uint64_t>;  // (document, ordinal) → number of the reference

Entries Replay(const std::vector<Change>& changes) {
  Entries entries;
  for (const Change& c : changes) {
    switch (c.kind) {
      case Change::kPut:
        entries[{c.document, c.ordinal}] = c.number;
        break;
      case Change::kDeleteDocument:
        std::erase_if(entries, [&](const auto& e) { return e.first.first == c.document; });
        break;
      case Change::kDeleteRecord:
        std::erase_if(entries, [&](const auto& e) { return e.second == c.number; });
        break;
    }
  }
  return entries;
}

struct ModelLoad {
  std::string id;
  LoadMode mode;
  // A position in the live version's changes, kept right as other loads go in below it.
  size_t at = 0;
  Entries staged;
};

struct Model {
  std::map<uint64_t, std::vector<Change>> versions{{1, {}}};
  uint64_t published = 1;
  uint64_t next = 2;
  std::vector<ModelLoad> loads;
  std::vector<Change>& live() { return versions[published]; }
};

class Pair {
 public:
  explicit Pair(uint64_t seed) : random_(seed) {
    options_.directory = directory_.path() + "/store";
    options_.cache_bytes = 8 << 20;
    options_.write_buffer_bytes = 1 << 20;
    options_.index.flat_max = seed % 2 == 0 ? 20000 : 16;  // every other seed: the large index
    options_.index.recall_target = 1;
    options_.index.tail_max = 8;
    options_.index.build_threads = 1;
    Open();
    EXPECT_TRUE(
        store_->CreateKnowledgeBase("default", store_testing::SmallSpec("kb", kDimension), false)
            .ok());
  }

  void Open() {
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  bool replacing() const {
    return std::any_of(model_.loads.begin(), model_.loads.end(),
                       [](const ModelLoad& l) { return l.mode == LoadMode::kReplace; });
  }

  uint64_t Pick(uint64_t n) { return random_() % n; }
  std::string Document() { return "doc" + std::to_string(Pick(kDocuments)); }

  void Step() {
    switch (Pick(20)) {
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
        Put();
        break;
      case 5:
      case 6:
        DeleteDocuments();
        break;
      case 7:
      case 8:
        DeleteRecords();
        break;
      case 9:
        if (model_.loads.size() < 3) BeginLoad();
        break;
      case 10:
      case 11:
      case 12:
        PutLoad();
        break;
      case 13:
        EndLoad();
        break;
      case 14:
        if (Pick(3) == 0) Rollback();
        break;
      case 15:
        if (Pick(3) == 0) DropVersion();
        break;
      case 16:
        if (Pick(4) == 0) {
          store_ = nullptr;
          Open();
        }
        break;
      case 17:
        if (Pick(4) == 0) SnapshotOrRestore();
        break;
      default:
        Check(false);
    }
  }

  void Put() {
    std::vector<std::unique_ptr<OwnedEntry>> owned;
    std::vector<NewEntry> entries;
    std::vector<Change> changes;
    for (uint64_t n = Pick(5) + 1; n > 0; --n) {
      Change c{Change::kPut, Document(), static_cast<uint32_t>(Pick(4)), Pick(kNumbers)};
      owned.push_back(MakeEntry(c.document, c.ordinal, c.number, kDimension));
      entries.push_back(owned.back()->entry);
      changes.push_back(c);
    }
    absl::StatusOr<PutResult> r = store_->Put("default", "kb", entries, Pick(2) == 0);
    if (replacing()) {
      EXPECT_EQ(r.status().code(), absl::StatusCode::kFailedPrecondition);
      return;
    }
    ASSERT_TRUE(r.ok()) << r.status();
    model_.live().insert(model_.live().end(), changes.begin(), changes.end());
  }

  void DeleteDocuments() {
    std::vector<std::string> documents{Document(), Document()};
    absl::StatusOr<DeleteResult> r = store_->DeleteDocuments("default", "kb", documents);
    if (replacing()) {
      EXPECT_EQ(r.status().code(), absl::StatusCode::kFailedPrecondition);
      return;
    }
    ASSERT_TRUE(r.ok()) << r.status();
    Entries before = Replay(model_.live());
    for (const std::string& d : documents) model_.live().push_back({Change::kDeleteDocument, d});
    Entries after = Replay(model_.live());
    EXPECT_EQ(r->entries, before.size() - after.size());
    EXPECT_EQ(r->records, Numbers(before).size() - Numbers(after).size());
  }

  void DeleteRecords() {
    std::vector<uint64_t> numbers{Pick(kNumbers), Pick(kNumbers)};
    std::vector<RecordId> ids{MakeId(numbers[0]), MakeId(numbers[1])};
    absl::StatusOr<DeleteResult> r = store_->DeleteRecords("default", "kb", ids);
    if (replacing()) {
      EXPECT_EQ(r.status().code(), absl::StatusCode::kFailedPrecondition);
      return;
    }
    ASSERT_TRUE(r.ok()) << r.status();
    Entries before = Replay(model_.live());
    for (uint64_t n : numbers) model_.live().push_back({Change::kDeleteRecord, "", 0, n});
    EXPECT_EQ(r->entries, before.size() - Replay(model_.live()).size());
  }

  void BeginLoad() {
    LoadMode mode = Pick(4) == 0 ? LoadMode::kReplace : LoadMode::kAppend;
    absl::StatusOr<BeginLoadResult> r =
        store_->BeginLoad("default", "kb", "key" + std::to_string(next_key_++), mode, std::nullopt);
    ASSERT_TRUE(r.ok()) << r.status();
    model_.loads.push_back({r->load.load_id, mode, model_.live().size(), {}});
  }

  void PutLoad() {
    if (model_.loads.empty()) return;
    ModelLoad& load = model_.loads[Pick(model_.loads.size())];
    std::vector<std::unique_ptr<OwnedEntry>> owned;
    std::vector<NewEntry> entries;
    for (uint64_t n = Pick(8) + 1; n > 0; --n) {
      std::string document = Document();
      auto ordinal = static_cast<uint32_t>(Pick(6));
      uint64_t number = Pick(kNumbers);
      owned.push_back(MakeEntry(document, ordinal, number, kDimension));
      entries.push_back(owned.back()->entry);
      load.staged[{document, ordinal}] = number;
    }
    absl::StatusOr<PutResult> r = store_->PutLoad("default", load.id, entries, Pick(2) == 0);
    ASSERT_TRUE(r.ok()) << r.status();
    absl::StatusOr<LoadInfo> info = store_->GetLoad("default", load.id);
    ASSERT_TRUE(info.ok());
    EXPECT_EQ(info->entries, load.staged.size());
  }

  void EndLoad() {
    if (model_.loads.empty()) return;
    size_t which = Pick(model_.loads.size());
    ModelLoad load = model_.loads[which];
    model_.loads.erase(model_.loads.begin() + static_cast<ptrdiff_t>(which));
    if (Pick(4) == 0) {
      ASSERT_TRUE(store_->AbortLoad("default", load.id).ok());
      return;
    }
    absl::StatusOr<LoadInfo> info = store_->CommitLoad("default", load.id, true);
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_EQ(info->state, LoadState::kCommitted) << info->failure;
    ASSERT_EQ(info->version, model_.next);
    std::vector<Change> puts;
    for (const auto& [name, number] : load.staged) {
      puts.push_back({Change::kPut, name.first, name.second, number});
    }
    std::vector<Change> changes;
    size_t at = 0;
    if (load.mode == LoadMode::kAppend) {
      changes = model_.live();
      at = std::min(load.at, changes.size());
      changes.insert(changes.begin() + static_cast<ptrdiff_t>(at), puts.begin(), puts.end());
    } else {
      changes = puts;
    }
    for (ModelLoad& other : model_.loads) {
      // What is published while another load is open stands above it.
      if (load.mode == LoadMode::kReplace) {
        other.at = 0;
      } else if (other.at > at) {
        other.at += puts.size();
      }
    }
    model_.versions[model_.next] = changes;
    model_.published = model_.next++;
  }

  void Rollback() {
    // Between loads only: the model has no notion of a load begun on another version.
    if (!model_.loads.empty()) return;
    auto it = model_.versions.begin();
    std::advance(it, Pick(model_.versions.size()));
    absl::StatusOr<uint64_t> r = store_->Rollback("default", "kb", it->first);
    ASSERT_TRUE(r.ok()) << r.status();
    model_.published = it->first;
  }

  void DropVersion() {
    auto it = model_.versions.begin();
    std::advance(it, Pick(model_.versions.size()));
    absl::Status s = store_->DropVersion("default", "kb", it->first);
    if (it->first == model_.published) {
      EXPECT_EQ(s.code(), absl::StatusCode::kFailedPrecondition);
      return;
    }
    ASSERT_TRUE(s.ok()) << s;
    model_.versions.erase(it);
  }

  void SnapshotOrRestore() {
    if (snapshot_.empty()) {
      snapshot_ = "snap" + std::to_string(next_key_++);
      absl::StatusOr<SnapshotInfo> s = store_->CreateSnapshot(snapshot_);
      ASSERT_TRUE(s.ok()) << s.status();
      saved_ = model_;
      return;
    }
    absl::Status s = store_->RestoreSnapshot(snapshot_);
    ASSERT_TRUE(s.ok()) << s;
    ASSERT_TRUE(store_->DeleteSnapshot(snapshot_).ok());
    snapshot_.clear();
    model_ = saved_;
  }

  static std::set<uint64_t> Numbers(const Entries& entries) {
    std::set<uint64_t> numbers;
    for (const auto& [name, n] : entries) numbers.insert(n);
    return numbers;
  }

  void Check(bool everything) {
    const Entries entries = Replay(model_.live());
    std::map<std::string, uint32_t> documents;
    for (const auto& [name, n] : entries) ++documents[name.first];
    const std::set<uint64_t> numbers = Numbers(entries);

    absl::StatusOr<Counts> counts = store_->Count("default", "kb");
    ASSERT_TRUE(counts.ok());
    ASSERT_EQ(counts->entries, entries.size());
    ASSERT_EQ(counts->documents, documents.size());
    ASSERT_EQ(counts->records, numbers.size());

    std::map<std::string, uint32_t> listed;
    std::string token;
    do {
      absl::StatusOr<DocumentPage> page = store_->ListDocuments("default", "kb", 5, token);
      ASSERT_TRUE(page.ok()) << page.status();
      for (const DocumentInfo& d : page->documents) {
        EXPECT_TRUE(listed.emplace(d.document_id, d.entries).second);
      }
      token = page->next_page_token;
    } while (!token.empty());
    ASSERT_EQ(listed, documents);

    auto versions = store_->ListVersions("default", "kb");
    ASSERT_TRUE(versions.ok());
    ASSERT_EQ(versions->size(), model_.versions.size());
    for (const VersionInfo& v : *versions) {
      ASSERT_TRUE(model_.versions.count(v.version));
      EXPECT_EQ(v.published, v.version == model_.published);
      EXPECT_EQ(v.entries, Replay(model_.versions[v.version]).size());
      EXPECT_EQ(v.records, Numbers(Replay(model_.versions[v.version])).size());
    }

    CheckRetrieve(model_.published, entries);
    if (everything) {
      for (const auto& [number, changes] : model_.versions) CheckRetrieve(number, Replay(changes));
    }
    for (uint64_t n = everything ? 0 : Pick(kNumbers); n < kNumbers; n += everything ? 1 : 11) {
      absl::StatusOr<StoredRecord> r = store_->GetRecord("default", "kb", MakeId(n), true);
      if (numbers.count(n) == 0) {
        EXPECT_EQ(r.status().code(), absl::StatusCode::kNotFound);
        continue;
      }
      ASSERT_TRUE(r.ok()) << r.status();
      EXPECT_EQ(r->record.bytes, MakeRecord(n));
      size_t at = 0;
      for (const auto& [name, number] : entries) {
        if (number != n) continue;
        ASSERT_LT(at, r->sources.size());
        EXPECT_EQ(r->sources[at], MakeEntry(name.first, name.second, n, kDimension)->entry.source);
        ++at;
      }
      EXPECT_EQ(at, r->sources.size());
    }
  }

  void CheckRetrieve(uint64_t version, const Entries& entries) {
    auto pin = store_->Pin("default", "kb", version);
    ASSERT_TRUE(pin.ok()) << pin.status();
    Query query;
    std::vector<float> vector = store_testing::MakeVector(1000 + Pick(1000), kDimension);
    query.embedding = vector;
    query.top_k = static_cast<uint32_t>(Pick(8) + 1);
    if (Pick(3) == 0) query.min_score = 0.1f;
    if (Pick(3) == 0) query.filter.document_ids = {Document(), Document()};
    if (Pick(3) == 0) query.filter.metadata["parity"] = "odd";
    if (Pick(9) == 0) query.filter.metadata["number"] = std::to_string(Pick(kNumbers));
    std::vector<float> unit = vector;
    ASSERT_TRUE(NormaliseEmbedding(Metric::kCosine, &unit).ok());
    std::map<RecordId, float> score;
    std::map<RecordId, size_t> sources;
    for (const auto& [name, n] : entries) {
      ++sources[MakeId(n)];
      const auto& filter = query.filter;
      if (!filter.document_ids.empty() &&
          std::count(filter.document_ids.begin(), filter.document_ids.end(), name.first) == 0) {
        continue;
      }
      auto meta = MakeEntry(name.first, name.second, n)->entry.source.metadata;
      if (!std::all_of(filter.metadata.begin(), filter.metadata.end(),
                       [&](const auto& p) { return meta[p.first] == p.second; })) {
        continue;
      }
      std::vector<float> stored = store_testing::MakeVector(n, kDimension);
      ASSERT_TRUE(NormaliseEmbedding(Metric::kCosine, &stored).ok());
      float s = Dot(unit.data(), stored.data(), kDimension);
      if (!query.min_score || s >= *query.min_score) score[MakeId(n)] = s;
    }
    std::vector<std::pair<float, RecordId>> expected;
    for (const auto& [id, s] : score) expected.emplace_back(-s, id);
    std::sort(expected.begin(), expected.end());
    if (expected.size() > query.top_k) expected.resize(query.top_k);

    absl::StatusOr<RetrieveResult> r = store_->Retrieve(**pin, {&query, 1}, {});
    ASSERT_TRUE(r.ok()) << r.status();
    const std::vector<Hit>& hits = r->queries[0];
    ASSERT_EQ(hits.size(), expected.size());
    std::vector<RecordId> ids;
    for (size_t i = 0; i < hits.size(); ++i) {
      EXPECT_EQ(hits[i].record_id, expected[i].second);
      EXPECT_EQ(hits[i].score, -expected[i].first);
      EXPECT_EQ(hits[i].sources.size(), sources[hits[i].record_id]);
      ids.push_back(hits[i].record_id);
    }
    auto views = r->records->Read(ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      ASSERT_TRUE(views[i].ok()) << views[i].status();
      EXPECT_EQ(views[i]->bytes.size(), hits[i].record_bytes);
    }
  }

 private:
  std::mt19937_64 random_;
  store_testing::TemporaryDirectory directory_;
  RocksDbStoreOptions options_;
  std::unique_ptr<MemoryStore> store_;
  Model model_, saved_;
  std::string snapshot_;
  int next_key_ = 0;
};

class StoreModelTest : public testing::TestWithParam<uint64_t> {};

TEST_P(StoreModelTest, AgreesWithPlainModel) {
  const char* steps = std::getenv("MEMORY3_MODEL_STEPS");
  Pair pair(GetParam());
  for (int i = 0, n = steps != nullptr ? std::atoi(steps) : 400; i < n; ++i) {
    pair.Step();
    if (testing::Test::HasFailure()) FAIL() << "at step " << i << " of seed " << GetParam();
  }
  pair.Check(true);
}

INSTANTIATE_TEST_SUITE_P(Seeds, StoreModelTest, testing::Range<uint64_t>(1, 9));

}  // namespace
}  // namespace memory3
