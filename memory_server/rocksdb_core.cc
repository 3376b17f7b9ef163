// Opening: the catalogue is read from the metadata family, indexes from their files.
#include "memory_server/rocksdb_core.h"

#include <spdlog/spdlog.h>
#include <sys/stat.h>

#include <filesystem>
#include <system_error>

#include "memory_server/message.h"

namespace memory3 {
namespace {

constexpr uint32_t kLayoutVersion = 1;

int64_t ToNanos(absl::Time t) { return absl::ToUnixNanos(t); }
absl::Time FromNanos(int64_t n) {
  return n == INT64_MAX ? absl::InfiniteFuture() : absl::FromUnixNanos(n);
}

absl::Status Malformed(std::string_view what) {
  return absl::DataLossError(Message("metadata: a malformed row of ", what));
}

constexpr int64_t kStandardVqBytes = 14;

// One full-length reference's record. `vq_bytes`: of a code by the knowledge base's codebook.
uint64_t BytesPerReference(const KnowledgeBaseSpec& spec, int64_t vq_bytes) {
  const Geometry& g = spec.geometry;
  uint64_t vectors = 2ull * g.memory_layers.size() * g.kv_heads * g.tokens_kept;
  uint64_t each = 0;
  switch (spec.codec) {
    case CodecId::kF32:
      each = 4ull * g.head_dim;
      break;
    case CodecId::kBF16:
      each = 2ull * g.head_dim;
      break;
    case CodecId::kInt8:
      each = static_cast<uint64_t>(MakeInt8Codec(static_cast<int>(g.head_dim))->bytes_per_vector());
      break;
    case CodecId::kVq:
      each = static_cast<uint64_t>(vq_bytes);
      break;
  }
  return kRecordHeaderBytes + vectors * each;
}

}  // namespace

absl::StatusOr<std::shared_ptr<RocksDbCore>> RocksDbCore::Open(const std::string& directory,
                                                               const RocksDbStoreOptions& options) {
  std::error_code error;
  std::filesystem::create_directories(directory + "/index", error);
  if (error) {
    return absl::UnavailableError(Message("making ", directory, ": ", error.message()));
  }
  std::shared_ptr<RocksDbCore> core(new RocksDbCore);
  core->options_ = options;
  core->directory_ = directory;
  absl::StatusOr<std::shared_ptr<Database>> db = Database::Open(directory + "/db", options);
  if (!db.ok()) return db.status();
  core->db_ = *std::move(db);
  if (absl::Status s = core->LoadCatalog(); !s.ok()) return s;
  for (auto& [key, kb] : core->kbs_) {
    if (absl::Status s = core->EnsureIndex(kb->versions.at(kb->published)); !s.ok()) return s;
  }
  core->RemoveStaleIndexFiles();
  core->StartWorkers();
  return core;
}

RocksDbCore::~RocksDbCore() {
  Stop();
  // Versions and their knowledge base name each other.
  for (auto& [key, kb] : kbs_) kb->versions.clear();
}

void RocksDbCore::Stop() {
  stop_ = true;
  {
    std::shared_lock lock(catalog_mu_);
    for (auto& [key, load] : loads_) load->cancelled = true;
  }
  { std::lock_guard lock(work_mu_); }
  work_.notify_all();
  if (maintenance_thread_.joinable()) maintenance_thread_.join();
  if (commit_thread_.joinable()) commit_thread_.join();
  std::shared_lock lock(catalog_mu_);
  for (auto& [key, load] : loads_) {
    std::lock_guard l(load->mu);
    load->ended.notify_all();
  }
}

void RocksDbCore::StartWorkers() {
  maintenance_thread_ = std::thread([this] { MaintainLoop(); });
  commit_thread_ = std::thread([this] { CommitLoop(); });
}

void RocksDbCore::LoadSegmentFlags(const KnowledgeBase& kb, Segment* segment) {
  const std::string prefix = kb.SegmentPrefix(segment->id);
  auto any = [&](Family family, const std::string& begin) {
    rocksdb::ReadOptions options;
    std::string end = PrefixEnd(begin);
    rocksdb::Slice upper(end);
    options.iterate_upper_bound = &upper;
    auto it = db_->Iterate(family, options);
    it->Seek(begin);
    // A damaged block is no empty one: what is then looked for in it answers DATA_LOSS.
    return it->Valid() || !it->status().ok();
  };
  segment->rows = any(kEntries, prefix);
  segment->document_tombstones = any(kDocuments, prefix + "d");
  segment->record_tombstones = any(kDocuments, prefix + "r");
}

// Rows by kind: F layout, N next id, K knowledge base, B codebook, A alias, V version, C counts,
// I index file, J change log, L load, P load progress, G garbage segment, w write probe.
absl::Status RocksDbCore::LoadCatalog() {
  rocksdb::PinnableSlice value;
  absl::StatusOr<bool> found = db_->Get(kMetadata, "F", nullptr, &value);
  if (!found.ok()) return found.status();
  if (!*found) {
    ByteWriter w;
    w.U32(kLayoutVersion);
    rocksdb::WriteBatch batch;
    batch.Put(db_->family(kMetadata), "F", w.str());
    return WriteSynced(&batch);
  }
  if (uint32_t version = ByteReader(ToView(value)).U32(); version != kLayoutVersion) {
    return absl::UnimplementedError(
        Message("the store's layout is version ", version, ", this server reads ", kLayoutVersion));
  }

  std::map<uint64_t, std::shared_ptr<KnowledgeBase>> by_id;
  std::map<uint64_t, std::shared_ptr<Segment>> segments;
  auto segment = [&](uint64_t id) {
    auto& s = segments[id];
    if (!s) s = std::make_shared<Segment>(id);
    return s;
  };
  struct Row {
    std::string key, value;
  };
  std::map<char, std::vector<Row>> rows;
  auto it = db_->Iterate(kMetadata, rocksdb::ReadOptions());
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    char kind = it->key()[0];
    if (kind == 'J') {  // long; read with the index
      it->Seek("K");
      if (!it->Valid()) break;
      kind = it->key()[0];
    }
    rows[kind].push_back({it->key().ToString(), it->value().ToString()});
  }
  if (!it->status().ok()) return FromRocksDb(it->status(), "reading the metadata");

