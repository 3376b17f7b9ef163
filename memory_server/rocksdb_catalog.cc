// Aliases, versions, and what goes when nothing names it any more.
#include <rocksdb/write_batch.h>
#include <spdlog/spdlog.h>

#include <algorithm>

#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"
#include "memory_server/rocksdb_pin.h"

namespace memory3 {
namespace {

constexpr int kCollectRows =
    256;  // entries a garbage collection takes under the write lock at a time

bool Holds(const Stack& stack, uint64_t segment) {
  return std::any_of(stack.begin(), stack.end(), [&](const auto& s) { return s->id == segment; });
}

}  // namespace

absl::Status RocksDbCore::DeleteKnowledgeBase(std::string_view tenant, std::string_view name) {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  if (absl::Status s = CheckName("knowledge_base", name); !s.ok()) return s;
  const std::string key = TenantPrefix(tenant) + std::string(name);
  {
    std::lock_guard write(write_mu_);
    std::shared_ptr<KnowledgeBase> kb;
    std::map<uint64_t, std::shared_ptr<Segment>> segments;
    std::vector<std::string> aliases, loads, files;
    rocksdb::WriteBatch batch;
    {
      std::shared_lock lock(catalog_mu_);
      if (aliases_.count(key) != 0) {
        return absl::InvalidArgumentError(
            Message("knowledge_base \"", name, "\" is an alias; delete what it points at"));
      }
      auto it = kbs_.find(key);
      if (it == kbs_.end()) {
        return absl::NotFoundError(Message("knowledge_base \"", name, "\" is unknown"));
      }
      kb = it->second;
      for (const auto& [number, v] : kb->versions) {
        for (const auto& s : *v->GetStack()) segments[s->id] = s;
        files.push_back(IndexRow(*kb, number));
        for (char kind : {'V', 'C', 'I'}) {
          batch.Delete(db_->family(kMetadata), VersionKey(kind, *kb, number));
        }
        std::string log = VersionKey('J', *kb, number);
        batch.DeleteRange(db_->family(kMetadata), log, PrefixEnd(log));
      }
      for (const auto& [load_key, load] : loads_) {
        if (load->kb != kb) continue;
        loads.push_back(load_key);
        std::lock_guard l(load->mu);
        if (load->open()) segments[load->segment->id] = load->segment;
        batch.Delete(db_->family(kMetadata), "L" + load_key);
        batch.Delete(db_->family(kMetadata), "P" + load_key);
      }
      for (const auto& [alias, target] : aliases_) {
        if (alias.rfind(kb->tenant_prefix, 0) == 0 && target == name) aliases.push_back(alias);
      }
    }
    for (const std::string& alias : aliases) batch.Delete(db_->family(kMetadata), "A" + alias);
    for (const auto& [id, segment] : segments) MarkGarbage(*kb, id, &batch);
    batch.Delete(db_->family(kMetadata), "K" + key);
    batch.Delete(db_->family(kMetadata), "B" + kb->prefix);
    if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
    // Their rows are gone, so no version keeps a file.
    for (const std::string& row : files) RemoveIndexFile(*kb, row);

    std::unique_lock lock(catalog_mu_);
    kbs_.erase(key);
    for (const std::string& alias : aliases) aliases_.erase(alias);
    for (const std::string& load_key : loads) {
      std::shared_ptr<Load> load = loads_[load_key];
      load->cancelled = true;
      std::lock_guard l(load->mu);
      if (load->open()) {
        load->info.state = LoadState::kAborted;
        load->info.failure = "the knowledge base was deleted";
        load->info.ended_at = absl::Now();
      }
      load->ended.notify_all();
      loads_.erase(load_key);
    }
    kb->deleted = true;
    for (auto& [number, v] : kb->versions) {
      v->dropped = true;
      if (v->pins > 0) zombies_.push_back(v);
    }
    kb->versions.clear();  // they name it in turn
    for (auto& [id, segment] : segments) garbage_.emplace_back(kb, segment);
  }
  WakeMaintenance();
  return absl::OkStatus();
}

absl::StatusOr<std::string> RocksDbCore::SetAlias(std::string_view tenant, std::string_view alias,
                                                  std::string_view kb) {
  if (absl::Status s = CheckName("alias", alias); !s.ok()) return s;
  std::lock_guard write(write_mu_);
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> target = Resolve(tenant, kb);
  if (!target.ok()) return target.status();
  const std::string key = (*target)->tenant_prefix + std::string(alias);
  std::string previous;
  {
    std::shared_lock lock(catalog_mu_);
    if (kbs_.count(key) != 0) {
      return absl::AlreadyExistsError(Message("alias \"", alias, "\" is a knowledge base's name"));
    }
    if (auto it = aliases_.find(key); it != aliases_.end()) previous = it->second;
  }
  rocksdb::WriteBatch batch;
  batch.Put(db_->family(kMetadata), "A" + key, (*target)->spec.name);
  if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
  std::unique_lock lock(catalog_mu_);
  aliases_[key] = (*target)->spec.name;
  return previous;
}

absl::Status RocksDbCore::DeleteAlias(std::string_view tenant, std::string_view alias) {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  if (absl::Status s = CheckName("alias", alias); !s.ok()) return s;
  std::lock_guard write(write_mu_);
  const std::string key = TenantPrefix(tenant) + std::string(alias);
  {
    std::shared_lock lock(catalog_mu_);
    if (aliases_.count(key) == 0) {
      return absl::NotFoundError(Message("alias \"", alias, "\" is unknown"));
    }
  }
  rocksdb::WriteBatch batch;
  batch.Delete(db_->family(kMetadata), "A" + key);
  if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
  std::unique_lock lock(catalog_mu_);
  aliases_.erase(key);
  return absl::OkStatus();
}

absl::StatusOr<std::map<std::string, std::string>> RocksDbCore::ListAliases(
    std::string_view tenant) {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  const std::string prefix = TenantPrefix(tenant);
  std::map<std::string, std::string> all;
  std::shared_lock lock(catalog_mu_);
  for (auto it = aliases_.lower_bound(prefix);
       it != aliases_.end() && it->first.rfind(prefix, 0) == 0; ++it) {
    all[it->first.substr(prefix.size())] = it->second;
  }
  return all;
}

absl::StatusOr<std::vector<VersionInfo>> RocksDbCore::ListVersions(std::string_view tenant,
                                                                   std::string_view kb) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
  if (!found.ok()) return found.status();
  std::vector<VersionInfo> all;
  std::shared_lock lock(catalog_mu_);
  for (const auto& [number, v] : (*found)->versions) {
    std::lock_guard version_lock(v->mu);
    all.push_back({number, number == (*found)->published, v->counts.entries, v->counts.records,
                   v->published_at, v->pins.load(), static_cast<uint32_t>(v->stack->size())});
  }
  return all;
}

