// Puts and deletes. Every change is made ready under the write lock, written as one batch, then
// applied to the index; it is synced outside the lock, together with whatever else waits.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>

#include "memory_server/dot.h"
#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"

namespace memory3 {
namespace {

// Past so much unfolded change puts wait for the index instead of growing it.
constexpr uint64_t kMaxBacklog = uint64_t{8} << 20;

absl::Status BadEntry(const NewEntry& e, std::string_view what) {
  return absl::InvalidArgumentError(
      Message("entry (\"", e.source.document_id, "\", ", e.source.ordinal, "): ", what));
}

// INVALID_ARGUMENT: a damaged record. FAILED_PRECONDITION: a sound one of another model.
absl::Status CheckRecordOf(const KnowledgeBase& kb, const NewEntry& e) {
  if (e.record.size() > static_cast<size_t>(kMaxRecordBytes)) {
    return BadEntry(e, Message("record of ", e.record.size(), " bytes: at most ", kMaxRecordBytes));
  }
  absl::StatusOr<RecordHeader> header = CheckRecord(e.record);
  if (!header.ok()) {
    return BadEntry(e, Message("record ", e.record_id.ToHex(), ": ", header.status().message()));
  }
  const Geometry& g = kb.spec.geometry;
  auto other = [&](std::string_view field, const auto& is, const auto& wanted) {
    return absl::FailedPreconditionError(Message(
        "entry (\"", e.source.document_id, "\", ", e.source.ordinal, "): record ",
        e.record_id.ToHex(), ": ", field, " is ", is, ", the knowledge base's is ", wanted));
  };
  if (header->writer_fingerprint != kb.spec.writer_fingerprint) {
    return other("writer fingerprint", header->writer_fingerprint.ToHex(),
                 kb.spec.writer_fingerprint.ToHex());
  }
  if (header->codec != kb.spec.codec) {
    return other("codec", CodecName(header->codec), CodecName(kb.spec.codec));
  }
  if (header->codebook_hash != kb.codebook_hash) {
    return other("codebook", header->codebook_hash.ToHex(), kb.codebook_hash.ToHex());
  }
  const MemoryShape& s = header->shape;
  if (s.layers != static_cast<int>(g.memory_layers.size())) {
    return other("number of memory layers", s.layers, g.memory_layers.size());
  }
  if (s.kv_heads != static_cast<int>(g.kv_heads)) return other("kv_heads", s.kv_heads, g.kv_heads);
  if (s.head_dim != static_cast<int>(g.head_dim)) return other("head_dim", s.head_dim, g.head_dim);
  if (s.tokens > static_cast<int>(g.tokens_kept)) {
    return other("tokens_kept", s.tokens, g.tokens_kept);
  }
  if (header->reference_tokens > static_cast<int>(g.reference_tokens)) {
    return other("reference_tokens", header->reference_tokens, g.reference_tokens);
  }
  return absl::OkStatus();
}

}  // namespace

std::string RecordKey(const KnowledgeBase& kb, const RecordId& id) {
  std::string key = kb.tenant_prefix;
  key.append(id.view());
  return key;
}

std::string ReferenceKey(const KnowledgeBase& kb, const RecordId& id, uint64_t embedding_hash,
                         uint64_t segment, std::string_view suffix) {
  std::string key;
  key.reserve(kb.tenant_prefix.size() + 56 + suffix.size());
  key.append(kb.tenant_prefix);
  key.append(id.view());
  AppendBig64(&key, kb.id);
  AppendBig64(&key, embedding_hash);
  AppendBig64(&key, segment);
  key.append(suffix);
  return key;
}

bool ParseReference(std::string_view rest, Reference* r) {
  if (rest.size() < 24 + 6) return false;
  r->kb = ReadBig64(rest.data());
  r->embedding_hash = ReadBig64(rest.data() + 8);
  r->segment = ReadBig64(rest.data() + 16);
  r->suffix = rest.substr(24);
  return true;
}

std::string EmbeddingKey(const KnowledgeBase& kb, const RecordId& id, uint64_t hash) {
  std::string key = kb.prefix;
  key.append(id.view());
  AppendBig64(&key, hash);
  return key;
}

absl::StatusOr<RocksDbCore::Batch> RocksDbCore::Prepare(const KnowledgeBase& kb,
                                                        std::span<const NewEntry> entries) const {
  Batch batch;
  batch.entries.reserve(entries.size());
  absl::flat_hash_map<absl::string_view, size_t> named;  // of suffixes in batch.entries
  named.reserve(entries.size());
  batch.records.reserve(entries.size());
  for (const NewEntry& e : entries) {
    if (absl::Status s = CheckSource(e.source); !s.ok()) return s;
    if (e.embedding.size() != kb.spec.embedding_dimension) {
      return BadEntry(e, Message("embedding has ", e.embedding.size(),
                                 " numbers, embedding_dimension is ", kb.spec.embedding_dimension));
    }
    Prepared p;
    p.entry = &e;
    p.suffix = EntrySuffix(e.source.document_id, e.source.ordinal);
    p.embedding.assign(e.embedding.begin(), e.embedding.end());
    if (absl::Status s = NormaliseEmbedding(kb.spec.metric, &p.embedding); !s.ok()) {
      return BadEntry(e, Message("embedding: ", s.message()));
    }
    p.hash = EmbeddingHash(p.embedding);
    if (!e.record.empty()) {
      if (absl::Status s = CheckRecordOf(kb, e); !s.ok()) return s;
      batch.records.try_emplace(e.record_id, e.record);
    }
    if (auto it = named.find(p.suffix); it != named.end()) {
      Prepared& earlier = batch.entries[it->second];
      p.suffix = std::move(earlier.suffix);  // `named` points into it
      earlier = std::move(p);
    } else {
      batch.entries.push_back(std::move(p));
      named.emplace(batch.entries.back().suffix, batch.entries.size() - 1);
    }
  }
  for (uint32_t i = 0; i < batch.entries.size(); ++i) batch.by_record.push_back(i);
  batch.by_name = batch.by_record;
  std::sort(batch.by_record.begin(), batch.by_record.end(), [&](uint32_t a, uint32_t b) {
    return batch.entries[a].entry->record_id < batch.entries[b].entry->record_id;
  });
  std::sort(batch.by_name.begin(), batch.by_name.end(), [&](uint32_t a, uint32_t b) {
    return batch.entries[a].suffix < batch.entries[b].suffix;
  });
  return batch;
}

absl::Status NormaliseEmbedding(Metric metric, std::vector<float>* v) {
  const auto n = static_cast<int64_t>(v->size());
  double squares = Dot(v->data(), v->data(), n);
  if (!std::isfinite(squares)) {  // a number that is not finite, or only its square
    squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double x = (*v)[i];
      if (!std::isfinite(x)) {
        return absl::InvalidArgumentError(
            Message("number ", i, " is ", std::isnan(x) ? "NaN" : "infinite"));
      }
      squares += x * x;
    }
  }
  if (metric == Metric::kInnerProduct) return absl::OkStatus();
  if (squares < FLT_MIN) {  // so small that f32 squares lose digits, or zero
    squares = 0;
    for (float x : *v) squares += static_cast<double>(x) * x;
    if (squares == 0) return absl::OkStatus();
  }
  const double length = std::sqrt(squares);
  if (length > 1e-30 && length < 1e30) {
    const auto scale = static_cast<float>(1 / length);
    for (float& x : *v) x *= scale;
  } else {
    for (float& x : *v) x = static_cast<float>(x / length);
  }
  return absl::OkStatus();
}

