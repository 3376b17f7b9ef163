// Bulk loads: staged in a segment of their own, published by one batch of metadata.
#include <rocksdb/write_batch.h>
#include <spdlog/spdlog.h>

#include <algorithm>

#include "absl/strings/str_format.h"
#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"

namespace memory3 {
namespace {

constexpr size_t kMaxIdempotencyKey = 128;
// So many ended loads of a knowledge base are remembered, the newest.
constexpr size_t kMaxEndedLoads = 1000;
constexpr absl::Duration kRateWindow = absl::Seconds(10);
// So many changed documents are carried over while writers wait; more are folded in by another
// round.
constexpr size_t kMaxCarriedOver = 2000;
constexpr int kMaxRounds = 5;
constexpr double kIndexShare = 0.9;  // of indexing_fraction; the rest is reading entries

std::string_view StateName(LoadState s) {
  switch (s) {
    case LoadState::kLoading:
      return "LOADING";
    case LoadState::kIndexing:
      return "INDEXING";
    case LoadState::kCommitted:
      return "COMMITTED";
    case LoadState::kAborted:
      return "ABORTED";
    case LoadState::kFailed:
      return "FAILED";
  }
  return "?";
}

absl::Status WrongState(const LoadInfo& info, std::string_view doing) {
  return absl::FailedPreconditionError(
      Message("load_id ", info.load_id, " is ", StateName(info.state), ", not to be ", doing));
}

bool IsPrefix(const Stack& a, const Stack& b) {
  return a.size() <= b.size() && std::equal(a.begin(), a.end(), b.begin());
}

}  // namespace

absl::StatusOr<std::shared_ptr<Load>> RocksDbCore::FindLoad(std::string_view tenant,
                                                            std::string_view load_id) const {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  if (absl::Status s = CheckName("load_id", load_id); !s.ok()) return s;
  std::shared_lock lock(catalog_mu_);
  auto it = loads_.find(TenantPrefix(tenant) + std::string(load_id));
  if (it == loads_.end()) {
    return absl::NotFoundError(Message("load_id \"", load_id, "\" is unknown"));
  }
  return it->second;
}

LoadInfo RocksDbCore::SnapshotOf(const Load& load) const {
  std::lock_guard lock(load.mu);
  LoadInfo info = load.info;
  if (info.state == LoadState::kLoading && load.rate.size() > 1) {
    const auto& [then, taken] = load.rate.front();
    const double seconds = absl::ToDoubleSeconds(absl::Now() - then);
    if (seconds > 0) {
      info.entries_per_second = static_cast<double>(info.entries - taken.first) / seconds;
      info.bytes_per_second = static_cast<double>(info.bytes - taken.second) / seconds;
    }
    if (info.expected_entries && info.entries_per_second > 0) {
      const uint64_t left =
          *info.expected_entries > info.entries ? *info.expected_entries - info.entries : 0;
      info.time_left = absl::Seconds(static_cast<double>(left) / info.entries_per_second);
    }
  }
  return info;
}

absl::StatusOr<BeginLoadResult> RocksDbCore::BeginLoad(std::string_view tenant,
                                                       std::string_view kb_name,
                                                       std::string_view idempotency_key,
                                                       LoadMode mode,
                                                       std::optional<uint64_t> expected_entries) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb_name);
  if (!found.ok()) return found.status();
  if (idempotency_key.empty() || idempotency_key.size() > kMaxIdempotencyKey) {
    return absl::InvalidArgumentError(Message("idempotency_key of ", idempotency_key.size(),
                                              " bytes: 1 to ", kMaxIdempotencyKey));
  }
  if (mode != LoadMode::kAppend && mode != LoadMode::kReplace) {
    return absl::InvalidArgumentError(Message("mode ", static_cast<int>(mode), " is unknown"));
  }
  std::lock_guard write(write_mu_);
  std::vector<std::pair<absl::Time, std::string>> ended;  // and the keys of their rows
  {
    std::shared_lock lock(catalog_mu_);
    if ((*found)->deleted) {
      return absl::NotFoundError(Message("knowledge_base \"", kb_name, "\" is unknown"));
    }
    for (const auto& [key, load] : loads_) {
      if (load->kb != *found) continue;
      std::lock_guard l(load->mu);
      if (!load->open()) ended.emplace_back(load->info.ended_at, key);
    }
    for (const auto& [key, load] : loads_) {
      if (load->kb != *found) continue;
      if (load->info.idempotency_key != idempotency_key) continue;
      if (load->info.mode != mode) {
        return absl::FailedPreconditionError(Message("idempotency_key \"", idempotency_key,
                                                     "\" names load ", load->info.load_id,
                                                     ", which has another mode"));
      }
      return BeginLoadResult{SnapshotOf(*load), true};
    }
  }
  auto load = std::make_shared<Load>();
  load->kb = *found;
  LoadInfo& info = load->info;
  info.load_id = absl::StrFormat("load-%016x", next_id_++);
  info.knowledge_base = load->kb->spec.name;
  info.idempotency_key = idempotency_key;
  info.mode = mode;
  info.expected_entries = expected_entries;
  info.begun_at = absl::Now();
  info.ended_at = absl::InfiniteFuture();
  rocksdb::WriteBatch batch;
  if (mode == LoadMode::kAppend) {
    // From here on changes to the live version stand above what the load will hold.
    std::shared_ptr<Version> v = Published(*load->kb);
    if (absl::Status s = FreezeTop(v, false); !s.ok()) return s;
    std::shared_ptr<const Stack> stack = v->GetStack();
    for (size_t l = 0; l + 1 < stack->size(); ++l) load->below.push_back((*stack)[l]->id);
  }
  load->segment = NewSegment(&batch);
  PutLoadRow(*load, info, &batch);
  std::sort(ended.begin(), ended.end());
  ended.resize(ended.size() - std::min(ended.size(), kMaxEndedLoads));  // those to be forgotten
  for (const auto& [when, key] : ended) {
    batch.Delete(db_->family(kMetadata), "L" + key);
    batch.Delete(db_->family(kMetadata), "P" + key);
  }
  if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
  if (load->below.size() > options_.merge_above) {
    std::lock_guard work(work_mu_);
    merge_due_ = true;
    work_.notify_all();
  }
  std::unique_lock lock(catalog_mu_);
  for (const auto& [when, key] : ended) loads_.erase(key);
  loads_[load->kb->tenant_prefix + info.load_id] = load;
  return BeginLoadResult{info, false};
}