absl::Status RocksDbCore::FreezeTop(const std::shared_ptr<Version>& v, bool even_if_empty) {
  std::shared_ptr<const Stack> stack = v->GetStack();
  if (stack->back()->empty() && !even_if_empty) return absl::OkStatus();
  rocksdb::WriteBatch batch;
  auto next = std::make_shared<Stack>(*stack);
  next->push_back(NewSegment(&batch));
  PutVersionRow(*v, *next, v->published_at, &batch);
  if (absl::Status s = db_->Write(&batch); !s.ok()) return s;
  std::lock_guard lock(v->mu);
  v->stack = std::move(next);
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> RocksDbCore::Rollback(std::string_view tenant, std::string_view kb,
                                               std::optional<uint64_t> version) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
  if (!found.ok()) return found.status();
  KnowledgeBase& k = **found;
  auto choose = [&]() -> absl::StatusOr<std::shared_ptr<Version>> {
    std::shared_lock lock(catalog_mu_);
    if (k.deleted) return absl::NotFoundError(Message("knowledge_base \"", kb, "\" is unknown"));
    auto it = version ? k.versions.find(*version) : k.versions.find(k.published);
    if (!version) {
      if (it == k.versions.begin()) {
        return absl::NotFoundError(
            Message("knowledge_base \"", kb, "\" has no version below ", k.published));
      }
      --it;
    }
    if (it == k.versions.end()) {
      return absl::NotFoundError(Message("version ", *version, " of \"", kb, "\" is unknown"));
    }
    return it->second;
  };
  absl::StatusOr<std::shared_ptr<Version>> target = choose();
  if (!target.ok()) return target.status();
  // Readers must find an index when it is published, so it comes into memory first.
  const PinImpl keep(weak_from_this(), *target);
  if (absl::Status s = EnsureIndex(*target); !s.ok()) return s;
  {
    std::lock_guard write(write_mu_);
    if (absl::StatusOr<std::shared_ptr<Version>> again = choose();
        !again.ok() || *again != *target) {
      return absl::AbortedError(Message("the versions of \"", kb, "\" changed meanwhile"));
    }
    Version& v = **target;
    // Changes may go into its top segment only if no other version is built on that.
    const uint64_t top = v.GetStack()->back()->id;
    bool shared = false;
    {
      std::shared_lock lock(catalog_mu_);
      for (const auto& [number, other] : k.versions) {
        shared |= other != *target && Holds(*other->GetStack(), top);
      }
    }
    if (shared) {
      if (absl::Status s = FreezeTop(*target, true); !s.ok()) return s;
    }
    const absl::Time now = absl::Now();
    rocksdb::WriteBatch batch;
    PutKnowledgeBaseRow(k, v.number, k.next_version, &batch);
    PutVersionRow(v, *v.GetStack(), now, &batch);
    if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
    std::unique_lock lock(catalog_mu_);
    k.published = v.number;
    std::lock_guard version_lock(v.mu);
    v.published_at = now;
  }
  WakeMaintenance();
  return (*target)->number;
}

