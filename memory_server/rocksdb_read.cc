// Reads: one moment of the database and the index of one version, no locks held.
#include <algorithm>
#include <cmath>

#include "absl/strings/escaping.h"
#include "memory_server/dot.h"
#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"
#include "memory_server/rocksdb_pin.h"

namespace memory3 {
namespace {

constexpr uint32_t kDefaultPageSize = 100;
// A metadata filter that so few entries may match is answered by scoring them all; one that matches
// more, by searching and dropping what does not match, up to this many candidates.
constexpr size_t kSelective = 10000;
constexpr size_t kMaxFilteredSearch = 16384;
constexpr size_t kScoreBlock = 256;
// Queries that share a pass over the index.
constexpr size_t kTogether = 16;
// A search that met an entry younger than its view of the database looks again.
constexpr int kRetries = 3;

bool Matches(const EntryRow& row, const std::map<std::string, std::string>& metadata) {
  return std::all_of(metadata.begin(), metadata.end(), [&](const auto& pair) {
    auto it = row.metadata.find(pair.first);
    return it != row.metadata.end() && it->second == pair.second;
  });
}

Source ToSource(std::string_view suffix, EntryRow row) {
  Source s;
  ParseEntrySuffix(suffix, &s.document_id, &s.ordinal);
  s.title = std::move(row.title);
  s.uri = std::move(row.uri);
  s.char_begin = row.char_begin;
  s.char_end = row.char_end;
  s.metadata = std::move(row.metadata);
  return s;
}

bool HigherHit(const VersionIndex::Candidate& a, const VersionIndex::Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.key < b.key;
}

// Enough over top_k that quantisation, records with two embeddings and the like rarely need more.
VersionIndex::Lookup FirstLookup(const Query& query, const float* vector) {
  return {vector, 4 * size_t{query.top_k} + 64, {}, false};
}

}  // namespace

class RocksDbCore::ReaderImpl : public RecordReader {
 public:
  ReaderImpl(std::string tenant_prefix, std::shared_ptr<Database::Snapshot> snapshot)
      : tenant_prefix_(std::move(tenant_prefix)), snapshot_(std::move(snapshot)) {}

  std::vector<absl::StatusOr<RecordView>> Read(std::span<const RecordId> ids) const override {
    // The slice goes before what keeps its database open.
    struct Held {
      std::shared_ptr<Database::Snapshot> snapshot;
      rocksdb::PinnableSlice bytes;
    };
    const Database& db = *snapshot_->database();
    const size_t n = ids.size();
    std::vector<std::string> keys(n);
    std::vector<rocksdb::Slice> slices(n);
    for (size_t i = 0; i < n; ++i) {
      keys[i] = tenant_prefix_;
      keys[i].append(ids[i].view());
      slices[i] = keys[i];
    }
    std::vector<rocksdb::PinnableSlice> values(n);
    std::vector<rocksdb::Status> statuses(n);
    rocksdb::ReadOptions options;
    options.snapshot = snapshot_->get();
    db.db()->MultiGet(options, db.family(kRecords), n, slices.data(), values.data(),
                      statuses.data());
    std::vector<absl::StatusOr<RecordView>> out;
    out.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      if (statuses[i].IsNotFound()) {
        out.emplace_back(absl::NotFoundError(Message("record ", ids[i].ToHex(), " is unknown")));
        continue;
      }
      if (!statuses[i].ok()) {
        out.emplace_back(FromRocksDb(statuses[i], Message("record ", ids[i].ToHex())));
        continue;
      }
      auto held = std::make_shared<Held>();
      held->snapshot = snapshot_;
      held->bytes = std::move(values[i]);
      out.emplace_back(RecordView{ToView(held->bytes), held});
    }
    return out;
  }

 private:
  std::string tenant_prefix_;
  std::shared_ptr<Database::Snapshot> snapshot_;
};