absl::Status RocksDbCore::CheckNoReplace(const KnowledgeBase& kb) const {
  std::shared_lock lock(catalog_mu_);
  if (kb.deleted) {
    return absl::NotFoundError(Message("knowledge_base \"", kb.spec.name, "\" is unknown"));
  }
  for (const auto& [key, load] : loads_) {
    if (load->kb.get() != &kb) continue;
    std::lock_guard l(load->mu);
    if (load->info.mode == LoadMode::kReplace &&
        (load->info.state == LoadState::kLoading || load->info.state == LoadState::kIndexing)) {
      return absl::FailedPreconditionError(
          Message("knowledge_base \"", kb.spec.name, "\": the REPLACE load ", load->info.load_id,
                  " is under way; changes would be lost with its commit"));
    }
  }
  return absl::OkStatus();
}

bool RocksDbCore::HasOpenAppend(const KnowledgeBase& kb) const {
  std::shared_lock lock(catalog_mu_);
  for (const auto& [key, load] : loads_) {
    if (load->kb.get() != &kb) continue;
    std::lock_guard l(load->mu);
    if (load->info.mode == LoadMode::kAppend && load->open()) return true;
  }
  return false;
}

std::vector<std::string> RocksDbCore::RecordKeysOf(const KnowledgeBase& kb, const Batch& batch) {
  std::vector<std::string> keys;
  keys.reserve(batch.entries.size());
  const RecordId* before = nullptr;
  for (uint32_t i : batch.by_record) {
    const RecordId& id = batch.entries[i].entry->record_id;
    if (before == nullptr || *before != id) keys.push_back(RecordKey(kb, id));
    before = &id;
  }
  return keys;
}