absl::StatusOr<PutResult> RocksDbCore::PutLoad(std::string_view tenant, std::string_view load_id,
                                               std::span<const NewEntry> entries, bool wait) {
  ReadyPut ready;
  if (absl::Status s = PreparePutLoad(tenant, load_id, entries, &ready); !s.ok()) return s;
  absl::StatusOr<PutResult> result = WritePutLoad(&ready);
  if (!result.ok() || !wait) return result;
  if (absl::Status s = db_->Sync(); !s.ok()) return s;
  return result;
}

absl::Status RocksDbCore::PreparePutLoad(std::string_view tenant, std::string_view load_id,
                                         std::span<const NewEntry> entries, ReadyPut* ready) {
  ready->core = weak_from_this();
  ready->begun = absl::Now();
  absl::StatusOr<std::shared_ptr<Load>> found = FindLoad(tenant, load_id);
  if (!found.ok()) return found.status();
  ready->load = *found;
  const Load& load = **found;
  const KnowledgeBase& kb = *load.kb;
  absl::StatusOr<Batch> batch = Prepare(kb, entries);
  if (!batch.ok()) return batch.status();
  ready->batch = *std::move(batch);
  const std::string prefix = kb.SegmentPrefix(load.segment->id);
  ready->row_keys.clear();
  for (uint32_t i : ready->batch.by_name) {
    ready->row_keys.push_back(prefix + ready->batch.entries[i].suffix);
  }
  ready->record_keys = RecordKeysOf(kb, ready->batch);
  // Where some records were not sent they must be there, so that it would be built in vain.
  ready->built =
      ready->build && load.all_new && ready->batch.records.size() == ready->record_keys.size();
  if (!ready->built) return absl::OkStatus();
  Change change;
  change.track = false;
  change.batch = std::move(ready->changes);
  change.batch.Clear();
  uint64_t ignored = 0;
  absl::Status put = PutEntries(kb, prefix, load.segment->id, ready->batch, ready->record_keys,
                                HeldBytes(ready->record_keys.size()),
                                std::vector<bool>(ready->batch.entries.size()), &change, &ignored);
  ready->changes = std::move(change.batch);
  return put;
}