absl::StatusOr<RocksDbCore::ReadView> RocksDbCore::MakeView(const std::shared_ptr<Version>& v) {
  ReadView view;
  view.kb = v->kb;
  while (view.index == nullptr) {  // it may be let go again in between
    if (absl::Status s = EnsureIndex(v); !s.ok()) return s;
    view.index = v->GetIndex();
  }
  Moment moment = MomentOf(*v);
  view.stack = std::move(moment.stack);
  view.snapshot = std::move(moment.snapshot);
  return view;
}

absl::StatusOr<std::vector<RocksDbCore::SourceRow>> RocksDbCore::SourcesOf(const ReadView& view,
                                                                           const RecordId& id,
                                                                           bool with_text) const {
  const KnowledgeBase& kb = *view.kb;
  const std::string held = RecordKey(kb, id);
  std::string begin = held;
  AppendBig64(&begin, kb.id);
  std::string end = PrefixEnd(begin);
  rocksdb::Slice upper(end);
  rocksdb::ReadOptions options;
  options.snapshot = view.snapshot->get();
  options.iterate_upper_bound = &upper;
  std::vector<SourceRow> sources;
  auto it = db_->Iterate(kReferences, options);
  for (it->Seek(begin); it->Valid(); it->Next()) {
    Reference r;
    if (!ParseReference(ToView(it->key()).substr(held.size()), &r)) {
      return absl::DataLossError(Message("a malformed reference to record ", id.ToHex()));
    }
    absl::StatusOr<std::optional<FoundRow>> found = FindVisible(
        *db_, kb.prefix, *view.stack, view.stack->size(), r.suffix, view.snapshot->get());
    if (!found.ok()) return found.status();
    if (!*found || (*view.stack)[(*found)->layer]->id != r.segment) continue;
    SourceRow row;
    row.embedding_hash = r.embedding_hash;
    row.record_bytes = (*found)->row.record_bytes;
    row.source = ToSource(r.suffix, std::move((*found)->row));
    if (with_text) {
      rocksdb::PinnableSlice text;
      absl::StatusOr<bool> has =
          db_->Get(kTexts, SegmentKey(kb.prefix, r.segment, r.suffix), view.snapshot->get(), &text);
      if (!has.ok()) return has.status();
      if (*has) row.source.text = text.ToString();
    }
    sources.push_back(std::move(row));
  }
  if (!it->status().ok()) return FromRocksDb(it->status(), "reading references");
  std::sort(sources.begin(), sources.end(), [](const SourceRow& a, const SourceRow& b) {
    return std::tie(a.source.document_id, a.source.ordinal) <
           std::tie(b.source.document_id, b.source.ordinal);
  });
  return sources;
}

absl::StatusOr<StoredRecord> RocksDbCore::GetRecord(std::string_view tenant, std::string_view kb,
                                                    const RecordId& id, bool with_text) {
  absl::StatusOr<std::shared_ptr<Version>> v = PublishedOf(tenant, kb);
  if (!v.ok()) return v.status();
  ReadView view;
  view.kb = (*v)->kb;
  Moment moment = MomentOf(**v);
  view.stack = std::move(moment.stack);
  view.snapshot = std::move(moment.snapshot);
  absl::StatusOr<std::vector<SourceRow>> sources = SourcesOf(view, id, with_text);
  if (!sources.ok()) return sources.status();
  if (sources->empty()) {
    return absl::NotFoundError(
        Message("record_id ", id.ToHex(), " is not in knowledge_base \"", kb, "\""));
  }
  StoredRecord stored;
  for (SourceRow& s : *sources) stored.sources.push_back(std::move(s.source));
  ReaderImpl reader(view.kb->tenant_prefix, view.snapshot);
  absl::StatusOr<RecordView> record = std::move(reader.Read({&id, 1})[0]);
  if (!record.ok()) return record.status();
  if (absl::StatusOr<RecordHeader> header = CheckRecord(record->bytes); !header.ok()) {
    return absl::DataLossError(
        Message("stored record ", id.ToHex(), ": ", header.status().message()));
  }
  stored.record = *std::move(record);
  return stored;
}