// A record that is not there costs a look at a filter; one that is, less than writing it again.
absl::StatusOr<RocksDbCore::HeldBytes> RocksDbCore::LookUpRecords(
    std::span<const std::string> keys) const {
  HeldBytes held(keys.size());
  absl::Status looked =
      db_->GetEach(kRecords, keys, [&](size_t at, const rocksdb::PinnableSlice* there) {
        if (there != nullptr) held[at] = there->size();
        return absl::OkStatus();
      });
  if (!looked.ok()) return looked;
  return held;
}

// Puts the rows of a batch's entries into a segment; rows they replace there are gone already. In
// two passes, each in the order of its keys: a memtable takes sorted keys faster.
absl::Status RocksDbCore::PutEntries(const KnowledgeBase& kb, const std::string& segment_prefix,
                                     uint64_t segment, const Batch& batch,
                                     std::span<const std::string> record_keys,
                                     const HeldBytes& held, const std::vector<bool>& replaced,
                                     Change* change, uint64_t* new_records) const {
  rocksdb::WriteBatch& out = change->batch;
  std::vector<uint64_t> record_bytes(batch.entries.size());
  const RecordId* before = nullptr;
  size_t distinct = 0;
  uint64_t bytes = 0;
  for (uint32_t i : batch.by_record) {
    const Prepared& p = batch.entries[i];
    const NewEntry& e = *p.entry;
    if (before == nullptr || *before != e.record_id) {
      before = &e.record_id;
      const size_t at = distinct++;
      auto given = batch.records.find(e.record_id);
      if (held[at]) {
        bytes = *held[at];
      } else if (given != batch.records.end()) {
        bytes = given->second.size();
        out.Put(db_->family(kRecords), record_keys[at], ToSlice(given->second));
        if (change->track) change->new_records.insert(e.record_id);
        ++*new_records;
      } else {
        return absl::NotFoundError(Message("entry (\"", e.source.document_id, "\", ",
                                           e.source.ordinal, "): record ", e.record_id.ToHex(),
                                           " is not held and was not sent"));
      }
    }
    record_bytes[i] = bytes;
    out.Put(
        db_->family(kEmbeddings), EmbeddingKey(kb, e.record_id, p.hash),
        rocksdb::Slice(reinterpret_cast<const char*>(p.embedding.data()), p.embedding.size() * 4));
    std::string key = ReferenceKey(kb, e.record_id, p.hash, segment, p.suffix);
    out.Put(db_->family(kReferences), key, "");
    if (change->track) change->AddReference(std::move(key), e.record_id, p.hash);
  }
  for (uint32_t i : batch.by_name) {
    const Prepared& p = batch.entries[i];
    const NewEntry& e = *p.entry;
    const std::string row_key = segment_prefix + p.suffix;
    out.Put(db_->family(kEntries), row_key,
            EncodeEntryRow(e.record_id, p.hash, record_bytes[i], e.source));
    if (!e.source.text.empty()) {
      out.Put(db_->family(kTexts), row_key, e.source.text);
    } else if (replaced[i]) {
      out.Delete(db_->family(kTexts), row_key);
    }
    for (const auto& [k, v] : e.source.metadata) {
      out.Put(db_->family(kDocuments), PostingPrefix(kb.prefix, segment, k, v) + p.suffix, "");
    }
    change->writes_rows = true;
    if (change->track) {
      change->written_rows.insert(p.suffix);
      change->removed_rows.erase(p.suffix);
      change->embeddings[e.record_id][p.hash] = &p.embedding;
    }
  }
  return absl::OkStatus();
}