absl::StatusOr<PutResult> RocksDbCore::WritePutLoad(ReadyPut* ready) {
  Load& load = *ready->load;
  const KnowledgeBase& kb = *load.kb;
  const Batch& batch = ready->batch;
  PutResult result;
  std::lock_guard write(write_mu_);
  LoadInfo info;
  {
    std::lock_guard lock(load.mu);
    info = load.info;
  }
  if (info.state != LoadState::kLoading) return WrongState(info, "put into");
  if (batch.entries.empty()) return result;
  Segment& segment = *load.segment;
  const std::string prefix = kb.SegmentPrefix(segment.id);
  // Entries the load has already are replaced.
  std::vector<std::optional<EntryRow>> old(batch.entries.size());
  bool all_new = true;
  const auto take = [&](size_t at, const rocksdb::PinnableSlice* value) -> absl::Status {
    if (value == nullptr) return absl::OkStatus();
    EntryRow& row = old[batch.by_name[at]].emplace();
    all_new = false;
    if (DecodeEntryRow(ToView(*value), &row)) return absl::OkStatus();
    return absl::DataLossError(Message("a malformed entry row in segment ", segment.id));
  };
  if (segment.rows) {
    if (absl::Status s = db_->GetEach(kEntries, ready->row_keys, take); !s.ok()) return s;
  }
  absl::StatusOr<HeldBytes> held = LookUpRecords(ready->record_keys);
  if (!held.ok()) return held.status();
  Change change(&scratch_);
  change.track = !all_new;
  for (const std::optional<uint64_t>& bytes : *held) all_new &= !bytes.has_value();
  std::vector<bool> replaced(old.size());
  for (size_t i = 0; i < old.size(); ++i) {
    const Prepared& p = batch.entries[i];
    if (old[i]) {
      replaced[i] = true;
      if (absl::Status s = RemoveRow(kb, prefix, segment.id, p.suffix, *old[i], false, &change);
          !s.ok()) {
        return s;
      }
    } else {
      ++info.entries;
      ++result.entries;
      auto bytes = batch.records.find(p.entry->record_id);
      if (bytes != batch.records.end()) info.bytes += bytes->second.size();
    }
  }
  rocksdb::WriteBatch* out = &change.batch;
  if (all_new && ready->built) {
    out = &ready->changes;
    result.new_records += ready->record_keys.size();
  } else {
    if (absl::Status s = PutEntries(kb, prefix, segment.id, batch, ready->record_keys, *held,
                                    replaced, &change, &result.new_records);
        !s.ok()) {
      return s;
    }
    if (absl::Status s = DropUnreferenced(kb, &change); !s.ok()) return s;
  }
  load.all_new = all_new;
  ByteWriter progress;
  progress.U64(info.entries);
  progress.U64(info.bytes);
  out->Put(db_->family(kMetadata), "P" + kb.tenant_prefix + info.load_id, progress.str());
  segment.rows = true;
  if (absl::Status s = db_->Write(out); !s.ok()) return s;
  std::lock_guard lock(load.mu);
  // The first batch, of a load that was resumed too, counts from its own beginning.
  if (load.rate.empty()) {
    load.rate.push_back({ready->begun, {load.info.entries, load.info.bytes}});
  }
  load.info.entries = info.entries;
  load.info.bytes = info.bytes;
  const absl::Time now = absl::Now();
  load.rate.push_back({now, {info.entries, info.bytes}});
  while (load.rate.size() > 2 && now - load.rate.front().first > kRateWindow) {
    load.rate.pop_front();
  }
  return result;
}