  for (const Row& r : rows['N']) next_id_ = ByteReader(r.value).U64();
  for (const Row& r : rows['K']) {
    auto kb = std::make_shared<KnowledgeBase>();
    ByteReader reader(r.value);
    kb->id = reader.U64();
    kb->published = reader.U64();
    kb->next_version = reader.U64();
    kb->created_at = FromNanos(reader.I64());
    kb->codebook_hash = reader.Hash();
    if (!ReadSpec(&reader, &kb->spec) || !reader.done()) return Malformed("a knowledge base");
    size_t tenant = static_cast<uint8_t>(r.key[1]);
    if (r.key.size() < 2 + tenant) return Malformed("a knowledge base");
    kb->tenant = r.key.substr(2, tenant);
    kb->tenant_prefix = TenantPrefix(kb->tenant);
    kb->prefix = kb->tenant_prefix;
    AppendBig64(&kb->prefix, kb->id);
    kb->bytes_per_reference = BytesPerReference(kb->spec, kStandardVqBytes);
    by_id[kb->id] = kb;
    kbs_[r.key.substr(1)] = kb;
  }
  for (const Row& r : rows['B']) {
    if (r.key.size() < 9) return Malformed("a codebook");
    auto kb = by_id.find(ReadBig64(r.key.data() + r.key.size() - 8));
    if (kb == by_id.end()) return Malformed("a codebook");
    // A damaged one is DATA_LOSS for who reads it; the knowledge base's records are still sound.
    if (absl::StatusOr<std::unique_ptr<Codec>> codec = MakeVqCodec(r.value); codec.ok()) {
      kb->second->bytes_per_reference =
          BytesPerReference(kb->second->spec, (*codec)->bytes_per_vector());
    }
  }
  for (const Row& r : rows['A']) aliases_[r.key.substr(1)] = r.value;
  // V and C keys end with kb id and version.
  auto version_of = [&](const Row& r) -> std::pair<std::shared_ptr<KnowledgeBase>, uint64_t> {
    if (r.key.size() < 18) return {};
    auto kb = by_id.find(ReadBig64(r.key.data() + r.key.size() - 16));
    if (kb == by_id.end()) return {};
    return {kb->second, ReadBig64(r.key.data() + r.key.size() - 8)};
  };
  for (const Row& r : rows['V']) {
    auto [kb, number] = version_of(r);
    if (!kb) return Malformed("a version");
    auto v = std::make_shared<Version>();
    v->kb = kb;
    v->number = number;
    ByteReader reader(r.value);
    v->published_at = FromNanos(reader.I64());
    uint32_t n = reader.U32();
    auto stack = std::make_shared<Stack>();
    for (uint32_t i = 0; i < n && reader.ok(); ++i) stack->push_back(segment(reader.U64()));
    if (!reader.done() || stack->empty()) return Malformed("a version");
    for (auto& s : *stack) LoadSegmentFlags(*kb, s.get());
    v->stack = std::move(stack);
    kb->versions[number] = std::move(v);
  }
  for (const Row& r : rows['C']) {
    auto [kb, number] = version_of(r);
    if (!kb || kb->versions.count(number) == 0) return Malformed("counters");
    Version& v = *kb->versions[number];
    ByteReader reader(r.value);
    v.counts.entries = reader.U64();
    v.counts.records = reader.U64();
    v.counts.documents = reader.U64();
    v.sequence = reader.U64();
    if (!reader.done()) return Malformed("counters");
  }
  for (auto& [id, kb] : by_id) {
    if (kb->versions.count(kb->published) == 0) {
      return absl::DataLossError(Message("metadata: knowledge base ", kb->spec.name,
                                         " publishes version ", kb->published,
                                         ", which is not there"));
    }
  }
  for (const Row& r : rows['L']) {
    auto load = std::make_shared<Load>();
    ByteReader reader(r.value);
    auto kb = by_id.find(reader.U64());
    load->segment = segment(reader.U64());
    LoadInfo& info = load->info;
    info.load_id = reader.String();
    info.idempotency_key = reader.String();
    info.mode = static_cast<LoadMode>(reader.U8());
    info.state = static_cast<LoadState>(reader.U8());
    uint64_t expected = reader.U64();
    if (expected != UINT64_MAX) info.expected_entries = expected;
    info.failure = reader.String();
    info.version = reader.U64();
    info.begun_at = FromNanos(reader.I64());
    info.ended_at = FromNanos(reader.I64());
    uint32_t below = reader.U32();
    for (uint32_t i = 0; i < below && reader.ok(); ++i) load->below.push_back(reader.U64());
    if (!reader.done() || kb == by_id.end()) return Malformed("a load");
    load->kb = kb->second;
    info.knowledge_base = load->kb->spec.name;
    if (load->open()) LoadSegmentFlags(*load->kb, load->segment.get());
    if (info.state == LoadState::kIndexing) commits_.push_back(load);
    if (info.state == LoadState::kCommitted) info.indexing_fraction = 1;
    loads_[r.key.substr(1)] = std::move(load);
  }
  for (const Row& r : rows['P']) {
    auto load = loads_.find(r.key.substr(1));
    if (load == loads_.end()) return Malformed("load progress");
    ByteReader reader(r.value);
    load->second->info.entries = reader.U64();
    load->second->info.bytes = reader.U64();
  }
  for (const Row& r : rows['G']) {
    ByteReader reader(r.value);
    auto kb = std::make_shared<KnowledgeBase>();  // it may be deleted; its keys are all that counts
    kb->tenant = reader.String();
    kb->id = reader.U64();
    if (!reader.done() || r.key.size() != 9) return Malformed("garbage");
    kb->tenant_prefix = TenantPrefix(kb->tenant);
    kb->prefix = kb->tenant_prefix;
    AppendBig64(&kb->prefix, kb->id);
    garbage_.emplace_back(kb, segment(ReadBig64(r.key.data() + 1)));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<KnowledgeBase>> RocksDbCore::Resolve(std::string_view tenant,
                                                                    std::string_view kb) const {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  if (absl::Status s = CheckName("knowledge_base", kb); !s.ok()) return s;
  std::string key = TenantPrefix(tenant);
  const size_t tenant_bytes = key.size();
  key.append(kb);
  std::shared_lock lock(catalog_mu_);
  if (auto alias = aliases_.find(key); alias != aliases_.end()) {
    key.resize(tenant_bytes);
    key.append(alias->second);
  }
  auto it = kbs_.find(key);
  if (it == kbs_.end()) {
    return absl::NotFoundError(Message("knowledge_base \"", kb, "\" is unknown"));
  }
  return it->second;
}

std::shared_ptr<Version> RocksDbCore::Published(const KnowledgeBase& kb) const {
  std::shared_lock lock(catalog_mu_);
  return kb.versions.at(kb.published);
}

absl::StatusOr<std::shared_ptr<Version>> RocksDbCore::PublishedOf(std::string_view tenant,
                                                                  std::string_view kb) const {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
  if (!found.ok()) return found.status();
  std::shared_lock lock(catalog_mu_);
  if ((*found)->deleted) {
    return absl::NotFoundError(Message("knowledge_base \"", kb, "\" is unknown"));
  }
  return (*found)->versions.at((*found)->published);
}

std::string RocksDbCore::VersionKey(char kind, const KnowledgeBase& kb, uint64_t version) const {
  std::string key(1, kind);
  key.append(kb.prefix);
  AppendBig64(&key, version);
  return key;
}

std::shared_ptr<Segment> RocksDbCore::NewSegment(rocksdb::WriteBatch* batch) {
  auto segment = std::make_shared<Segment>(next_id_++);
  ByteWriter w;
  w.U64(next_id_);
  batch->Put(db_->family(kMetadata), "N", w.str());
  return segment;
}

void RocksDbCore::PutKnowledgeBaseRow(const KnowledgeBase& kb, uint64_t published,
                                      uint64_t next_version, rocksdb::WriteBatch* batch) const {
  ByteWriter w;
  w.U64(kb.id);
  w.U64(published);
  w.U64(next_version);
  w.I64(ToNanos(kb.created_at));
  w.Bytes(kb.codebook_hash.view());
  WriteSpec(kb.spec, &w);
  batch->Put(db_->family(kMetadata), "K" + kb.tenant_prefix + kb.spec.name, w.str());
}

void RocksDbCore::PutVersionRow(const Version& v, const Stack& stack, absl::Time published_at,
                                rocksdb::WriteBatch* batch) const {
  ByteWriter w;
  w.I64(ToNanos(published_at));
  w.U32(static_cast<uint32_t>(stack.size()));
  for (const auto& segment : stack) w.U64(segment->id);
  batch->Put(db_->family(kMetadata), VersionKey('V', *v.kb, v.number), w.str());
}

void RocksDbCore::PutCountsRow(const Version& v, const Counts& counts, uint64_t sequence,
                               rocksdb::WriteBatch* batch) const {
  ByteWriter w;
  w.U64(counts.entries);
  w.U64(counts.records);
  w.U64(counts.documents);
  w.U64(sequence);
  batch->Put(db_->family(kMetadata), VersionKey('C', *v.kb, v.number), w.str());
}

void RocksDbCore::PutLoadRow(const Load& load, const LoadInfo& info,
                             rocksdb::WriteBatch* batch) const {
  ByteWriter w;
  w.U64(load.kb->id);
  w.U64(load.segment->id);
  w.String(info.load_id);
  w.String(info.idempotency_key);
  w.U8(static_cast<uint8_t>(info.mode));
  w.U8(static_cast<uint8_t>(info.state));
  w.U64(info.expected_entries.value_or(UINT64_MAX));
  w.String(info.failure);
  w.U64(info.version);
  w.I64(ToNanos(info.begun_at));
  w.I64(info.ended_at == absl::InfiniteFuture() ? INT64_MAX : ToNanos(info.ended_at));
  w.U32(static_cast<uint32_t>(load.below.size()));
  for (uint64_t id : load.below) w.U64(id);
  batch->Put(db_->family(kMetadata), "L" + load.kb->tenant_prefix + info.load_id, w.str());
}

absl::Status RocksDbCore::WriteSynced(rocksdb::WriteBatch* batch) {
  if (absl::Status s = db_->Write(batch); !s.ok()) return s;
  return db_->Sync();
}

KnowledgeBaseInfo RocksDbCore::InfoOf(const KnowledgeBase& kb) const {
  KnowledgeBaseInfo info;
  info.spec = kb.spec;
  info.codebook_hash = kb.codebook_hash;
  info.version = kb.published;
  info.bytes_per_reference = kb.bytes_per_reference;
  info.created_at = kb.created_at;
  if (auto it = kb.versions.find(kb.published); it != kb.versions.end()) {
    std::lock_guard lock(it->second->mu);
    info.entries = it->second->counts.entries;
    info.records = it->second->counts.records;
    info.documents = it->second->counts.documents;
    info.published_at = it->second->published_at;
    if (it->second->index) info.index = it->second->index->description();
  }
  for (auto it = aliases_.lower_bound(kb.tenant_prefix);
       it != aliases_.end() && it->first.rfind(kb.tenant_prefix, 0) == 0; ++it) {
    if (it->second == kb.spec.name)
      info.aliases.push_back(it->first.substr(kb.tenant_prefix.size()));
  }
  return info;
}

absl::StatusOr<KnowledgeBaseInfo> RocksDbCore::CreateKnowledgeBase(std::string_view tenant,
                                                                   const KnowledgeBaseSpec& spec,
                                                                   bool if_not_exists) {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  if (absl::Status s = CheckSpec(spec); !s.ok()) return s;
  int64_t vq_bytes = kStandardVqBytes;
  if (spec.codec == CodecId::kVq) {
    absl::StatusOr<std::unique_ptr<Codec>> codec =
        MakeCodec(spec.codec, static_cast<int>(spec.geometry.head_dim), spec.codebook);
    if (!codec.ok()) {
      return absl::InvalidArgumentError(Message("codebook: ", codec.status().message()));
    }
    vq_bytes = (*codec)->bytes_per_vector();
  }
  auto kb = std::make_shared<KnowledgeBase>();
  kb->tenant = tenant;
  kb->spec = spec;
  kb->spec.codebook.clear();
  if (!spec.codebook.empty()) kb->codebook_hash = Sha256Of(spec.codebook);
  kb->bytes_per_reference = BytesPerReference(spec, vq_bytes);
  if (kb->bytes_per_reference > kMaxRecordBytes) {
    return absl::InvalidArgumentError(Message("geometry asks for records of ",
                                              kb->bytes_per_reference, " bytes: at most ",
                                              kMaxRecordBytes));
  }
  kb->created_at = absl::Now();
  kb->tenant_prefix = TenantPrefix(tenant);
  const std::string key = kb->tenant_prefix + spec.name;

  std::lock_guard write(write_mu_);
  {
    std::shared_lock lock(catalog_mu_);
    if (auto it = kbs_.find(key); it != kbs_.end()) {
      const KnowledgeBase& there = *it->second;
      if (if_not_exists && there.spec == kb->spec && there.codebook_hash == kb->codebook_hash) {
        return InfoOf(there);
      }
      return absl::AlreadyExistsError(Message("knowledge base \"", spec.name, "\" exists",
                                              if_not_exists ? " with another spec" : ""));
    }
    if (aliases_.count(key) != 0) {
      return absl::AlreadyExistsError(Message("\"", spec.name, "\" is an alias"));
    }
  }
  kb->id = next_id_++;
  kb->prefix = kb->tenant_prefix;
  AppendBig64(&kb->prefix, kb->id);
  rocksdb::WriteBatch batch;
  auto v = std::make_shared<Version>();
  v->kb = kb;
  v->number = 1;
  v->published_at = kb->created_at;
  v->stack = std::make_shared<Stack>(Stack{NewSegment(&batch)});
  BaseIndex::BuildInput empty;
  empty.dimension = static_cast<int>(spec.embedding_dimension);
  empty.scan = [](std::span<const SlotKey>, const std::function<bool(size_t, const float*)>&) {
    return absl::OkStatus();
  };
  absl::StatusOr<std::shared_ptr<const BaseIndex>> base = BaseIndex::Build(std::move(empty));
  if (!base.ok()) return base.status();
  v->index = std::make_shared<VersionIndex>(*base);
  v->index_row = "";
  PutKnowledgeBaseRow(*kb, 1, 2, &batch);
  PutVersionRow(*v, *v->stack, v->published_at, &batch);
  PutCountsRow(*v, v->counts, 0, &batch);
  if (!spec.codebook.empty()) {
    batch.Put(db_->family(kMetadata), "B" + kb->prefix, spec.codebook);
  }
  if (absl::Status s = WriteSynced(&batch); !s.ok()) return s;
  std::unique_lock lock(catalog_mu_);
  kb->versions[1] = v;
  kb->published = 1;
  kb->next_version = 2;
  kbs_[key] = kb;
  return InfoOf(*kb);
}

absl::StatusOr<KnowledgeBaseInfo> RocksDbCore::GetKnowledgeBase(std::string_view tenant,
                                                                std::string_view kb,
                                                                bool with_codebook) {
  absl::StatusOr<std::shared_ptr<KnowledgeBase>> found = Resolve(tenant, kb);
  if (!found.ok()) return found.status();
  KnowledgeBaseInfo info;
  {
    std::shared_lock lock(catalog_mu_);
    info = InfoOf(**found);
  }
  if (with_codebook && !info.codebook_hash.is_zero()) {
    rocksdb::PinnableSlice value;
    absl::StatusOr<bool> has = db_->Get(kMetadata, "B" + (*found)->prefix, nullptr, &value);
    if (!has.ok()) return has.status();
    if (!*has || Sha256Of(ToView(value)) != info.codebook_hash) {
      return absl::DataLossError(Message("the codebook of \"", kb, "\" is missing or damaged"));
    }
    info.spec.codebook = value.ToString();
  }
  return info;
}

absl::StatusOr<std::vector<KnowledgeBaseInfo>> RocksDbCore::ListKnowledgeBases(
    std::string_view tenant) {
  if (absl::Status s = CheckTenant(tenant); !s.ok()) return s;
  const std::string prefix = TenantPrefix(tenant);
  std::vector<KnowledgeBaseInfo> all;
  std::shared_lock lock(catalog_mu_);
  for (auto it = kbs_.lower_bound(prefix); it != kbs_.end() && it->first.rfind(prefix, 0) == 0;
       ++it) {
    all.push_back(InfoOf(*it->second));
  }
  return all;
}

StoreStatus RocksDbCore::GetStatus() {
  StoreStatus status;
  status.writable = db_->writable();
  status.disk_bytes = db_->disk_bytes();
  std::shared_lock lock(catalog_mu_);
  status.knowledge_bases = kbs_.size();
  for (const auto& [key, kb] : kbs_) {
    for (const auto& [number, v] : kb->versions) {
      std::lock_guard version_lock(v->mu);
      if (number == kb->published) {
        status.entries += v->counts.entries;
        status.records += v->counts.records;
      }
      if (v->index) status.index_bytes += v->index->memory_bytes();
    }
  }
  return status;
}

}  // namespace memory3