absl::Status RocksDbCore::RemoveRow(const KnowledgeBase& kb, const std::string& segment_prefix,
                                    uint64_t segment, std::string_view suffix, const EntryRow& row,
                                    bool leave_tombstone, Change* change) {
  const std::string row_key = segment_prefix + std::string(suffix);
  for (const auto& [k, v] : row.metadata) {
    change->batch.Delete(db_->family(kDocuments),
                         PostingPrefix(kb.prefix, segment, k, v) + std::string(suffix));
  }
  change->batch.Delete(db_->family(kTexts), row_key);
  std::string reference = ReferenceKey(kb, row.record_id, row.embedding_hash, segment, suffix);
  change->batch.Delete(db_->family(kReferences), reference);
  change->RemoveReference(std::move(reference), row.record_id, row.embedding_hash);
  if (leave_tombstone) {
    change->batch.Put(db_->family(kEntries), row_key, EncodeTombstoneRow());
    change->written_rows.emplace(suffix);
    change->writes_rows = true;
  } else {
    change->batch.Delete(db_->family(kEntries), row_key);
    change->removed_rows.emplace(suffix);
  }
  return absl::OkStatus();
}

absl::Status RocksDbCore::DropUnreferenced(const KnowledgeBase& kb, Change* change) {
  for (const auto& [id, hashes] : change->unreferenced) {
    std::set<uint64_t> still;  // embeddings of this knowledge base with a reference left
    bool any = false;
    const std::string prefix = RecordKey(kb, id);
    for (auto key = change->added_references.lower_bound(prefix);
         key != change->added_references.end() && key->compare(0, prefix.size(), prefix) == 0;
         ++key) {
      Reference r;
      if (ParseReference(std::string_view(*key).substr(prefix.size()), &r)) {
        still.insert(r.embedding_hash);
        any = true;
      }
    }
    rocksdb::ReadOptions options;
    std::string end = PrefixEnd(prefix);
    rocksdb::Slice upper(end);
    options.iterate_upper_bound = &upper;
    auto it = db_->Iterate(kReferences, options);
    for (it->Seek(prefix); it->Valid(); it->Next()) {
      std::string_view key = ToView(it->key());
      if (change->removed_references.count(std::string(key)) != 0) continue;
      Reference r;
      if (!ParseReference(key.substr(prefix.size()), &r)) {
        return absl::DataLossError(Message("a malformed reference to record ", id.ToHex()));
      }
      any = true;
      if (r.kb == kb.id) still.insert(r.embedding_hash);
      // Enough is known once the record lives and so do all embeddings asked about.
      if (std::includes(still.begin(), still.end(), hashes.begin(), hashes.end())) break;
    }
    if (!it->status().ok()) return FromRocksDb(it->status(), "reading references");
    for (uint64_t hash : hashes) {
      if (still.count(hash) == 0) {
        change->batch.Delete(db_->family(kEmbeddings), EmbeddingKey(kb, id, hash));
      }
    }
    if (!any) {
      change->batch.Delete(db_->family(kRecords), prefix);
    }
  }
  return absl::OkStatus();
}