absl::StatusOr<DocumentPage> RocksDbCore::ListLoadedDocuments(std::string_view tenant,
                                                              std::string_view load_id,
                                                              uint32_t page_size,
                                                              std::string_view page_token) {
  absl::StatusOr<std::shared_ptr<Load>> load = FindLoad(tenant, load_id);
  if (!load.ok()) return load.status();
  {
    std::lock_guard lock((*load)->mu);
    if (!(*load)->open()) return WrongState((*load)->info, "listed");
  }
  Stack stack{(*load)->segment};
  Database::Snapshot snapshot(db_);
  return PageOf(*(*load)->kb, stack, snapshot.get(), page_size, page_token);
}

absl::StatusOr<LoadInfo> RocksDbCore::GetLoad(std::string_view tenant, std::string_view load_id) {
  absl::StatusOr<std::shared_ptr<Load>> load = FindLoad(tenant, load_id);
  if (!load.ok()) return load.status();
  return SnapshotOf(**load);
}

absl::StatusOr<std::vector<LoadInfo>> RocksDbCore::ListLoads(std::string_view tenant,
                                                             std::string_view kb) {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  std::shared_ptr<KnowledgeBase> only;
  if (!kb.empty()) {
    absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
    if (!found.ok()) return found.status();
    only = *std::move(found);
  }
  std::vector<LoadInfo> all;
  std::shared_lock lock(catalog_mu_);
  for (const auto& [key, load] : loads_) {
    if (load->kb->tenant == tenant && (only == nullptr || load->kb == only)) {
      all.push_back(SnapshotOf(*load));
    }
  }
  std::sort(all.begin(), all.end(), [](const LoadInfo& a, const LoadInfo& b) {
    return std::tie(a.begun_at, a.load_id) > std::tie(b.begun_at, b.load_id);
  });
  return all;
}

absl::StatusOr<LoadInfo> RocksDbCore::CommitLoad(std::string_view tenant,
                                                 std::string_view load_id) {
  absl::StatusOr<std::shared_ptr<Load>> found = FindLoad(tenant, load_id);
  if (!found.ok()) return found.status();
  Load& load = **found;
  {
    std::lock_guard write(write_mu_);
    LoadInfo info;
    {
      std::lock_guard lock(load.mu);
      info = load.info;
    }
    if (info.state == LoadState::kAborted) return WrongState(info, "committed");
    // A failed commit may be tried again: the load still holds everything.
    if (info.state == LoadState::kLoading || info.state == LoadState::kFailed) {
      info.state = LoadState::kIndexing;
      info.failure.clear();
      info.ended_at = absl::InfiniteFuture();
      rocksdb::WriteBatch batch;
      PutLoadRow(load, info, &batch);
      if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
      {
        std::lock_guard lock(load.mu);
        load.info = info;
      }
      std::lock_guard work(work_mu_);
      commits_.push_back(*found);
      work_.notify_all();
    }
  }
  return SnapshotOf(load);
}

absl::StatusOr<LoadInfo> RocksDbCore::AwaitLoad(std::string_view tenant, std::string_view load_id) {
  absl::StatusOr<std::shared_ptr<Load>> found = FindLoad(tenant, load_id);
  if (!found.ok()) return found.status();
  Load& load = **found;
  {
    std::unique_lock lock(load.mu);
    load.ended.wait(lock, [&] { return load.info.state != LoadState::kIndexing || stopping(); });
    if (load.info.state == LoadState::kIndexing) {
      return absl::UnavailableError(Message(
          "load_id ", load_id, ": the store shuts down; the commit goes on when it is back"));
    }
  }
  return SnapshotOf(load);
}