absl::StatusOr<Counts> RocksDbCore::Count(std::string_view tenant, std::string_view kb) {
  absl::StatusOr<std::shared_ptr<Version>> v = PublishedOf(tenant, kb);
  if (!v.ok()) return v.status();
  std::lock_guard lock((*v)->mu);
  return (*v)->counts;
}

absl::StatusOr<DocumentPage> RocksDbCore::PageOf(const KnowledgeBase& kb, const Stack& stack,
                                                 const rocksdb::Snapshot* snapshot,
                                                 uint32_t page_size,
                                                 std::string_view page_token) const {
  if (page_size > kMaxPageSize) {
    return absl::InvalidArgumentError(Message("page_size ", page_size, ": at most ", kMaxPageSize));
  }
  if (page_size == 0) page_size = kDefaultPageSize;
  std::string begin;
  if (!page_token.empty()) {
    std::string last;
    if (!absl::WebSafeBase64Unescape(absl::string_view(page_token.data(), page_token.size()),
                                     &last) ||
        last.empty()) {
      return absl::InvalidArgumentError("page_token is none that this call gave");
    }
    AppendDocumentKey(&begin, last);
    begin = PrefixEnd(begin);
  }
  DocumentPage page;
  StackIterator it(*db_, kb.prefix, stack, begin, "", snapshot);
  std::string document;
  for (; it.Valid(); it.Next()) {
    std::string_view key = DocumentKeyOf(it.suffix());
    if (key != document || page.documents.empty()) {
      if (page.documents.size() == page_size) {
        page.next_page_token = absl::WebSafeBase64Escape(page.documents.back().document_id);
        break;
      }
      document = key;
      EntryRow row;
      if (!DecodeEntryRow(it.value(), &row)) return absl::DataLossError("a malformed entry row");
      Source s = ToSource(it.suffix(), std::move(row));
      page.documents.push_back({s.document_id, s.title, s.uri, 0});
    }
    ++page.documents.back().entries;
  }
  if (!it.status().ok()) return it.status();
  return page;
}

absl::StatusOr<DocumentPage> RocksDbCore::ListDocuments(std::string_view tenant,
                                                        std::string_view kb, uint32_t page_size,
                                                        std::string_view page_token) {
  absl::StatusOr<std::shared_ptr<Version>> v = PublishedOf(tenant, kb);
  if (!v.ok()) return v.status();
  const Moment moment = MomentOf(**v);
  return PageOf(*(*v)->kb, *moment.stack, moment.snapshot->get(), page_size, page_token);
}

absl::StatusOr<RetrieveResult> RocksDbCore::Retrieve(const VersionPin& pin,
                                                     std::span<const Query> queries,
                                                     const RetrieveOptions& options) {
  const auto* mine = dynamic_cast<const PinImpl*>(&pin);
  if (mine == nullptr || !mine->OfCore(this)) {
    return absl::AbortedError("the pinned version ended with a restore; pin it anew");
  }
  const KnowledgeBaseSpec& spec = pin.spec();
  if (queries.size() > kMaxQueries) {
    return absl::ResourceExhaustedError(
        Message("queries: ", queries.size(), ", at most ", kMaxQueries));
  }
  std::vector<std::vector<float>> vectors;
  for (size_t i = 0; i < queries.size(); ++i) {
    const Query& q = queries[i];
    auto bad = [i](auto&&... parts) {
      return absl::InvalidArgumentError(Message("queries[", i, "].", parts...));
    };
    if (q.embedding.size() != spec.embedding_dimension) {
      return bad("embedding has ", q.embedding.size(), " numbers, embedding_dimension is ",
                 spec.embedding_dimension);
    }
    if (q.top_k == 0 || q.top_k > kMaxTopK) return bad("top_k is ", q.top_k, ": 1 to ", kMaxTopK);
    if (q.min_score && std::isnan(*q.min_score)) return bad("min_score is NaN");
    vectors.emplace_back(q.embedding.begin(), q.embedding.end());
    if (absl::Status s = NormaliseEmbedding(spec.metric, &vectors.back()); !s.ok()) {
      return bad("embedding: ", s.message());
    }
  }
  RetrieveResult result;
  for (int attempt = 1;; ++attempt) {
    absl::StatusOr<ReadView> view = MakeView(mine->pinned());
    if (!view.ok()) return view.status();
    view->look_again = attempt < kRetries;
    result.queries.clear();
    absl::Status status;
    for (size_t first = 0; first < queries.size() && status.ok(); first += kTogether) {
      status = RetrieveSome(*view, queries, vectors, first,
                            std::min(queries.size(), first + kTogether), options, &result.queries);
    }
    if (absl::IsAborted(status)) continue;
    if (!status.ok()) return status;
    result.records = std::make_shared<ReaderImpl>(view->kb->tenant_prefix, view->snapshot);
    return result;
  }
}