// The embeddings by which the record is visible in the stack, with `change` (to the top segment) if
// given taken as done.
absl::StatusOr<std::set<uint64_t>> RocksDbCore::VisibleEmbeddings(
    const KnowledgeBase& kb, const Stack& stack, const RecordId& id, const Change* change,
    const rocksdb::Snapshot* snapshot) const {
  std::set<uint64_t> visible;
  const std::string held = RecordKey(kb, id);
  std::string begin = held;
  AppendBig64(&begin, kb.id);
  std::string end = PrefixEnd(begin);
  rocksdb::Slice upper(end);
  rocksdb::ReadOptions options;
  options.snapshot = snapshot;
  options.iterate_upper_bound = &upper;
  auto it = db_->Iterate(kReferences, options);
  for (it->Seek(begin); it->Valid(); it->Next()) {
    Reference r;
    std::string_view key = ToView(it->key());
    if (!ParseReference(key.substr(held.size()), &r)) {
      return absl::DataLossError(Message("a malformed reference to record ", id.ToHex()));
    }
    if (visible.count(r.embedding_hash) != 0) continue;
    size_t layer = stack.size();
    while (layer-- > 0 && stack[layer]->id != r.segment) {
    }
    if (layer == SIZE_MAX) continue;  // of another version
    const bool top = layer + 1 == stack.size();
    std::string suffix(r.suffix);
    if (change != nullptr) {
      if (change->removed_references.count(std::string(key)) != 0) continue;
      if (!top && (change->written_rows.contains(suffix) ||
                   change->document_tombstones.contains(std::string(DocumentKeyOf(suffix))) ||
                   change->record_tombstones.contains(id))) {
        continue;
      }
    }
    if (!top) {
      // A row above replaces it. One that this change takes away has left a tombstone if need be.
      bool shadowed = false;
      for (size_t l = layer + 1; l < stack.size() && !shadowed; ++l) {
        if (!stack[l]->rows) continue;
        if (change != nullptr && l + 1 == stack.size() && change->removed_rows.contains(suffix)) {
          continue;
        }
        absl::StatusOr<bool> has =
            db_->Has(kEntries, SegmentKey(kb.prefix, stack[l]->id, suffix), snapshot);
        if (!has.ok()) return has.status();
        shadowed = *has;
      }
      if (shadowed) continue;
      absl::StatusOr<bool> hidden =
          HasTombstoneAbove(*db_, kb.prefix, stack, layer, DocumentKeyOf(suffix), id, snapshot);
      if (!hidden.ok()) return hidden.status();
      if (*hidden) continue;
    }
    visible.insert(r.embedding_hash);
  }
  if (!it->status().ok()) return FromRocksDb(it->status(), "reading references");
  if (change != nullptr) {
    for (auto k = change->added_references.lower_bound(begin);
         k != change->added_references.end() && k->compare(0, begin.size(), begin) == 0; ++k) {
      Reference r;
      if (ParseReference(std::string_view(*k).substr(held.size()), &r)) {
        visible.insert(r.embedding_hash);
      }
    }
  }
  return visible;
}

absl::StatusOr<std::vector<float>> RocksDbCore::ReadEmbedding(
    const KnowledgeBase& kb, const RecordId& id, uint64_t hash,
    const rocksdb::Snapshot* snapshot) const {
  rocksdb::PinnableSlice value;
  absl::StatusOr<bool> has = db_->Get(kEmbeddings, EmbeddingKey(kb, id, hash), snapshot, &value);
  if (!has.ok()) return has.status();
  if (!*has || value.size() != kb.spec.embedding_dimension * sizeof(float)) {
    return absl::DataLossError(Message("the embedding of record ", id.ToHex(), " is ",
                                       *has ? "of another size" : "missing"));
  }
  std::vector<float> v(kb.spec.embedding_dimension);
  std::memcpy(v.data(), value.data(), value.size());
  return v;
}