absl::StatusOr<LoadInfo> RocksDbCore::AbortLoad(std::string_view tenant, std::string_view load_id) {
  absl::StatusOr<std::shared_ptr<Load>> found = FindLoad(tenant, load_id);
  if (!found.ok()) return found.status();
  Load& load = **found;
  {
    std::lock_guard write(write_mu_);
    LoadInfo info;
    {
      std::lock_guard lock(load.mu);
      info = load.info;
    }
    if (info.state == LoadState::kCommitted) return WrongState(info, "aborted");
    if (info.state != LoadState::kAborted) {
      info.state = LoadState::kAborted;
      info.ended_at = absl::Now();
      rocksdb::WriteBatch batch;
      PutLoadRow(load, info, &batch);
      MarkGarbage(*load.kb, load.segment->id, &batch);
      if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
      load.cancelled = true;
      std::unique_lock catalog(catalog_mu_);
      std::lock_guard lock(load.mu);
      load.info = info;
      load.ended.notify_all();
      garbage_.emplace_back(load.kb, load.segment);
    }
  }
  WakeMaintenance();
  return SnapshotOf(load);
}

void RocksDbCore::CommitLoop() {
  while (true) {
    std::shared_ptr<Load> load;
    {
      std::unique_lock lock(work_mu_);
      work_.wait(lock, [this] { return !commits_.empty() || merge_due_ || stopping(); });
      if (stopping()) return;
      if (!commits_.empty()) {
        load = commits_.front();
        commits_.pop_front();
        merge_due_ = true;  // after it
      } else {
        merge_due_ = false;
      }
    }
    if (load == nullptr) {
      MergeAll();
      continue;
    }
    absl::Status status = CommitOne(load);
    {
      std::lock_guard lock(load->mu);
      load->building = nullptr;
    }
    // Stopped: it stays INDEXING and goes on at the next start.
    if (!status.ok() && !stopping()) FailLoad(load, status);
    {
      std::lock_guard lock(load->mu);
      load->ended.notify_all();
    }
    WakeMaintenance();
  }
}

void RocksDbCore::FailLoad(const std::shared_ptr<Load>& load, const absl::Status& why) {
  std::lock_guard write(write_mu_);
  LoadInfo info;
  {
    std::lock_guard lock(load->mu);
    if (load->info.state != LoadState::kIndexing) return;  // aborted meanwhile
    load->info.state = LoadState::kFailed;
    load->info.failure = why.ToString();
    load->info.ended_at = absl::Now();
    info = load->info;
  }
  spdlog::warn("store: load {} failed: {}", info.load_id, info.failure);
  rocksdb::WriteBatch batch;
  PutLoadRow(*load, info, &batch);
  if (absl::Status s = WriteSynced(&batch); !s.ok()) {
    // The disk fails: at the next start the commit is tried again, which is as good.
    spdlog::warn("store: load {}: its failure is not recorded: {}", info.load_id, s.ToString());
  }
}

// The load's segment goes above what was live when it began and below what came since.
size_t RocksDbCore::InsertionPoint(const Load& load, const Stack& live) {
  size_t at = live.size();
  while (at > 0 &&
         std::find(load.below.begin(), load.below.end(), live[at - 1]->id) == load.below.end()) {
    --at;
  }
  return at;
}

Stack RocksDbCore::PlannedStack(const Load& load, const Stack& live) const {
  const size_t at = InsertionPoint(load, live);
  Stack planned(live.begin(), live.begin() + static_cast<ptrdiff_t>(at));
  planned.push_back(load.segment);
  planned.insert(planned.end(), live.begin() + static_cast<ptrdiff_t>(at), live.end());
  if (planned.back()->empty() && planned.back() != load.segment) planned.pop_back();
  return planned;
}