void RocksDbCore::MarkGarbage(const KnowledgeBase& kb, uint64_t segment,
                              rocksdb::WriteBatch* batch) const {
  std::string key = "G";
  AppendBig64(&key, segment);
  ByteWriter w;
  w.String(kb.tenant);
  w.U64(kb.id);
  batch->Put(db_->family(kMetadata), key, w.str());
}

void RocksDbCore::DropVersionRows(const std::shared_ptr<Version>& v,
                                  const std::vector<std::shared_ptr<Version>>& others,
                                  rocksdb::WriteBatch* batch,
                                  std::vector<std::shared_ptr<Segment>>* garbage) {
  for (char kind : {'V', 'C', 'I'}) {
    batch->Delete(db_->family(kMetadata), VersionKey(kind, *v->kb, v->number));
  }
  std::string log = VersionKey('J', *v->kb, v->number);
  batch->DeleteRange(db_->family(kMetadata), log, PrefixEnd(log));
  for (const auto& segment : *v->GetStack()) {
    bool used = std::any_of(others.begin(), others.end(), [&](const auto& other) {
      return Holds(*other->GetStack(), segment->id);
    });
    if (used) continue;
    MarkGarbage(*v->kb, segment->id, batch);
    garbage->push_back(segment);
  }
}

absl::Status RocksDbCore::DropVersion(std::string_view tenant, std::string_view kb,
                                      uint64_t version) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
  if (!found.ok()) return found.status();
  KnowledgeBase& k = **found;
  {
    std::lock_guard write(write_mu_);
    std::shared_ptr<Version> v;
    std::vector<std::shared_ptr<Version>> others;
    {
      std::shared_lock lock(catalog_mu_);
      auto it = k.versions.find(version);
      if (k.deleted || it == k.versions.end()) {
        return absl::NotFoundError(Message("version ", version, " of \"", kb, "\" is unknown"));
      }
      if (version == k.published) {
        return absl::FailedPreconditionError(
            Message("version ", version, " of \"", kb, "\" is published"));
      }
      v = it->second;
      for (const auto& [number, other] : k.versions) {
        if (number != version) others.push_back(other);
      }
    }
    rocksdb::WriteBatch batch;
    std::vector<std::shared_ptr<Segment>> garbage;
    const std::string file = IndexRow(k, version);
    DropVersionRows(v, others, &batch, &garbage);
    if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
    RemoveIndexFile(k, file);
    std::unique_lock lock(catalog_mu_);
    k.versions.erase(version);
    v->dropped = true;
    if (v->pins > 0) zombies_.push_back(v);
    for (auto& segment : garbage) garbage_.emplace_back(*found, std::move(segment));
  }
  WakeMaintenance();
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const VersionPin>> RocksDbCore::Pin(
    std::string_view tenant, std::string_view kb, std::optional<uint64_t> version) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
  if (!found.ok()) return found.status();
  std::shared_ptr<const PinImpl> pin;
  {
    std::shared_lock lock(catalog_mu_);
    auto it = (*found)->versions.find(version.value_or((*found)->published));
    if ((*found)->deleted || it == (*found)->versions.end()) {
      return absl::NotFoundError(
          Message("version ", version.value_or(0), " of \"", kb, "\" is unknown"));
    }
    pin = std::make_shared<PinImpl>(weak_from_this(), it->second);
  }
  if (absl::Status s = EnsureIndex(pin->pinned()); !s.ok()) return s;
  return pin;
}

void RocksDbCore::WakeMaintenance() {
  {
    std::lock_guard lock(work_mu_);
    maintenance_due_ = true;
  }
  work_.notify_all();
}

