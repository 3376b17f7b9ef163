// Merging a version's segments, so that many small loads do not leave every lookup as many segments
// to ask. A run of neighbouring frozen segments is copied into a new one, which then stands in
// their place; readers go on with what they have. docs/store.md has the rule.
//
// The new segment is garbage in the database from its first row to the batch that puts it in place:
// a crash in between leaves nothing. What it is copied from stays meanwhile, so every record and
// embedding it refers to does.
#include <rocksdb/write_batch.h>
#include <spdlog/spdlog.h>

#include <algorithm>

#include "memory_server/message.h"
#include "memory_server/rocksdb_change.h"
#include "memory_server/rocksdb_core.h"

namespace memory3 {
namespace {

constexpr size_t kBatchBytes = size_t{1} << 20;

// Where `run` stands in `stack`, whole and below its top.
std::optional<size_t> Find(const Stack& stack, const Stack& run) {
  auto at = std::search(stack.begin(), stack.end() - 1, run.begin(), run.end());
  if (at == stack.end() - 1) return std::nullopt;
  return static_cast<size_t>(at - stack.begin());
}

}  // namespace

std::vector<size_t> RocksDbCore::InsertionPoints(const KnowledgeBase& kb, const Stack& live) const {
  std::vector<size_t> points;
  std::shared_lock lock(catalog_mu_);
  for (const auto& [key, load] : loads_) {
    if (load->kb.get() != &kb) continue;
    std::lock_guard l(load->mu);
    if (load->info.mode == LoadMode::kAppend && load->open()) {
      points.push_back(InsertionPoint(*load, live));
    }
  }
  return points;
}

// Its rows and tombstones, or more than `limit`.
absl::StatusOr<size_t> RocksDbCore::CountSegment(const KnowledgeBase& kb, Segment* segment,
                                                 size_t limit) const {
  if (int64_t counted = segment->counted; counted >= 0) return static_cast<size_t>(counted);
  size_t n = 0;
  const std::string prefix = kb.SegmentPrefix(segment->id);
  const std::pair<Family, std::string> ranges[] = {
      {kEntries, prefix}, {kDocuments, prefix + "d"}, {kDocuments, prefix + "r"}};
  for (const auto& [family, begin] : ranges) {
    const std::string end = PrefixEnd(begin);
    rocksdb::Slice upper(end);
    rocksdb::ReadOptions options;
    options.iterate_upper_bound = &upper;
    options.fill_cache = false;
    auto it = db_->Iterate(family, options);
    for (it->Seek(begin); it->Valid(); it->Next()) {
      if (++n > limit) return n;
    }
    if (!it->status().ok()) return FromRocksDb(it->status(), "counting a segment");
  }
  segment->counted = static_cast<int64_t>(n);
  return n;
}

// The deepest segment that is at most twice what stands above it, and all of those: then what is
// left grows threefold from segment to segment, so that there are few, and what is copied grows by
// half each time, so that an entry is copied few times. nullopt: few enough, or none.
absl::StatusOr<std::optional<RocksDbCore::Merge>> RocksDbCore::PlanMerge(
    const std::shared_ptr<KnowledgeBase>& kb, size_t frozen) {
  std::shared_ptr<const Stack> stack;
  std::vector<size_t> points;
  {
    std::lock_guard write(write_mu_);
    {
      std::shared_lock lock(catalog_mu_);
      if (kb->deleted) return std::optional<Merge>();
    }
    stack = Published(*kb)->GetStack();
    points = InsertionPoints(*kb, *stack);
  }
  if (stack->size() - 1 <= frozen) return std::optional<Merge>();
  // No load may come to stand within what is merged.
  std::vector<size_t> bounds = points;
  bounds.push_back(0);
  bounds.push_back(stack->size() - 1);
  std::sort(bounds.begin(), bounds.end());
  for (size_t b = bounds.size() - 1; b-- > 0;) {
    const size_t begin = bounds[b];
    const size_t end = std::min(bounds[b + 1], stack->size() - 1);
    size_t above = 0, first = end;
    for (size_t l = end; l-- > begin;) {
      const size_t limit = l + 1 == end ? SIZE_MAX : 2 * above;
      absl::StatusOr<size_t> n = CountSegment(*kb, (*stack)[l].get(), limit);
      if (!n.ok()) return n.status();
      if (l + 1 < end && *n <= limit) first = l;
      above += *n;  // of a large one only what was counted: at least three times
                    // what was above
    }
    if (first == end) continue;
    Merge merge;
    merge.kb = kb;
    merge.run.assign(stack->begin() + static_cast<ptrdiff_t>(first),
                     stack->begin() + static_cast<ptrdiff_t>(end));
    merge.bottom = first == 0 && std::all_of(points.begin(), points.end(),
                                             [&](size_t point) { return point >= end; });
    return std::optional<Merge>(std::move(merge));
  }
  return std::optional<Merge>();
}

absl::StatusOr<bool> RocksDbCore::CopyRun(const Merge& merge, bool yield) {
  const KnowledgeBase& kb = *merge.kb;
  const std::string into = kb.SegmentPrefix(merge.into->id);
  rocksdb::WriteBatch batch;
  const auto write = [&](size_t above) -> absl::Status {
    if (batch.GetDataSize() <= above) return absl::OkStatus();
    absl::Status s = db_->Write(&batch);
    batch.Clear();
    return s;
  };
  const auto give_up = [&] {
    if (stopping()) return true;
    {
      std::shared_lock lock(catalog_mu_);
      if (kb.deleted) return true;
    }
    std::lock_guard work(work_mu_);
    return yield && !commits_.empty();
  };
  StackIterator it(*db_, kb.prefix, merge.run, "", "", nullptr,
                   /*fill_cache=*/false,
                   /*hidden_too=*/true);
  for (uint64_t rows = 0; it.Valid(); it.Next(), ++rows) {
    if (rows % 256 == 255 && give_up()) return false;
    const std::string suffix(it.suffix());
    using Hidden = StackIterator::Hidden;
    if (it.hidden() != Hidden::kNo) {
      // A document's tombstone hides what is below by itself. A record's hides only rows of that
      // record: what this row replaced below must stay replaced.
      if (!merge.bottom && it.hidden() != Hidden::kByDocument) {
        batch.Put(db_->family(kEntries), into + suffix, EncodeTombstoneRow());
        merge.into->rows = true;
      }
      continue;
    }
    EntryRow row;
    if (!DecodeEntryRow(it.value(), &row)) return absl::DataLossError("a malformed entry row");
    batch.Put(db_->family(kEntries), into + suffix, ToSlice(it.value()));
    batch.Put(db_->family(kReferences),
              ReferenceKey(kb, row.record_id, row.embedding_hash, merge.into->id, suffix), "");
    rocksdb::PinnableSlice text;
    absl::StatusOr<bool> has =
        db_->Get(kTexts, SegmentKey(kb.prefix, merge.run[it.layer()]->id, suffix), nullptr, &text);
    if (!has.ok()) return has.status();
    if (*has) batch.Put(db_->family(kTexts), into + suffix, text);
    for (const auto& [k, v] : row.metadata) {
      batch.Put(db_->family(kDocuments), PostingPrefix(kb.prefix, merge.into->id, k, v) + suffix,
                "");
    }
    merge.into->rows = true;
    if (absl::Status s = write(kBatchBytes); !s.ok()) return s;
  }
  if (!it.status().ok()) return it.status();
  for (const std::shared_ptr<Segment>& segment : merge.run) {
    if (merge.bottom) break;
    for (const char* kind : {"d", "r"}) {
      const std::string begin = kb.SegmentPrefix(segment->id) + kind;
      const std::string end = PrefixEnd(begin);
      rocksdb::Slice upper(end);
      rocksdb::ReadOptions options;
      options.iterate_upper_bound = &upper;
      options.fill_cache = false;
      auto tombstone = db_->Iterate(kDocuments, options);
      for (tombstone->Seek(begin); tombstone->Valid(); tombstone->Next()) {
        batch.Put(db_->family(kDocuments),
                  into + kind + std::string(ToView(tombstone->key()).substr(begin.size())), "");
        (*kind == 'd' ? merge.into->document_tombstones : merge.into->record_tombstones) = true;
        if (absl::Status s = write(kBatchBytes); !s.ok()) return s;
      }
      if (!tombstone->status().ok()) return FromRocksDb(tombstone->status(), "reading tombstones");
    }
  }
  if (absl::Status s = write(0); !s.ok()) return s;
  return true;
}

// False: the versions or loads changed so that it does not fit any more.
absl::StatusOr<bool> RocksDbCore::PublishMerge(const Merge& merge) {
  KnowledgeBase& kb = *merge.kb;
  {
    std::lock_guard write(write_mu_);
    std::vector<std::shared_ptr<Version>> others;
    {
      std::shared_lock lock(catalog_mu_);
      if (kb.deleted) return false;
      for (const auto& [number, v] : kb.versions) {
        if (number != kb.published) others.push_back(v);
      }
    }
    const std::shared_ptr<Version> live = Published(kb);
    const std::shared_ptr<const Stack> was = live->GetStack();
    const std::optional<size_t> at = Find(*was, merge.run);
    if (!at) return false;
    const size_t end = *at + merge.run.size();
    for (size_t point : InsertionPoints(kb, *was)) {
      if (point > *at && point < end) return false;
      if (merge.bottom && point <= *at) return false;
    }
    if (merge.bottom && *at != 0) return false;

    auto stack = std::make_shared<Stack>(was->begin(), was->begin() + static_cast<ptrdiff_t>(*at));
    stack->push_back(merge.into);
    stack->insert(stack->end(), was->begin() + static_cast<ptrdiff_t>(end), was->end());
    rocksdb::WriteBatch batch;
    PutVersionRow(*live, *stack, live->published_at, &batch);
    std::string garbage_row = "G";
    AppendBig64(&garbage_row, merge.into->id);
    batch.Delete(db_->family(kMetadata), garbage_row);
    std::vector<std::shared_ptr<Segment>> unused;
    for (const std::shared_ptr<Segment>& segment : merge.run) {
      const bool used = std::any_of(others.begin(), others.end(), [&](const auto& v) {
        const std::shared_ptr<const Stack> theirs = v->GetStack();
        return std::find(theirs->begin(), theirs->end(), segment) != theirs->end();
      });
      if (used) continue;
      MarkGarbage(kb, segment->id, &batch);
      unused.push_back(segment);
    }
    // Loads above the run stand above what takes its place.
    std::vector<std::shared_ptr<Load>> above;
    {
      std::shared_lock lock(catalog_mu_);
      for (const auto& [key, load] : loads_) {
        if (load->kb.get() != &kb) continue;
        LoadInfo info;
        {
          std::lock_guard l(load->mu);
          if (load->info.mode != LoadMode::kAppend || !load->open()) continue;
          info = load->info;
        }
        if (InsertionPoint(*load, *was) < end) continue;
        load->below.push_back(merge.into->id);
        PutLoadRow(*load, info, &batch);
        above.push_back(load);
      }
    }
    if (absl::Status s = WriteSynced(&batch); !s.ok()) {
      for (const std::shared_ptr<Load>& load : above) load->below.pop_back();
      return s;
    }
    std::unique_lock lock(catalog_mu_);
    for (const std::shared_ptr<Segment>& segment : unused) {
      garbage_.emplace_back(merge.kb, segment);
    }
    merging_.clear();
    std::lock_guard version_lock(live->mu);
    live->stack = std::move(stack);
  }
  WakeMaintenance();
  return true;
}

void RocksDbCore::AbandonMerge(const Merge& merge) {
  {
    std::unique_lock lock(catalog_mu_);
    merging_.clear();
    garbage_.emplace_back(merge.kb, merge.into);
  }
  WakeMaintenance();
}

absl::Status RocksDbCore::MergeDownTo(const std::shared_ptr<KnowledgeBase>& kb, size_t frozen,
                                      bool yield) {
  while (!stopping()) {
    absl::StatusOr<std::optional<Merge>> planned = PlanMerge(kb, frozen);
    if (!planned.ok()) return planned.status();
    if (!*planned) return absl::OkStatus();
    Merge& merge = **planned;
    {
      std::lock_guard write(write_mu_);
      rocksdb::WriteBatch batch;
      merge.into = NewSegment(&batch);
      MarkGarbage(*kb, merge.into->id, &batch);
      // What is to be copied is still the version's, and stays now.
      std::unique_lock lock(catalog_mu_);
      if (kb->deleted || !Find(*kb->versions.at(kb->published)->GetStack(), merge.run)) {
        continue;  // planned anew
      }
      if (absl::Status s = db_->Write(&batch); !s.ok()) return s;
      merging_ = merge.run;
    }
    absl::StatusOr<bool> done = CopyRun(merge, yield);
    if (done.ok() && *done) done = PublishMerge(merge);
    if (!done.ok() || !*done) AbandonMerge(merge);
    if (!done.ok()) return done.status();
    if (!*done) break;  // until something wakes it again
  }
  return absl::OkStatus();
}

void RocksDbCore::MergeAll() {
  std::vector<std::shared_ptr<KnowledgeBase>> kbs;
  {
    std::shared_lock lock(catalog_mu_);
    for (const auto& [key, kb] : kbs_) kbs.push_back(kb);
  }
  for (const std::shared_ptr<KnowledgeBase>& kb : kbs) {
    if (absl::Status s = MergeDownTo(kb, options_.merge_above, /*yield=*/true); !s.ok()) {
      spdlog::warn("store: merging segments of {}: {}", kb->spec.name, s.ToString());
    }
  }
}

}  // namespace memory3