absl::StatusOr<RocksDbCore::Delta> RocksDbCore::DeltaOf(
    const KnowledgeBase& kb, const Stack& before, const Stack& after,
    std::span<const std::shared_ptr<Segment>> between, const rocksdb::Snapshot* snapshot) const {
  // Documents that any of them touches.
  std::set<std::string> documents;
  rocksdb::ReadOptions options;
  options.snapshot = snapshot;
  auto each_key = [&](Family family, const std::string& prefix,
                      const std::function<void(std::string_view)>& use) -> absl::Status {
    std::string end = PrefixEnd(prefix);
    rocksdb::Slice upper(end);
    rocksdb::ReadOptions bounded = options;
    bounded.iterate_upper_bound = &upper;
    auto it = db_->Iterate(family, bounded);
    for (it->Seek(prefix); it->Valid(); it->Next()) use(ToView(it->key()).substr(prefix.size()));
    return FromRocksDb(it->status(), "reading changes");
  };
  absl::Status status;
  for (const std::shared_ptr<Segment>& segment : between) {
    const std::string prefix = kb.SegmentPrefix(segment->id);
    status = each_key(kEntries, prefix, [&](std::string_view suffix) {
      if (suffix.size() >= 6) documents.emplace(DocumentKeyOf(suffix));
    });
    if (!status.ok()) return status;
    status =
        each_key(kDocuments, prefix + "d", [&](std::string_view key) { documents.emplace(key); });
    if (!status.ok()) return status;
    std::vector<std::string> records;
    status =
        each_key(kDocuments, prefix + "r", [&](std::string_view id) { records.emplace_back(id); });
    for (const std::string& id : records) {
      if (!status.ok()) return status;
      std::string held = kb.tenant_prefix + id;
      AppendBig64(&held, kb.id);
      status = each_key(kReferences, held, [&](std::string_view rest) {
        if (rest.size() >= 16 + 6) documents.emplace(DocumentKeyOf(rest.substr(16)));
      });
    }
  }
  if (!status.ok()) return status;

  Delta delta;
  std::set<RecordId> records;
  for (const std::string& key : documents) {
    using Named = std::map<std::string, SlotKey>;
    auto entries_of = [&](const Stack& stack) -> absl::StatusOr<Named> {
      Named named;
      StackIterator it(*db_, kb.prefix, stack, key, key, snapshot);
      for (; it.Valid(); it.Next()) {
        bool tombstone;
        SlotKey slot;
        if (!DecodeEntryRowHead(it.value(), &tombstone, &slot.record_id, &slot.embedding_hash)) {
          return absl::DataLossError("a malformed entry row");
        }
        named.emplace(it.suffix(), slot);
      }
      if (!it.status().ok()) return it.status();
      return named;
    };
    absl::StatusOr<Named> was = entries_of(before), is = entries_of(after);
    if (!was.ok()) return was.status();
    if (!is.ok()) return is.status();
    delta.entries += static_cast<int64_t>(is->size()) - static_cast<int64_t>(was->size());
    delta.documents += static_cast<int64_t>(!is->empty()) - static_cast<int64_t>(!was->empty());
    for (const auto& [suffix, slot] : *was) {
      auto same = is->find(suffix);
      if (same == is->end() || same->second != slot) records.insert(slot.record_id);
    }
    for (const auto& [suffix, slot] : *is) {
      auto same = was->find(suffix);
      if (same == was->end() || same->second != slot) records.insert(slot.record_id);
    }
  }
  delta.records.assign(records.begin(), records.end());
  delta.touched = documents.size();
  return delta;
}