std::vector<std::pair<std::shared_ptr<KnowledgeBase>, std::shared_ptr<Segment>>>
RocksDbCore::CollectableSegments() {
  std::unique_lock lock(catalog_mu_);
  std::erase_if(zombies_, [](const auto& v) { return v->pins == 0; });
  std::vector<std::pair<std::shared_ptr<KnowledgeBase>, std::shared_ptr<Segment>>> ready;
  for (const auto& g : garbage_) {
    const uint64_t id = g.second->id;
    bool held = Holds(merging_, id) ||
                std::any_of(zombies_.begin(), zombies_.end(),
                            [&](const auto& v) { return Holds(*v->GetStack(), id); });
    for (const auto& [key, load] : loads_) {
      std::lock_guard l(load->mu);
      held |= load->building != nullptr && Holds(*load->building, id);
    }
    if (!held) ready.push_back(g);
  }
  return ready;
}

// Deletes a segment's entries and what only they held: in steps, each of which may be the last
// before a crash and may be taken again.
absl::Status RocksDbCore::CollectSegment(const KnowledgeBase& kb, uint64_t segment) {
  const std::string prefix = kb.SegmentPrefix(segment);
  const std::string end = PrefixEnd(prefix);
  std::string at = prefix;
  while (!stopping()) {
    std::lock_guard write(write_mu_);
    Change change;
    rocksdb::ReadOptions options;
    rocksdb::Slice upper(end);
    options.iterate_upper_bound = &upper;
    options.fill_cache = false;
    auto it = db_->Iterate(kEntries, options);
    int rows = 0;
    for (it->Seek(at); it->Valid() && rows < kCollectRows; it->Next(), ++rows) {
      EntryRow row;
      std::string_view suffix = ToView(it->key()).substr(prefix.size());
      if (suffix.size() < 6 || !DecodeEntryRow(ToView(it->value()), &row)) {
        return absl::DataLossError(Message("a malformed entry row in segment ", segment));
      }
      if (!row.tombstone) {
        change.RemoveReference(ReferenceKey(kb, row.record_id, row.embedding_hash, segment, suffix),
                               row.record_id, row.embedding_hash);
      }
      at = it->key().ToString() + '\0';
    }
    if (!it->status().ok()) return FromRocksDb(it->status(), "reading entries");
    const bool last = !it->Valid();
    it.reset();
    for (const std::string& key : change.removed_references) {
      change.batch.Delete(db_->family(kReferences), key);
    }
    if (absl::Status s = DropUnreferenced(kb, &change); !s.ok()) return s;
    if (last) {
      for (Family family : {kEntries, kTexts, kDocuments}) {
        change.batch.DeleteRange(db_->family(family), prefix, end);
      }
      std::string row = "G";
      AppendBig64(&row, segment);
      change.batch.Delete(db_->family(kMetadata), row);
    }
    if (absl::Status s = db_->Write(&change.batch); !s.ok()) return s;
    if (last) break;
  }
  return absl::OkStatus();
}

void RocksDbCore::MaintainLoop() {
  while (!stopping()) {
    {
      std::unique_lock lock(work_mu_);
      work_.wait(lock, [this] { return maintenance_due_ || stopping(); });
      maintenance_due_ = false;
    }
    for (const auto& [kb, segment] : CollectableSegments()) {
      if (stopping()) return;
      if (absl::Status s = CollectSegment(*kb, segment->id); !s.ok()) {
        spdlog::warn("store: collecting segment {}: {}", segment->id, s.ToString());
        continue;
      }
      if (stopping()) return;
      std::unique_lock lock(catalog_mu_);
      std::erase_if(garbage_, [&, s = segment](const auto& g) { return g.second == s; });
    }
    // Published indexes whose tail has grown are folded; unpublished ones nobody reads are let go.
    std::vector<std::shared_ptr<Version>> fold;
    {
      std::shared_lock lock(catalog_mu_);
      for (const auto& [key, kb] : kbs_) {
        for (const auto& [number, v] : kb->versions) {
          if (number == kb->published) {
            fold.push_back(v);
          } else if (v->pins == 0) {
            std::lock_guard version_lock(v->mu);
            v->index = nullptr;
          }
        }
      }
    }
    for (const auto& v : fold) {
      if (stopping()) return;
      if (absl::Status s = Fold(v); !s.ok()) {
        spdlog::warn("store: rebuilding the index of {} version {}: {}", v->kb->spec.name,
                     v->number, s.ToString());
      }
    }
  }
}

}  // namespace memory3