absl::Status RocksDbCore::CommitChange(const std::shared_ptr<Version>& v, const Stack& stack,
                                       Change* change, uint64_t* dead_records) {
  const KnowledgeBase& kb = *v->kb;
  if (absl::Status s = DropUnreferenced(kb, change); !s.ok()) return s;
  std::shared_ptr<VersionIndex> index = v->GetIndex();
  std::vector<VersionIndex::Addition> additions;
  std::vector<SlotKey> removals;
  int64_t records = 0;
  uint64_t dead = 0;
  ByteWriter log;
  log.U32(static_cast<uint32_t>(change->affected.size()));
  for (const auto& [id, fresh] : change->affected) {
    log.Bytes(id.view());
    std::set<uint64_t> after;
    std::vector<uint64_t> before;
    if (fresh) {  // nothing of it was stored before this change
      after = change->added[id];
    } else {
      absl::StatusOr<std::set<uint64_t>> visible =
          VisibleEmbeddings(kb, stack, id, change, nullptr);
      if (!visible.ok()) return visible.status();
      after = *std::move(visible);
      before = index->EmbeddingsOf(id);
    }
    records += static_cast<int64_t>(!after.empty()) - static_cast<int64_t>(!before.empty());
    dead += after.empty() && !before.empty();
    for (uint64_t hash : before) {
      if (after.erase(hash) == 0) removals.push_back({id, hash});
    }
    for (uint64_t hash : after) {  // those not there before
      VersionIndex::Addition a;
      a.key = {id, hash};
      auto given = change->embeddings.find(id);
      if (given != change->embeddings.end() && given->second.count(hash) != 0) {
        a.vector = *given->second.at(hash);
      } else {
        absl::StatusOr<std::vector<float>> stored = ReadEmbedding(kb, id, hash, nullptr);
        if (!stored.ok()) return stored.status();
        a.vector = *std::move(stored);
      }
      additions.push_back(std::move(a));
    }
  }
  Counts counts = v->counts;
  counts.entries += change->entries;
  counts.documents += change->documents;
  counts.records += records;
  const uint64_t sequence = v->sequence + 1;
  PutCountsRow(*v, counts, sequence, &change->batch);
  std::string log_key = VersionKey('J', kb, v->number);
  AppendBig64(&log_key, sequence);
  change->batch.Put(db_->family(kMetadata), log_key, log.str());

  // Before the rows can be seen, so that no reader takes the segment for empty.
  Segment& top = *stack.back();
  if (change->writes_rows) top.rows = true;
  if (change->writes_document_tombstones) top.document_tombstones = true;
  if (change->writes_record_tombstones) top.record_tombstones = true;
  if (absl::Status s = db_->Write(&change->batch); !s.ok()) return s;
  index->Apply(std::move(additions), removals);
  {
    std::lock_guard lock(v->mu);
    v->counts = counts;
    v->sequence = sequence;
  }
  if (dead_records != nullptr) *dead_records = dead;
  const uint64_t backlog = index->backlog();
  if (backlog > options_.index.tail_max && backlog > index->base_size() / 16) WakeMaintenance();
  return absl::OkStatus();
}