// Reads the whole planned stack and builds an index of it.
absl::Status RocksDbCore::PlanFromScratch(const std::shared_ptr<Load>& load,
                                          const BaseIndex* previous,
                                          const std::shared_ptr<Database::Snapshot>& snapshot,
                                          Planned* planned) {
  const KnowledgeBase& kb = *load->kb;
  auto fraction = [&](double f) {
    std::lock_guard lock(load->mu);
    load->info.indexing_fraction = std::max(load->info.indexing_fraction, std::min(f, 0.999));
  };
  absl::StatusOr<Scanned> scanned =
      ScanStack(kb, planned->stack, snapshot->get(), &load->cancelled);
  if (!scanned.ok()) return scanned.status();
  fraction(1 - kIndexShare);
  absl::StatusOr<std::shared_ptr<const BaseIndex>> base = BuildBase(
      kb, std::move(scanned->keys), snapshot, previous,
      [&](double f) { fraction(1 - kIndexShare + kIndexShare * f); }, &load->cancelled);
  if (!base.ok()) return base.status();
  absl::StatusOr<std::string> row = SaveIndex(kb, planned->number, 0, **base);
  if (!row.ok()) return row.status();
  planned->counts = scanned->counts;
  planned->index = std::make_shared<VersionIndex>(*base);
  planned->index_row = *std::move(row);
  return absl::OkStatus();
}

absl::Status RocksDbCore::CommitOne(const std::shared_ptr<Load>& load) {
  const std::shared_ptr<KnowledgeBase>& kb = load->kb;
  const bool append = load->info.mode == LoadMode::kAppend;  // fixed at its creation
  if (append) {
    if (absl::Status s = MergeDownTo(kb, 3 * options_.merge_above, /*yield=*/false); !s.ok()) {
      return s;
    }
  }
  auto gone = [&]() -> absl::Status {  // write_mu_ held
    std::shared_lock lock(catalog_mu_);
    if (kb->deleted || load->cancelled) return absl::CancelledError("the load was aborted");
    return absl::OkStatus();
  };
  for (int round = 1;; ++round) {
    // Which segments: those of the live version, frozen, and the load's own.
    Planned planned;
    std::shared_ptr<const Stack> before;
    std::shared_ptr<Database::Snapshot> snapshot;
    std::shared_ptr<const BaseIndex> previous;
    {
      std::lock_guard write(write_mu_);
      if (absl::Status s = gone(); !s.ok()) return s;
      std::shared_ptr<Version> live = Published(*kb);
      if (append) {
        if (absl::Status s = FreezeTop(live, false); !s.ok()) return s;
        before = live->GetStack();
        planned.stack = PlannedStack(*load, *before);
        if (std::shared_ptr<VersionIndex> index = live->GetIndex()) {
          previous = index->base();
          // A load that is small beside the live version changes a copy of its index and is looked
          // at alone; one that would leave too much to the copy's tail makes a new base.
          uint64_t taken;
          {
            std::lock_guard lock(load->mu);
            taken = load->info.entries;
          }
          if (live->index_row && index->backlog() + taken <=
                                     std::max(options_.index.tail_max, index->base_size() / 64)) {
            planned.index = index->Clone();
            planned.counts = live->counts;
            planned.shares = live;
            planned.shared_row = *live->index_row;
            planned.index_row = SharedIndexRow(planned.shared_row, live->number);
          }
        }
      } else {
        planned.stack.push_back(load->segment);
      }
      snapshot = std::make_shared<Database::Snapshot>(db_);
      planned.number = kb->next_version;
      std::lock_guard lock(load->mu);
      load->building = std::make_shared<Stack>(planned.stack);
    }
    if (planned.shares != nullptr) {
      absl::StatusOr<Delta> delta =
          DeltaOf(*kb, *before, planned.stack, {&load->segment, 1}, snapshot->get());
      if (!delta.ok()) return delta.status();
      if (absl::Status s =
              Resync(*kb, planned.stack, delta->records, snapshot->get(), planned.index.get());
          !s.ok()) {
        return s;
      }
      planned.counts.entries += delta->entries;
      planned.counts.documents += delta->documents;
      planned.counts.records = planned.index->records();
    } else if (absl::Status s = PlanFromScratch(load, previous.get(), snapshot, &planned);
               !s.ok()) {
      return s;
    }
    absl::StatusOr<bool> published = PublishLoad(load, planned, round == kMaxRounds);
    if (planned.shares == nullptr && (!published.ok() || !*published)) {
      RemoveIndexFile(*kb, planned.index_row);
    }
    if (!published.ok()) return published.status();
    if (*published) return absl::OkStatus();
  }
}

