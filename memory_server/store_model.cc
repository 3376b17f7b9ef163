#include "memory_server/store_model.h"

#include <algorithm>
#include <sstream>

#include "memory_server/dot.h"
#include "memory_server/encoding.h"
#include "memory_server/message.h"
#include "memory_server/store_testing.h"

namespace memory3::store_testing {
namespace {

constexpr int kNumbers = 40;  // distinct references
constexpr int kDocuments = 12;

std::set<uint64_t> Numbers(const ModelEntries& entries) {
  std::set<uint64_t> numbers;
  for (const auto& [name, n] : entries) numbers.insert(n);
  return numbers;
}

std::string RandomDocument(std::mt19937_64& r) { return Message("doc", r() % kDocuments); }

}  // namespace

std::string Operation::ToLine() const {
  std::ostringstream out;
  out << static_cast<int>(kind) << ' ' << (key.empty() ? "-" : key) << ' ' << static_cast<int>(mode)
      << ' ' << version << ' ' << wait << ' ' << entries.size();
  for (const auto& [name, number] : entries) {
    out << ' ' << name.first << ' ' << name.second << ' ' << number;
  }
  out << ' ' << documents.size();
  for (const std::string& d : documents) out << ' ' << d;
  out << ' ' << numbers.size();
  for (uint64_t n : numbers) out << ' ' << n;
  return out.str();
}

std::optional<Operation> Operation::FromLine(const std::string& line) {
  std::istringstream in(line);
  Operation op;
  int kind = 0, mode = 0;
  size_t n = 0;
  in >> kind >> op.key >> mode >> op.version >> op.wait >> n;
  op.kind = static_cast<Kind>(kind);
  op.mode = static_cast<LoadMode>(mode);
  for (size_t i = 0; i < n && in; ++i) {
    std::pair<EntryName, uint64_t> e;
    in >> e.first.first >> e.first.second >> e.second;
    op.entries.push_back(std::move(e));
  }
  in >> n;
  for (size_t i = 0; i < n && in; ++i) in >> op.documents.emplace_back();
  in >> n;
  for (size_t i = 0; i < n && in; ++i) in >> op.numbers.emplace_back();
  if (!in) return std::nullopt;
  return op;
}

absl::Status Execute(MemoryStore* store, const Operation& op) {
  std::vector<std::unique_ptr<OwnedEntry>> owned;
  std::vector<NewEntry> entries;
  for (const auto& [name, number] : op.entries) {
    owned.push_back(MakeEntry(name.first, name.second, number, kModelDimension));
    entries.push_back(owned.back()->entry);
  }
  std::string load_id;
  if (!op.key.empty() && op.key != "-") {
    absl::StatusOr<BeginLoadResult> load =
        store->BeginLoad("default", kModelKb, op.key, op.mode, std::nullopt);
    if (!load.ok()) return load.status();
    load_id = load->load.load_id;
  }
  switch (op.kind) {
    case Operation::kPut:
      return store->Put("default", kModelKb, entries, op.wait).status();
    case Operation::kDeleteDocuments:
      return store->DeleteDocuments("default", kModelKb, op.documents).status();
    case Operation::kDeleteRecords: {
      std::vector<RecordId> ids;
      for (uint64_t n : op.numbers) ids.push_back(MakeId(n));
      return store->DeleteRecords("default", kModelKb, ids).status();
    }
    case Operation::kBeginLoad:
      return absl::OkStatus();
    case Operation::kPutLoad: {
      if (op.wait) return store->PutLoad("default", load_id, entries, true).status();
      // The same batch twice: the second is made ready while the first is written, and finds all of
      // it there. So the whole is there or nothing, also after a kill.
      absl::StatusOr<std::unique_ptr<LoadPutter>> putter =
          store->OpenLoadPutter("default", load_id);
      if (!putter.ok()) return putter.status();
      const auto batch = std::make_shared<const std::vector<NewEntry>>(entries);
      for (int i = 0; i < 2; ++i) {
        if (absl::Status put = (*putter)->Put(batch); !put.ok()) return put;
      }
      return (*putter)->Finish(false).status();
    }
    case Operation::kCommitLoad: {
      absl::StatusOr<LoadInfo> info = store->CommitLoad("default", load_id, true);
      if (!info.ok()) return info.status();
      if (info->state != LoadState::kCommitted) return absl::InternalError(info->failure);
      return absl::OkStatus();
    }
    case Operation::kAbortLoad:
      return store->AbortLoad("default", load_id).status();
    case Operation::kRollback:
      return store->Rollback("default", kModelKb, op.version).status();
    case Operation::kDropVersion:
      return store->DropVersion("default", kModelKb, op.version);
  }
  return absl::InvalidArgumentError("unknown operation");
}

ModelEntries StoreModel::Replay(const std::vector<Change>& changes) {
  ModelEntries entries;
  for (const Change& c : changes) {
    switch (c.kind) {
      case Change::kPut:
        entries[c.name] = c.number;
        break;
      case Change::kDeleteDocument:
        std::erase_if(entries, [&](const auto& e) { return e.first.first == c.name.first; });
        break;
      case Change::kDeleteRecord:
        std::erase_if(entries, [&](const auto& e) { return e.second == c.number; });
        break;
      case Change::kPublished:
        break;
    }
  }
  return entries;
}

bool StoreModel::replacing() const {
  return std::any_of(loads_.begin(), loads_.end(),
                     [](const Load& l) { return l.mode == LoadMode::kReplace; });
}

Operation StoreModel::Random(std::mt19937_64* random, int size) {
  std::mt19937_64& r = *random;
  Operation op;
  op.wait = r() % 2 == 0;
  auto some_entries = [&](uint64_t at_most, uint64_t ordinals) {
    for (uint64_t n = r() % at_most + 1; n > 0; --n) {
      op.entries.push_back(
          {{RandomDocument(r), static_cast<uint32_t>(r() % ordinals)}, r() % kNumbers});
    }
  };
  auto of_load = [&](Operation::Kind kind) {
    const Load& load = loads_[r() % loads_.size()];
    op.kind = kind;
    op.key = load.key;
    op.mode = load.mode;
  };
  auto some_version = [&] {
    auto it = versions_.begin();
    std::advance(it, r() % versions_.size());
    return it->first;
  };
  while (true) {
    switch (r() % 16) {
      case 0:
      case 1:
        op.kind = Operation::kDeleteDocuments;
        op.documents = {RandomDocument(r), RandomDocument(r)};
        return op;
      case 2:
      case 3:
        op.kind = Operation::kDeleteRecords;
        op.numbers = {r() % kNumbers, r() % kNumbers};
        return op;
      case 4:
        if (loads_.size() == 3) break;
        op.kind = Operation::kBeginLoad;
        op.key = Message("key", next_key_++);
        op.mode = r() % 4 == 0 ? LoadMode::kReplace : LoadMode::kAppend;
        return op;
      case 5:
      case 6:
      case 7:
        if (loads_.empty()) break;
        of_load(Operation::kPutLoad);
        some_entries(2 * static_cast<uint64_t>(size), 6);
        return op;
      case 8:
        if (loads_.empty()) break;
        of_load(r() % 4 == 0 ? Operation::kAbortLoad : Operation::kCommitLoad);
        return op;
      case 9:
        // Between loads only: the model has no notion of a load begun on another version.
        if (!loads_.empty() || versions_.size() == 1 || r() % 3 != 0) break;
        op.kind = Operation::kRollback;
        op.version = some_version();
        return op;
      case 10:
        op.kind = Operation::kDropVersion;
        op.version = some_version();
        if (op.version == published_ || (versions_.size() < 4 && r() % 2 == 0)) break;
        return op;
      default:
        op.kind = Operation::kPut;
        some_entries(static_cast<uint64_t>(size), 4);
        return op;
    }
  }
}

void StoreModel::Apply(const Operation& op) {
  std::vector<Change>& live = versions_[published_];
  auto load =
      std::find_if(loads_.begin(), loads_.end(), [&](const Load& l) { return l.key == op.key; });
  const bool changes_live = op.kind == Operation::kPut || op.kind == Operation::kDeleteDocuments ||
                            op.kind == Operation::kDeleteRecords;
  if (changes_live && replacing()) return;  // refused
  switch (op.kind) {
    case Operation::kPut:
      for (const auto& [name, number] : op.entries) {
        live.push_back({Change::kPut, name, number});
      }
      break;
    case Operation::kDeleteDocuments:
      for (const std::string& d : op.documents) {
        live.push_back({Change::kDeleteDocument, {d, 0}, 0});
      }
      break;
    case Operation::kDeleteRecords:
      for (uint64_t n : op.numbers) live.push_back({Change::kDeleteRecord, {}, n});
      break;
    case Operation::kBeginLoad:
      loads_.push_back({op.key, op.mode, live.size(), {}});
      break;
    case Operation::kPutLoad:
      for (const auto& [name, number] : op.entries) load->staged[name] = number;
      break;
    case Operation::kAbortLoad:
      loads_.erase(load);
      break;
    case Operation::kCommitLoad: {
      const Load done = *load;
      loads_.erase(load);
      std::vector<Change> puts;
      for (const auto& [name, number] : done.staged) puts.push_back({Change::kPut, name, number});
      // Also an empty load leaves its mark: a load begun after it goes in above it.
      puts.push_back({Change::kPublished, {}, 0});
      std::vector<Change> changes;
      size_t at = 0;
      if (done.mode == LoadMode::kAppend) {
        changes = live;
        at = std::min(done.at, changes.size());
      }
      changes.insert(changes.begin() + static_cast<ptrdiff_t>(at), puts.begin(), puts.end());
      for (Load& other : loads_) {
        // What is published while another load is open stands above it.
        if (done.mode == LoadMode::kReplace) {
          other.at = 0;
        } else if (other.at > at) {
          other.at += puts.size();
        }
      }
      versions_[next_version_] = std::move(changes);
      published_ = next_version_++;
      break;
    }
    case Operation::kRollback:
      published_ = op.version;
      break;
    case Operation::kDropVersion:
      versions_.erase(op.version);
      break;
  }
}

std::string StoreModel::Difference(MemoryStore* store, std::mt19937_64* random,
                                   bool everything) const {
  const ModelEntries entries = Live();
  const std::set<uint64_t> numbers = Numbers(entries);
  std::map<std::string, uint32_t> documents;
  for (const auto& [name, n] : entries) ++documents[name.first];

  absl::StatusOr<Counts> counts = store->Count("default", kModelKb);
  if (!counts.ok()) return counts.status().ToString();
  if (*counts != Counts{entries.size(), numbers.size(), documents.size()}) {
    return Message("counts: ", counts->entries, " entries, ", counts->records, " records, ",
                   counts->documents, " documents; not ", entries.size(), ", ", numbers.size(),
                   ", ", documents.size());
  }
  std::map<std::string, uint32_t> listed;
  std::string token;
  do {
    absl::StatusOr<DocumentPage> page = store->ListDocuments("default", kModelKb, 5, token);
    if (!page.ok()) return page.status().ToString();
    for (const DocumentInfo& d : page->documents) {
      if (!listed.emplace(d.document_id, d.entries).second) return "a document listed twice";
    }
    token = page->next_page_token;
  } while (!token.empty());
  if (listed != documents) return "the documents listed differ";

  absl::StatusOr<std::vector<VersionInfo>> versions = store->ListVersions("default", kModelKb);
  if (!versions.ok()) return versions.status().ToString();
  if (versions->size() != versions_.size()) return Message(versions->size(), " versions");
  for (const VersionInfo& v : *versions) {
    auto mine = versions_.find(v.version);
    if (mine == versions_.end()) return Message("version ", v.version, " should not be");
    const ModelEntries of_version = Replay(mine->second);
    if (v.published != (v.version == published_) || v.entries != of_version.size() ||
        v.records != Numbers(of_version).size()) {
      return Message("version ", v.version, " differs");
    }
  }
  absl::StatusOr<std::vector<LoadInfo>> loads = store->ListLoads("default", kModelKb);
  if (!loads.ok()) return loads.status().ToString();
  size_t open = 0;
  for (const LoadInfo& info : *loads) {
    auto mine = std::find_if(loads_.begin(), loads_.end(),
                             [&](const Load& l) { return l.key == info.idempotency_key; });
    if ((info.state == LoadState::kLoading) != (mine != loads_.end())) {
      return Message("load ", info.idempotency_key, " is in state ", static_cast<int>(info.state));
    }
    if (mine == loads_.end()) continue;
    ++open;
    if (info.entries != mine->staged.size()) {
      return Message("load ", info.idempotency_key, " holds ", info.entries, " entries, not ",
                     mine->staged.size());
    }
  }
  if (open != loads_.size()) return "a load is missing";

  for (const auto& [number, changes] : versions_) {
    if (!everything && number != published_) continue;
    std::string d = RetrieveDifference(store, random, number, Replay(changes));
    if (!d.empty()) return Message("version ", number, ": ", d);
  }
  for (uint64_t n = everything ? 0 : (*random)() % kNumbers; n < kNumbers;
       n += everything ? 1 : 11) {
    absl::StatusOr<StoredRecord> r = store->GetRecord("default", kModelKb, MakeId(n), true);
    if (numbers.count(n) == 0) {
      if (!absl::IsNotFound(r.status())) return Message("record ", n, " should be gone");
      continue;
    }
    if (!r.ok()) return Message("record ", n, ": ", r.status().ToString());
    if (r->record.bytes != MakeRecord(n)) return Message("record ", n, " has other bytes");
    std::vector<Source> expected;
    for (const auto& [name, number] : entries) {
      if (number == n) {
        expected.push_back(MakeEntry(name.first, name.second, n, kModelDimension)->entry.source);
      }
    }
    if (r->sources != expected) return Message("record ", n, " has other sources");
  }
  return "";
}

std::string StoreModel::Recover(MemoryStore* store, const std::optional<Operation>& under_way,
                                std::mt19937_64* random) {
  const std::string without = Difference(store, random, true);
  if (!under_way) {
    return without.empty() ? "" : Message("nothing was under way: ", without);
  }
  StoreModel done = *this;
  done.Apply(*under_way);
  std::string with = done.Difference(store, random, true);
  if (without.empty() && with.empty()) {
    const absl::Status again = Execute(store, *under_way);
    if (!again.ok() && !absl::IsFailedPrecondition(again)) {
      return Message("done again: ", again.ToString());
    }
    with = done.Difference(store, random, true);
    if (!with.empty()) return Message("done again: ", with);
  }
  if (with.empty()) {
    *this = std::move(done);
  } else if (!without.empty()) {
    return Message("without the operation under way: ", without, "; with it: ", with);
  }
  return "";
}

std::string StoreModel::RetrieveDifference(MemoryStore* store, std::mt19937_64* random,
                                           uint64_t version, const ModelEntries& entries) const {
  std::mt19937_64& r = *random;
  absl::StatusOr<std::shared_ptr<const VersionPin>> pin = store->Pin("default", kModelKb, version);
  if (!pin.ok()) return pin.status().ToString();
  Query query;
  std::vector<float> vector = MakeVector(1000 + r() % 1000, kModelDimension);
  query.embedding = vector;
  query.top_k = static_cast<uint32_t>(r() % 8 + 1);
  if (r() % 3 == 0) query.min_score = 0.1f;
  if (r() % 3 == 0) query.filter.document_ids = {RandomDocument(r), RandomDocument(r)};
  if (r() % 3 == 0) query.filter.metadata["parity"] = "odd";
  if (r() % 9 == 0) query.filter.metadata["number"] = std::to_string(r() % kNumbers);

  std::vector<float> unit = vector;
  if (absl::Status s = NormaliseEmbedding(Metric::kCosine, &unit); !s.ok()) return s.ToString();
  std::map<RecordId, float> score;
  std::map<RecordId, size_t> sources;
  const std::vector<std::string>& wanted = query.filter.document_ids;
  for (const auto& [name, n] : entries) {
    const RecordId id = MakeId(n);
    ++sources[id];
    if (!wanted.empty() && std::count(wanted.begin(), wanted.end(), name.first) == 0) continue;
    auto metadata = MakeEntry(name.first, name.second, n)->entry.source.metadata;
    if (!std::all_of(query.filter.metadata.begin(), query.filter.metadata.end(),
                     [&](const auto& pair) { return metadata[pair.first] == pair.second; })) {
      continue;
    }
    std::vector<float> stored = MakeVector(n, kModelDimension);
    if (absl::Status s = NormaliseEmbedding(Metric::kCosine, &stored); !s.ok()) return s.ToString();
    float s = Dot(unit.data(), stored.data(), kModelDimension);
    if (!query.min_score || s >= *query.min_score) score[id] = s;
  }
  std::vector<std::pair<float, RecordId>> expected;
  expected.reserve(score.size());
  for (const auto& [id, s] : score) expected.emplace_back(-s, id);
  std::sort(expected.begin(), expected.end());
  if (expected.size() > query.top_k) expected.resize(query.top_k);

  absl::StatusOr<RetrieveResult> result = store->Retrieve(**pin, {&query, 1}, {});
  if (!result.ok()) return result.status().ToString();
  const std::vector<Hit>& hits = result->queries[0];
  if (hits.size() != expected.size()) {
    return Message(hits.size(), " hits, not ", expected.size());
  }
  std::vector<RecordId> ids;
  for (size_t i = 0; i < hits.size(); ++i) {
    if (hits[i].record_id != expected[i].second) return Message("hit ", i, " is another record");
    if (hits[i].score != -expected[i].first) return Message("hit ", i, " has another score");
    if (hits[i].sources.size() != sources[hits[i].record_id]) {
      return Message("hit ", i, " has ", hits[i].sources.size(), " sources, not ",
                     sources[hits[i].record_id]);
    }
    ids.push_back(hits[i].record_id);
  }
  std::vector<absl::StatusOr<RecordView>> views = result->records->Read(ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!views[i].ok()) return views[i].status().ToString();
    if (views[i]->bytes.size() != hits[i].record_bytes) return "a record of another size";
  }
  return "";
}

}  // namespace memory3::store_testing