absl::StatusOr<PutResult> RocksDbCore::Put(std::string_view tenant, std::string_view kb_name,
                                           std::span<const NewEntry> entries, bool wait) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb_name);
  if (!found.ok()) return found.status();
  const KnowledgeBase& kb = **found;
  absl::StatusOr<Batch> batch = Prepare(kb, entries);
  if (!batch.ok()) return batch.status();
  PutResult result;
  if (!batch->entries.empty()) {
    std::lock_guard write(write_mu_);
    if (absl::Status s = CheckNoReplace(kb); !s.ok()) return s;
    std::shared_ptr<Version> v = Published(kb);
    if (v->GetIndex()->backlog() > kMaxBacklog) {
      return absl::ResourceExhaustedError(
          Message("knowledge_base \"", kb.spec.name, "\": its index is behind; put slower"));
    }
    std::shared_ptr<const Stack> stack = v->GetStack();
    const Segment& top = *stack->back();
    const std::string top_prefix = kb.SegmentPrefix(top.id);
    Change change(&scratch_);
    absl::flat_hash_set<std::string> documents;  // looked up
    std::vector<bool> replaced(batch->entries.size());
    for (const Prepared& p : batch->entries) {
      absl::StatusOr<std::optional<FoundRow>> old =
          FindVisible(*db_, kb.prefix, *stack, stack->size(), p.suffix, nullptr);
      if (!old.ok()) return old.status();
      if (std::string dk(DocumentKeyOf(p.suffix)); !*old && documents.insert(dk).second) {
        StackIterator it(*db_, kb.prefix, *stack, dk, dk, nullptr);
        if (!it.status().ok()) return it.status();
        change.documents += !it.Valid();
      }
      if (*old) {
        const FoundRow& row = **old;
        change.affected[row.row.record_id] = false;
        if (row.layer + 1 == stack->size()) {
          replaced[&p - batch->entries.data()] = true;
          if (absl::Status s = RemoveRow(kb, top_prefix, top.id, p.suffix, row.row, false, &change);
              !s.ok()) {
            return s;
          }
        }
      } else {
        ++change.entries;
      }
    }
    const std::vector<std::string> record_keys = RecordKeysOf(kb, *batch);
    absl::StatusOr<HeldBytes> held = LookUpRecords(record_keys);
    if (!held.ok()) return held.status();
    if (absl::Status s = PutEntries(kb, top_prefix, top.id, *batch, record_keys, *held, replaced,
                                    &change, &result.new_records);
        !s.ok()) {
      return s;
    }
    for (const Prepared& p : batch->entries) {
      change.affected.try_emplace(p.entry->record_id,
                                  change.new_records.contains(p.entry->record_id));
    }
    if (absl::Status s = CommitChange(v, *stack, &change, nullptr); !s.ok()) return s;
    result.entries = batch->entries.size();
  }
  if (wait) {
    if (absl::Status s = db_->Sync(); !s.ok()) return s;
  }
  return result;
}

absl::StatusOr<DeleteResult> RocksDbCore::DeleteDocuments(
    std::string_view tenant, std::string_view kb_name, std::span<const std::string> document_ids) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb_name);
  if (!found.ok()) return found.status();
  const KnowledgeBase& kb = **found;
  std::set<std::string> keys;
  for (const std::string& id : document_ids) {
    Source named;
    named.document_id = id;
    if (absl::Status s = CheckSource(named); !s.ok()) return s;
    std::string key;
    AppendDocumentKey(&key, id);
    keys.insert(std::move(key));
  }
  DeleteResult result;
  {
    std::lock_guard write(write_mu_);
    if (absl::Status s = CheckNoReplace(kb); !s.ok()) return s;
    std::shared_ptr<Version> v = Published(kb);
    std::shared_ptr<const Stack> stack = v->GetStack();
    const Segment& top = *stack->back();
    const std::string top_prefix = kb.SegmentPrefix(top.id);
    const bool loading = HasOpenAppend(kb);
    Stack lower(stack->begin(), stack->end() - 1);
    Change change;
    for (const std::string& key : keys) {
      bool any = false;
      for (StackIterator it(*db_, kb.prefix, *stack, key, key, nullptr);; it.Next()) {
        if (!it.status().ok()) return it.status();
        if (!it.Valid()) break;
        EntryRow row;
        if (!DecodeEntryRow(it.value(), &row)) return absl::DataLossError("a malformed entry row");
        any = true;
        --change.entries;
        ++result.entries;
        change.affected[row.record_id] = false;
        if (it.layer() + 1 == stack->size()) {
          if (absl::Status s = RemoveRow(kb, top_prefix, top.id, it.suffix(), row, false, &change);
              !s.ok()) {
            return s;
          }
        }
      }
      change.documents -= any;
      // What stands below, or will once a load is published below, is hidden.
      StackIterator below(*db_, kb.prefix, lower, key, key, nullptr);
      if (!below.status().ok()) return below.status();
      if (loading || below.Valid()) {
        change.batch.Put(db_->family(kDocuments), DocumentTombstoneKey(kb.prefix, top.id, key), "");
        change.document_tombstones.insert(key);
        change.writes_document_tombstones = true;
      }
    }
    if (absl::Status s = CommitChange(v, *stack, &change, &result.records); !s.ok()) return s;
  }
  if (absl::Status s = db_->Sync(); !s.ok()) return s;
  return result;
}