absl::Status RocksDbCore::RetrieveSome(const ReadView& view, std::span<const Query> queries,
                                       std::span<const std::vector<float>> vectors, size_t first,
                                       size_t last, const RetrieveOptions& options,
                                       std::vector<std::vector<Hit>>* hits) const {
  const auto check_time = [&](size_t done) {
    if (absl::Now() < options.deadline) return absl::OkStatus();
    return absl::DeadlineExceededError(Message("after ", done, " of ", queries.size(), " queries"));
  };
  if (absl::Status s = check_time(first); !s.ok()) return s;
  std::vector<VersionIndex::Lookup> lookups;  // of those that search the whole index
  for (size_t i = first; i < last; ++i) {
    if (queries[i].filter.empty()) lookups.push_back(FirstLookup(queries[i], vectors[i].data()));
  }
  view.index->Search(lookups);
  size_t searched = 0;
  for (size_t i = first; i < last; ++i) {
    if (absl::Status s = check_time(i); !s.ok()) return s;
    VersionIndex::Lookup* lookup = queries[i].filter.empty() ? &lookups[searched++] : nullptr;
    absl::StatusOr<std::vector<Hit>> found =
        RetrieveOne(view, queries[i], lookup, vectors[i].data(), options.with_text);
    if (!found.ok()) return found.status();
    hits->push_back(*std::move(found));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Hit>> RocksDbCore::RetrieveOne(const ReadView& view, const Query& query,
                                                          VersionIndex::Lookup* lookup,
                                                          const float* vector,
                                                          bool with_text) const {
  const uint32_t n = view.kb->spec.embedding_dimension;
  if (view.kb->spec.metric == Metric::kCosine &&
      std::all_of(vector, vector + n, [](float x) { return x == 0; })) {
    return std::vector<Hit>();  // it is like nothing
  }
  if (!query.filter.empty()) {
    absl::StatusOr<std::optional<std::vector<SlotKey>>> few =
        FilteredSlots(view, query.filter, kSelective);
    if (!few.ok()) return few.status();
    if (*few) return BestOf(view, query, vector, *std::move(*few), with_text);
  }
  VersionIndex::Lookup own = FirstLookup(query, vector);
  if (lookup == nullptr) view.index->Search({&own, 1});
  if (lookup != nullptr) own = std::move(*lookup);
  std::vector<Hit> hits;
  for (;;) {
    absl::StatusOr<bool> done = TakeFound(view, query, &own, with_text, &hits);
    if (!done.ok()) return done.status();
    if (*done) return hits;
    if (!query.filter.empty() && own.k > kMaxFilteredSearch) break;
    own.k *= 4;
    view.index->Search({&own, 1});
  }
  absl::StatusOr<std::optional<std::vector<SlotKey>>> all =
      FilteredSlots(view, query.filter, SIZE_MAX);
  if (!all.ok()) return all.status();
  return BestOf(view, query, vector, *std::move(*all), with_text);
}

// Exact scores in place of estimates, from the stored embeddings. What the view does not hold is
// left out.
absl::Status RocksDbCore::ScoreStored(const ReadView& view, const float* vector,
                                      std::vector<VersionIndex::Candidate>* candidates) const {
  const int n = static_cast<int>(view.kb->spec.embedding_dimension);
  std::vector<size_t> open;
  for (size_t i = 0; i < candidates->size(); ++i) {
    if (!(*candidates)[i].exact) open.push_back(i);
  }
  rocksdb::ReadOptions options;
  options.snapshot = view.snapshot->get();
  std::vector<float> stored(n);
  for (size_t first = 0; first < open.size(); first += kScoreBlock) {
    const size_t m = std::min(kScoreBlock, open.size() - first);
    std::vector<std::string> keys(m);
    std::vector<rocksdb::Slice> slices(m);
    for (size_t i = 0; i < m; ++i) {
      const SlotKey& key = (*candidates)[open[first + i]].key;
      keys[i] = EmbeddingKey(*view.kb, key.record_id, key.embedding_hash);
      slices[i] = keys[i];
    }
    std::vector<rocksdb::PinnableSlice> values(m);
    std::vector<rocksdb::Status> statuses(m);
    db_->db()->MultiGet(options, db_->family(kEmbeddings), m, slices.data(), values.data(),
                        statuses.data());
    for (size_t i = 0; i < m; ++i) {
      VersionIndex::Candidate& c = (*candidates)[open[first + i]];
      if (statuses[i].IsNotFound()) continue;
      if (!statuses[i].ok()) return FromRocksDb(statuses[i], "reading embeddings");
      if (values[i].size() != n * sizeof(float)) {
        return absl::DataLossError(
            Message("the embedding of record ", c.key.record_id.ToHex(), " is of another size"));
      }
      std::memcpy(stored.data(), values[i].data(), values[i].size());
      c.score = Dot(vector, stored.data(), n);
      c.exact = true;
    }
  }
  std::erase_if(*candidates, [](const VersionIndex::Candidate& c) { return !c.exact; });
  return absl::OkStatus();
}

// Turns candidates, best first, into hits. Answers whether top_k were found or min_score was
// reached.
absl::StatusOr<bool> RocksDbCore::TakeHits(const ReadView& view, const Query& query,
                                           const std::vector<VersionIndex::Candidate>& candidates,
                                           bool with_text, std::vector<Hit>* hits) const {
  hits->clear();
  const std::set<std::string> documents(query.filter.document_ids.begin(),
                                        query.filter.document_ids.end());
  absl::flat_hash_set<RecordId> taken;
  for (const VersionIndex::Candidate& c : candidates) {
    if (query.min_score && c.score < *query.min_score) return true;
    if (taken.contains(c.key.record_id)) continue;
    absl::StatusOr<std::vector<SourceRow>> sources = SourcesOf(view, c.key.record_id, with_text);
    if (!sources.ok()) return sources.status();
    bool matches = false, there = false;
    for (const SourceRow& s : *sources) {
      if (s.embedding_hash != c.key.embedding_hash) continue;
      there = true;
      matches |= (documents.empty() || documents.count(s.source.document_id) != 0) &&
                 std::all_of(query.filter.metadata.begin(), query.filter.metadata.end(),
                             [&](const auto& pair) {
                               auto it = s.source.metadata.find(pair.first);
                               return it != s.source.metadata.end() && it->second == pair.second;
                             });
    }
    if (!there && view.look_again) return absl::AbortedError("the index is ahead of the view");
    if (!matches) continue;
    taken.insert(c.key.record_id);
    Hit hit;
    hit.record_id = c.key.record_id;
    hit.score = c.score;
    hit.record_bytes = sources->front().record_bytes;
    for (SourceRow& s : *sources) hit.sources.push_back(std::move(s.source));
    hits->push_back(std::move(hit));
    if (hits->size() == query.top_k) return true;
  }
  return false;
}

// Answers whether a larger k would find nothing more that is wanted.
absl::StatusOr<bool> RocksDbCore::TakeFound(const ReadView& view, const Query& query,
                                            VersionIndex::Lookup* lookup, bool with_text,
                                            std::vector<Hit>* hits) const {
  std::vector<VersionIndex::Candidate> candidates = std::move(lookup->found);
  const size_t found = candidates.size();
  if (absl::Status s = ScoreStored(view, lookup->query, &candidates); !s.ok()) return s;
  if (candidates.size() < found && view.look_again) {
    return absl::AbortedError("the index is ahead of the view");
  }
  std::sort(candidates.begin(), candidates.end(), HigherHit);
  absl::StatusOr<bool> enough = TakeHits(view, query, candidates, with_text, hits);
  if (!enough.ok()) return enough.status();
  return lookup->all || *enough;
}

// The slots of the entries that match. nullopt: more than `limit` would have to be looked at.
absl::StatusOr<std::optional<std::vector<SlotKey>>> RocksDbCore::FilteredSlots(const ReadView& view,
                                                                               const Filter& filter,
                                                                               size_t limit) const {
  const KnowledgeBase& kb = *view.kb;
  const rocksdb::Snapshot* snapshot = view.snapshot->get();
  std::vector<SlotKey> slots;
  if (!filter.document_ids.empty()) {
    for (const std::string& id :
         std::set<std::string>(filter.document_ids.begin(), filter.document_ids.end())) {
      std::string key;
      AppendDocumentKey(&key, id);
      StackIterator it(*db_, kb.prefix, *view.stack, key, key, snapshot);
      for (; it.Valid(); it.Next()) {
        EntryRow row;
        if (!DecodeEntryRow(it.value(), &row)) return absl::DataLossError("a malformed entry row");
        if (Matches(row, filter.metadata)) slots.push_back({row.record_id, row.embedding_hash});
      }
      if (!it.status().ok()) return it.status();
    }
    return slots;
  }
  for (const auto& [name, value] : filter.metadata) {  // the first pair that is rare enough
    slots.clear();
    size_t seen = 0;
    for (size_t layer = 0; layer < view.stack->size() && seen <= limit; ++layer) {
      const uint64_t segment = (*view.stack)[layer]->id;
      const std::string prefix = PostingPrefix(kb.prefix, segment, name, value);
      std::string end = PrefixEnd(prefix);
      rocksdb::Slice upper(end);
      rocksdb::ReadOptions options;
      options.snapshot = snapshot;
      options.iterate_upper_bound = &upper;
      auto it = db_->Iterate(kDocuments, options);
      for (it->Seek(prefix); it->Valid() && ++seen <= limit; it->Next()) {
        std::string_view suffix = ToView(it->key()).substr(prefix.size());
        absl::StatusOr<std::optional<FoundRow>> row =
            FindVisible(*db_, kb.prefix, *view.stack, view.stack->size(), suffix, snapshot);
        if (!row.ok()) return row.status();
        if (*row && (*row)->layer == layer && Matches((*row)->row, filter.metadata)) {
          slots.push_back({(*row)->row.record_id, (*row)->row.embedding_hash});
        }
      }
      if (!it->status().ok()) return FromRocksDb(it->status(), "reading metadata postings");
    }
    if (seen <= limit) return slots;
  }
  return std::optional<std::vector<SlotKey>>();
}

absl::StatusOr<std::vector<Hit>> RocksDbCore::BestOf(const ReadView& view, const Query& query,
                                                     const float* vector,
                                                     std::vector<SlotKey> slots,
                                                     bool with_text) const {
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  std::vector<VersionIndex::Candidate> candidates;
  candidates.reserve(slots.size());
  for (const SlotKey& key : slots) candidates.push_back({key, 0, false});
  if (absl::Status s = ScoreStored(view, vector, &candidates); !s.ok()) return s;
  std::sort(candidates.begin(), candidates.end(), HigherHit);
  std::vector<Hit> hits;
  absl::StatusOr<bool> enough = TakeHits(view, query, candidates, with_text, &hits);
  if (!enough.ok()) return enough.status();
  return hits;
}

}  // namespace memory3