// The switch. False: the live version moved on too far while the index was built; build again.
absl::StatusOr<bool> RocksDbCore::PublishLoad(const std::shared_ptr<Load>& load,
                                              const Planned& planned, bool must) {
  const std::shared_ptr<KnowledgeBase>& kb = load->kb;
  std::lock_guard write(write_mu_);
  {
    std::shared_lock lock(catalog_mu_);
    if (kb->deleted || load->cancelled) return absl::CancelledError("the load was aborted");
  }
  if (kb->next_version != planned.number) return false;
  std::shared_ptr<Version> live = Published(*kb);
  // Its file goes with its row, unless ours names it by then.
  if (planned.shares != nullptr &&
      (planned.shares != live || live->index_row != planned.shared_row)) {
    return false;
  }
  auto v = std::make_shared<Version>();
  v->kb = kb;
  v->number = planned.number;
  v->published_at = absl::Now();
  v->index = planned.index;
  v->index_row = planned.index_row;
  Counts counts = planned.counts;
  auto stack = std::make_shared<Stack>(planned.stack);
  rocksdb::WriteBatch batch;
  std::vector<RecordId> changed = planned.index->ChangedRecords();
  if (load->info.mode == LoadMode::kAppend) {
    // Changes made while the index was built are on top of what it was built from.
    Stack now = PlannedStack(*load, *live->GetStack());
    if (!IsPrefix(planned.stack, now)) return false;
    if (now.size() > planned.stack.size()) {
      Database::Snapshot snapshot(db_);
      absl::StatusOr<Delta> delta = DeltaOf(
          *kb, planned.stack, now, std::span(now).subspan(planned.stack.size()), snapshot.get());
      if (!delta.ok()) return delta.status();
      if (delta->touched > kMaxCarriedOver && !must) return false;
      if (absl::Status s = Resync(*kb, now, delta->records, snapshot.get(), v->index.get());
          !s.ok()) {
        return s;
      }
      counts.entries += delta->entries;
      counts.documents += delta->documents;
      counts.records = v->index->records();
      changed.insert(changed.end(), delta->records.begin(), delta->records.end());
      *stack = now;
    }
  }
  if (!changed.empty()) {
    v->sequence = 1;
    ByteWriter log;
    log.U32(static_cast<uint32_t>(changed.size()));
    for (const RecordId& id : changed) log.Bytes(id.view());
    std::string key = VersionKey('J', *kb, planned.number);
    AppendBig64(&key, 1);
    batch.Put(db_->family(kMetadata), key, log.str());
  }
  stack->push_back(NewSegment(&batch));
  v->stack = stack;
  v->counts = counts;
  LoadInfo info;
  {
    std::lock_guard lock(load->mu);
    info = load->info;
  }
  info.state = LoadState::kCommitted;
  info.version = planned.number;
  info.indexing_fraction = 1;
  info.ended_at = absl::Now();
  PutLoadRow(*load, info, &batch);
  PutVersionRow(*v, *stack, v->published_at, &batch);
  PutCountsRow(*v, counts, v->sequence, &batch);
  if (!planned.index_row.empty()) {
    batch.Put(db_->family(kMetadata), VersionKey('I', *kb, planned.number), planned.index_row);
  }
  PutKnowledgeBaseRow(*kb, planned.number, planned.number + 1, &batch);
  if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;

  std::unique_lock lock(catalog_mu_);
  kb->versions[planned.number] = v;
  kb->published = planned.number;
  kb->next_version = planned.number + 1;
  std::lock_guard load_lock(load->mu);
  load->info = info;
  load->rate = {};
  return true;
}

}  // namespace memory3