absl::StatusOr<DeleteResult> RocksDbCore::DeleteRecords(std::string_view tenant,
                                                        std::string_view kb_name,
                                                        std::span<const RecordId> ids) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb_name);
  if (!found.ok()) return found.status();
  const KnowledgeBase& kb = **found;
  DeleteResult result;
  {
    std::lock_guard write(write_mu_);
    if (absl::Status s = CheckNoReplace(kb); !s.ok()) return s;
    std::shared_ptr<Version> v = Published(kb);
    std::shared_ptr<const Stack> stack = v->GetStack();
    const size_t layers = stack->size();
    const Segment& top = *stack->back();
    const std::string top_prefix = kb.SegmentPrefix(top.id);
    const bool loading = HasOpenAppend(kb);
    Change change;
    std::set<std::string> gone;       // suffixes
    std::set<std::string> documents;  // keys of documents that lost an entry
    for (const RecordId& id : std::set<RecordId>(ids.begin(), ids.end())) {
      bool below = loading;
      const std::string held = RecordKey(kb, id);
      std::string begin = held;
      AppendBig64(&begin, kb.id);
      std::string end = PrefixEnd(begin);
      rocksdb::Slice upper(end);
      rocksdb::ReadOptions options;
      options.iterate_upper_bound = &upper;
      auto it = db_->Iterate(kReferences, options);
      for (it->Seek(begin); it->Valid(); it->Next()) {
        Reference r;
        if (!ParseReference(ToView(it->key()).substr(held.size()), &r)) {
          return absl::DataLossError(Message("a malformed reference to record ", id.ToHex()));
        }
        absl::StatusOr<std::optional<FoundRow>> row =
            FindVisible(*db_, kb.prefix, *stack, layers, r.suffix, nullptr);
        if (!row.ok()) return row.status();
        if (!*row || (*row)->row.record_id != id || (*stack)[(*row)->layer]->id != r.segment) {
          continue;
        }
        ++result.entries;
        --change.entries;
        gone.emplace(r.suffix);
        documents.emplace(DocumentKeyOf(r.suffix));
        if ((*row)->layer + 1 < layers) {
          below = true;
          continue;
        }
        bool tombstone = loading;
        if (!tombstone) {
          absl::StatusOr<bool> any =
              AnyRowBelow(*db_, kb.prefix, *stack, layers - 1, r.suffix, nullptr);
          if (!any.ok()) return any.status();
          tombstone = *any;
        }
        if (absl::Status s =
                RemoveRow(kb, top_prefix, top.id, r.suffix, (*row)->row, tombstone, &change);
            !s.ok()) {
          return s;
        }
      }
      if (!it->status().ok()) return FromRocksDb(it->status(), "reading references");
      change.affected[id] = false;
      if (below) {
        change.batch.Put(db_->family(kDocuments), RecordTombstoneKey(kb.prefix, top.id, id), "");
        change.record_tombstones.insert(id);
        change.writes_record_tombstones = true;
      }
    }
    for (const std::string& key : documents) {
      bool left = false;
      StackIterator it(*db_, kb.prefix, *stack, key, key, nullptr);
      for (; it.Valid() && !left; it.Next()) left = gone.count(std::string(it.suffix())) == 0;
      if (!it.status().ok()) return it.status();
      change.documents -= !left;
    }
    if (absl::Status s = CommitChange(v, *stack, &change, &result.records); !s.ok()) return s;
  }
  if (absl::Status s = db_->Sync(); !s.ok()) return s;
  return result;
}

}  // namespace memory3
