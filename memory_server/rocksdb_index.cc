// The index of a version: built from the database, kept in a file, brought up to date from the log
// of changes, folded in the background.
#include <rocksdb/env.h>
#include <rocksdb/write_batch.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstring>

#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"

namespace memory3 {
namespace {

constexpr std::string_view kMagic = "m3index1";

// Magic, knowledge base, version, sequence, payload bytes (u64 each); the payload; CRC32C of it
// all.
std::string FrameIndex(uint64_t kb, uint64_t version, uint64_t sequence, std::string_view payload) {
  ByteWriter w;
  w.Bytes(kMagic);
  w.U64(kb);
  w.U64(version);
  w.U64(sequence);
  w.U64(payload.size());
  w.Bytes(payload);
  w.U32(Crc32c(w.str()));
  return w.Take();
}

}  // namespace

absl::StatusOr<RocksDbCore::Scanned> RocksDbCore::ScanStack(
    const KnowledgeBase& kb, const Stack& stack, const rocksdb::Snapshot* snapshot,
    const std::atomic<bool>* cancelled) const {
  Scanned out;
  std::string document;
  StackIterator it(*db_, kb.prefix, stack, "", "", snapshot, /*fill_cache=*/false);
  for (; it.Valid(); it.Next()) {
    bool tombstone;
    SlotKey key;
    if (!DecodeEntryRowHead(it.value(), &tombstone, &key.record_id, &key.embedding_hash)) {
      return absl::DataLossError("a malformed entry row");
    }
    out.keys.push_back(key);
    if (std::string_view d = DocumentKeyOf(it.suffix()); d != document) {
      document = d;
      ++out.counts.documents;
    }
    if (++out.counts.entries % 4096 == 0 && cancelled != nullptr && *cancelled) {
      return absl::CancelledError("cancelled while reading entries");
    }
  }
  if (!it.status().ok()) return it.status();
  std::sort(out.keys.begin(), out.keys.end());
  out.keys.erase(std::unique(out.keys.begin(), out.keys.end()), out.keys.end());
  for (size_t i = 0; i < out.keys.size(); ++i) {
    out.counts.records += i == 0 || out.keys[i].record_id != out.keys[i - 1].record_id;
  }
  return out;
}

absl::StatusOr<std::shared_ptr<const BaseIndex>> RocksDbCore::BuildBase(
    const KnowledgeBase& kb, std::vector<SlotKey> keys,
    std::shared_ptr<Database::Snapshot> snapshot, const BaseIndex* previous,
    std::function<void(double)> progress, const std::atomic<bool>* cancelled) const {
  BaseIndex::BuildInput input;
  input.dimension = static_cast<int>(kb.spec.embedding_dimension);
  input.keys = std::move(keys);
  input.normalised = kb.spec.metric == Metric::kCosine;
  input.previous = previous;
  input.options = options_.index;
  input.progress = std::move(progress);
  input.cancelled = cancelled;
  // The embeddings lie in the order of the keys; others of the knowledge base stand between them.
  input.scan = [&](std::span<const SlotKey> wanted,
                   const std::function<bool(size_t, const float*)>& each) -> absl::Status {
    rocksdb::ReadOptions options;
    options.snapshot = snapshot->get();
    options.fill_cache = false;
    options.readahead_size = size_t{2} << 20;
    std::string end = PrefixEnd(kb.prefix);
    rocksdb::Slice upper(end);
    options.iterate_upper_bound = &upper;
    auto it = db_->Iterate(kEmbeddings, options);
    std::vector<float> vector(kb.spec.embedding_dimension);
    for (size_t i = 0; i < wanted.size(); ++i) {
      const std::string key = EmbeddingKey(kb, wanted[i].record_id, wanted[i].embedding_hash);
      constexpr int kSteps = 8;  // then a seek is cheaper
      if (i == 0) it->Seek(key);
      for (int step = 0; it->Valid() && ToView(it->key()) < key; ++step) {
        if (step == kSteps) {
          it->Seek(key);
        } else {
          it->Next();
        }
      }
      if (!it->status().ok()) return FromRocksDb(it->status(), "reading embeddings");
      if (!it->Valid() || ToView(it->key()) != key ||
          it->value().size() != vector.size() * sizeof(float)) {
        return absl::DataLossError(Message("the embedding of record ", wanted[i].record_id.ToHex(),
                                           " is missing or of another size"));
      }
      std::memcpy(vector.data(), it->value().data(), it->value().size());
      if (!each(i, vector.data())) return absl::OkStatus();
    }
    return absl::OkStatus();
  };
  return BaseIndex::Build(std::move(input));
}

absl::StatusOr<std::string> RocksDbCore::SaveIndex(const KnowledgeBase& kb, uint64_t version,
                                                   uint64_t sequence, const BaseIndex& base) {
  uint64_t unique;
  {
    std::lock_guard files(files_mu_);
    unique = next_file_++;
  }
  const std::string name =
      Message(kb.id, "-", version, "-", absl::ToUnixNanos(absl::Now()), "-", unique, ".idx");
  const std::string path = directory_ + "/index/" + name;
  std::string bytes = FrameIndex(kb.id, version, sequence, base.Serialize());
  rocksdb::Status s = rocksdb::WriteStringToFile(db_->env(), bytes, path, /*should_sync=*/true);
  if (!s.ok()) {
    (void)db_->env()->DeleteFile(path);
    return FromRocksDb(s, "writing an index file");
  }
  ByteWriter row;
  row.String(name);
  row.U64(sequence);
  row.U64(bytes.size());
  return row.Take();
}

// The row of another version that shares the file `row` names: its own sequences begin anew, so the
// file's version and sequence are kept beside them.
std::string SharedIndexRow(std::string_view row, uint64_t version) {
  if (row.empty()) return "";
  ByteReader r(row);
  ByteWriter shared;
  shared.String(r.String());
  uint64_t sequence = r.U64();
  shared.U64(0);
  shared.U64(r.U64());
  if (!r.done()) {
    version = r.U64();
    sequence = r.U64();
  }
  shared.U64(version);
  shared.U64(sequence);
  return shared.Take();
}

void RocksDbCore::RemoveIndexFile(const KnowledgeBase& kb, std::string_view row) {
  if (row.empty()) return;
  std::string name(ByteReader(row).String());
  std::vector<uint64_t> versions;
  {
    std::shared_lock lock(catalog_mu_);
    for (const auto& [number, v] : kb.versions) versions.push_back(number);
  }
  for (uint64_t version : versions) {
    const std::string other = IndexRow(kb, version);
    if (!other.empty() && ByteReader(other).String() == name) return;
  }
  std::lock_guard files(files_mu_);
  (void)db_->env()->DeleteFile(directory_ + "/index/" + name);
}

std::string RocksDbCore::IndexRow(const KnowledgeBase& kb, uint64_t version) const {
  rocksdb::PinnableSlice value;
  absl::StatusOr<bool> has = db_->Get(kMetadata, VersionKey('I', kb, version), nullptr, &value);
  return has.ok() && *has ? value.ToString() : "";
}

absl::StatusOr<std::shared_ptr<const BaseIndex>> RocksDbCore::ReadIndexFile(
    const KnowledgeBase& kb, uint64_t version, std::string_view row, uint64_t* sequence) const {
  ByteReader r(row);
  std::string name(r.String());
  *sequence = r.U64();
  uint64_t size = r.U64();
  uint64_t file_sequence = *sequence;
  if (!r.done()) {
    version = r.U64();
    file_sequence = r.U64();
  }
  if (!r.done()) return absl::DataLossError("a malformed index row");
  std::string bytes;
  rocksdb::Status s = rocksdb::ReadFileToString(db_->env(), directory_ + "/index/" + name, &bytes);
  if (!s.ok()) return FromRocksDb(s, "reading the index file");
  if (bytes.size() != size || size < 44)
    return absl::DataLossError("the index file's size differs");
  std::string_view body = std::string_view(bytes).substr(0, size - 4);
  if (Crc32c(body) != ByteReader(std::string_view(bytes).substr(size - 4)).U32()) {
    return absl::DataLossError("the index file fails its checksum");
  }
  ByteReader f(body);
  bool head = f.Bytes(8) == kMagic && f.U64() == kb.id;
  head = head && f.U64() == version && f.U64() == file_sequence && f.U64() == size - 44;
  if (!head) return absl::DataLossError("the index file is of another version or sequence");
  absl::StatusOr<std::shared_ptr<const BaseIndex>> base =
      BaseIndex::Deserialize(f.Bytes(size - 44));
  if (base.ok() && (*base)->dimension() != static_cast<int>(kb.spec.embedding_dimension)) {
    return absl::DataLossError("the index file is of another dimension");
  }
  return base;
}

RocksDbCore::Moment RocksDbCore::MomentOf(const Version& v) const {
  while (true) {
    // Merging puts other segments in the place of some, which are then deleted: only while it has
    // not is the snapshot one of the stack.
    Moment moment{v.GetStack(), std::make_shared<Database::Snapshot>(db_)};
    if (v.GetStack() == moment.stack) return moment;
  }
}

absl::Status RocksDbCore::EnsureIndex(const std::shared_ptr<Version>& v) {
  if (v->GetIndex() != nullptr) return absl::OkStatus();
  std::lock_guard one(v->index_mu);
  if (v->GetIndex() != nullptr) return absl::OkStatus();
  absl::StatusOr<std::shared_ptr<VersionIndex>> index = OpenIndex(v);
  if (!index.ok()) {
    spdlog::warn("store: index of {} version {} is rebuilt: {}", v->kb->spec.name, v->number,
                 index.status().ToString());
    return RebuildIndex(v);
  }
  std::string row = IndexRow(*v->kb, v->number);
  std::lock_guard lock(v->mu);
  v->index = *std::move(index);
  v->index_row = std::move(row);
  return absl::OkStatus();
}

// From its file and the log of changes since. An error: rebuild it.
absl::StatusOr<std::shared_ptr<VersionIndex>> RocksDbCore::OpenIndex(
    const std::shared_ptr<Version>& v) {
  const KnowledgeBase& kb = *v->kb;
  std::shared_ptr<const BaseIndex> base;
  uint64_t saved = 0;
  const std::string row = IndexRow(kb, v->number);
  if (!row.empty()) {
    absl::StatusOr<std::shared_ptr<const BaseIndex>> read =
        ReadIndexFile(kb, v->number, row, &saved);
    if (!read.ok()) return read.status();
    base = *std::move(read);
  } else {  // nothing was folded yet: the log holds everything
    absl::StatusOr<std::shared_ptr<const BaseIndex>> empty =
        BuildBase(kb, {}, std::make_shared<Database::Snapshot>(db_), nullptr, nullptr, nullptr);
    if (!empty.ok()) return empty.status();
    base = *std::move(empty);
  }
  auto index = std::make_shared<VersionIndex>(base);

  std::set<RecordId> changed;
  const std::string log = VersionKey('J', kb, v->number);
  std::string begin = log;
  AppendBig64(&begin, saved + 1);
  std::string end = PrefixEnd(log);
  rocksdb::Slice upper(end);
  rocksdb::ReadOptions options;
  options.iterate_upper_bound = &upper;
  auto it = db_->Iterate(kMetadata, options);
  uint64_t expected = saved;
  for (it->Seek(begin); it->Valid(); it->Next()) {
    if (ReadBig64(it->key().data() + it->key().size() - 8) != ++expected) {
      return absl::DataLossError("the log of changes has a gap");
    }
    ByteReader r(ToView(it->value()));
    for (uint32_t n = r.U32(); n > 0 && r.ok(); --n) changed.insert(r.Hash());
    if (!r.done()) return absl::DataLossError("a malformed row in the log of changes");
  }
  if (!it->status().ok()) return FromRocksDb(it->status(), "reading the log of changes");
  if (expected != v->sequence) {
    return absl::DataLossError(
        Message("the index stands at change ", expected, ", the database at ", v->sequence));
  }
  std::vector<RecordId> ids(changed.begin(), changed.end());
  const Moment moment = MomentOf(*v);
  if (absl::Status s = Resync(kb, *moment.stack, ids, moment.snapshot->get(), index.get());
      !s.ok()) {
    return s;
  }
  if (index->records() != v->counts.records) {
    return absl::DataLossError(Message("the index holds ", index->records(),
                                       " records, the database ", v->counts.records));
  }
  return index;
}

absl::Status RocksDbCore::Resync(const KnowledgeBase& kb, const Stack& stack,
                                 std::span<const RecordId> records,
                                 const rocksdb::Snapshot* snapshot, VersionIndex* index) const {
  for (const RecordId& id : records) {
    absl::StatusOr<std::set<uint64_t>> visible =
        VisibleEmbeddings(kb, stack, id, nullptr, snapshot);
    if (!visible.ok()) return visible.status();
    std::vector<VersionIndex::Addition> additions;
    std::vector<SlotKey> removals;
    for (uint64_t hash : index->EmbeddingsOf(id)) {
      if (visible->erase(hash) == 0) removals.push_back({id, hash});
    }
    for (uint64_t hash : *visible) {
      absl::StatusOr<std::vector<float>> vector = ReadEmbedding(kb, id, hash, snapshot);
      if (!vector.ok()) return vector.status();
      additions.push_back({{id, hash}, *std::move(vector)});
    }
    index->Apply(std::move(additions), removals);
  }
  return absl::OkStatus();
}

absl::Status RocksDbCore::RebuildIndex(const std::shared_ptr<Version>& v) {
  const KnowledgeBase& kb = *v->kb;
  const auto [stack, snapshot] = MomentOf(*v);
  absl::StatusOr<Scanned> scanned = ScanStack(kb, *stack, snapshot->get(), nullptr);
  if (!scanned.ok()) return scanned.status();
  absl::StatusOr<std::shared_ptr<const BaseIndex>> base =
      BuildBase(kb, std::move(scanned->keys), snapshot, nullptr, nullptr, nullptr);
  if (!base.ok()) return base.status();
  const std::string old = IndexRow(kb, v->number);
  absl::StatusOr<std::string> row = SaveIndex(kb, v->number, v->sequence, **base);
  if (row.ok()) {
    rocksdb::WriteBatch batch;
    batch.Put(db_->family(kMetadata), VersionKey('I', kb, v->number), *row);
    PutCountsRow(*v, scanned->counts, v->sequence, &batch);
    std::string log = VersionKey('J', kb, v->number);
    std::string end = log;
    AppendBig64(&end, v->sequence + 1);
    batch.DeleteRange(db_->family(kMetadata), log, end);
    if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
    RemoveIndexFile(kb, old);
  } else {
    // Readers need the index; that it could not be kept costs the next start another build.
    spdlog::warn("store: the index of {} is not saved: {}", kb.spec.name, row.status().ToString());
  }
  std::lock_guard lock(v->mu);
  v->counts = scanned->counts;
  v->index = std::make_shared<VersionIndex>(*base);
  v->index_row.reset();
  if (row.ok()) v->index_row = *std::move(row);
  return absl::OkStatus();
}

absl::Status RocksDbCore::Fold(const std::shared_ptr<Version>& v) {
  const KnowledgeBase& kb = *v->kb;
  std::shared_ptr<VersionIndex> index;
  std::vector<SlotKey> keys;
  std::shared_ptr<Database::Snapshot> snapshot;
  uint64_t sequence = 0;
  {
    std::lock_guard write(write_mu_);
    index = v->GetIndex();
    if (v->dropped || index == nullptr || index->backlog() <= options_.index.tail_max ||
        index->backlog() <= index->base_size() / 16) {
      return absl::OkStatus();
    }
    keys = index->BeginFold();
    snapshot = std::make_shared<Database::Snapshot>(db_);
    sequence = v->sequence;
  }
  std::shared_ptr<const BaseIndex> previous = index->base();
  absl::StatusOr<std::shared_ptr<const BaseIndex>> base =
      BuildBase(kb, std::move(keys), snapshot, previous.get(), nullptr, &stop_);
  snapshot.reset();
  absl::StatusOr<std::string> row = base.ok() ? SaveIndex(kb, v->number, sequence, **base)
                                              : absl::StatusOr<std::string>(base.status());
  std::string unused;
  absl::Status status = row.status();
  {
    std::lock_guard write(write_mu_);
    if (status.ok() && v->dropped) status = absl::CancelledError("the version was dropped");
    if (status.ok()) {
      unused = IndexRow(kb, v->number);
      rocksdb::WriteBatch batch;
      batch.Put(db_->family(kMetadata), VersionKey('I', kb, v->number), *row);
      std::string log = VersionKey('J', kb, v->number);
      std::string end = log;
      AppendBig64(&end, sequence + 1);
      batch.DeleteRange(db_->family(kMetadata), log, end);
      status = db_->Write(&batch);
    }
    if (status.ok()) {
      index->FinishFold(*base);
      std::lock_guard lock(v->mu);
      v->index_row = *row;
    } else {
      index->CancelFold();
      if (row.ok()) unused = *row;
    }
  }
  RemoveIndexFile(kb, unused);
  return stopping() ? absl::OkStatus() : status;
}

// What a crash left between writing a file and naming it.
void RocksDbCore::RemoveStaleIndexFiles() {
  std::set<std::string> named;
  for (const auto& [key, kb] : kbs_) {
    for (const auto& [number, v] : kb->versions) {
      std::string row = IndexRow(*kb, number);
      if (!row.empty()) named.emplace(ByteReader(row).String());
    }
  }
  std::vector<std::string> files;
  if (!db_->env()->GetChildren(directory_ + "/index", &files).ok()) return;
  for (const std::string& f : files) {
    if (f.ends_with(".idx") && named.count(f) == 0) {
      (void)db_->env()->DeleteFile(directory_ + "/index/" + f);
    }
  }
}

}  // namespace memory3
