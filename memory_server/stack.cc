#include "memory_server/stack.h"

#include <cstring>

#include "memory_server/message.h"

namespace memory3 {

std::string SegmentKey(std::string_view kb_prefix, uint64_t segment, std::string_view rest) {
  std::string key;
  key.reserve(kb_prefix.size() + 8 + rest.size());
  key.append(kb_prefix);
  AppendBig64(&key, segment);
  key.append(rest);
  return key;
}

std::string DocumentTombstoneKey(std::string_view kb_prefix, uint64_t segment,
                                 std::string_view document_key) {
  std::string key = SegmentKey(kb_prefix, segment, "d");
  key.append(document_key);
  return key;
}

std::string RecordTombstoneKey(std::string_view kb_prefix, uint64_t segment, const RecordId& id) {
  std::string key = SegmentKey(kb_prefix, segment, "r");
  key.append(id.view());
  return key;
}

std::string PostingPrefix(std::string_view kb_prefix, uint64_t segment, std::string_view key,
                          std::string_view value) {
  std::string posting = SegmentKey(kb_prefix, segment, "m");
  AppendDocumentKey(&posting, key);
  AppendDocumentKey(&posting, value);
  return posting;
}

absl::StatusOr<bool> HasTombstoneAbove(const Database& db, std::string_view kb_prefix,
                                       const Stack& stack, size_t layer,
                                       std::string_view document_key, const RecordId& id,
                                       const rocksdb::Snapshot* snapshot) {
  for (size_t l = layer + 1; l < stack.size(); ++l) {
    const Segment& s = *stack[l];
    if (s.document_tombstones) {
      absl::StatusOr<bool> has =
          db.Has(kDocuments, DocumentTombstoneKey(kb_prefix, s.id, document_key), snapshot);
      if (!has.ok() || *has) return has;
    }
    if (s.record_tombstones) {
      absl::StatusOr<bool> has =
          db.Has(kDocuments, RecordTombstoneKey(kb_prefix, s.id, id), snapshot);
      if (!has.ok() || *has) return has;
    }
  }
  return false;
}

absl::StatusOr<std::optional<FoundRow>> FindVisible(const Database& db, std::string_view kb_prefix,
                                                    const Stack& stack, size_t layers,
                                                    std::string_view suffix,
                                                    const rocksdb::Snapshot* snapshot) {
  for (size_t l = layers; l-- > 0;) {
    if (!stack[l]->rows) continue;
    rocksdb::PinnableSlice value;
    absl::StatusOr<bool> has =
        db.Get(kEntries, SegmentKey(kb_prefix, stack[l]->id, suffix), snapshot, &value);
    if (!has.ok()) return has.status();
    if (!*has) continue;
    FoundRow found;
    found.layer = l;
    if (!DecodeEntryRow(ToView(value), &found.row)) {
      return absl::DataLossError(Message("a malformed entry row in segment ", stack[l]->id));
    }
    if (found.row.tombstone) return std::nullopt;
    absl::StatusOr<bool> hidden = HasTombstoneAbove(db, kb_prefix, stack, l, DocumentKeyOf(suffix),
                                                    found.row.record_id, snapshot);
    if (!hidden.ok()) return hidden.status();
    if (*hidden) return std::nullopt;
    return found;
  }
  return std::nullopt;
}

absl::StatusOr<bool> AnyRowBelow(const Database& db, std::string_view kb_prefix, const Stack& stack,
                                 size_t layers, std::string_view suffix,
                                 const rocksdb::Snapshot* snapshot) {
  for (size_t l = layers; l-- > 0;) {
    if (!stack[l]->rows) continue;
    absl::StatusOr<bool> has =
        db.Has(kEntries, SegmentKey(kb_prefix, stack[l]->id, suffix), snapshot);
    if (!has.ok() || *has) return has;
  }
  return false;
}

StackIterator::StackIterator(const Database& db, std::string kb_prefix, const Stack& stack,
                             std::string_view begin, std::string_view within,
                             const rocksdb::Snapshot* snapshot, bool fill_cache, bool hidden_too)
    : db_(db),
      kb_prefix_(std::move(kb_prefix)),
      stack_(stack),
      snapshot_(snapshot),
      hidden_too_(hidden_too) {
  for (size_t l = 0; l < stack.size(); ++l) {
    if (!stack[l]->rows) continue;
    auto s = std::make_unique<Source>();
    s->layer = l;
    s->prefix = SegmentKey(kb_prefix_, stack[l]->id, "");
    s->upper = PrefixEnd(s->prefix + std::string(within));
    s->upper_slice = s->upper;
    rocksdb::ReadOptions options;
    options.snapshot = snapshot;
    options.iterate_upper_bound = &s->upper_slice;
    options.fill_cache = fill_cache;
    s->it = db.Iterate(kEntries, options);
    s->it->Seek(s->prefix + std::string(std::max(begin, within)));
    Load(s.get());
    sources_.push_back(std::move(s));
  }
  FindNext();
}

void StackIterator::Load(Source* s) {
  s->live = s->it->Valid();
  if (s->live) {
    s->suffix = ToView(s->it->key()).substr(s->prefix.size());
  } else if (!s->it->status().ok() && status_.ok()) {
    status_ = FromRocksDb(s->it->status(), "reading entries");
  }
}

void StackIterator::Seek(std::string_view suffix) {
  std::string target(suffix);
  for (auto& s : sources_) {
    if (!s->live || s->suffix >= target) continue;
    s->it->Seek(s->prefix + target);
    Load(s.get());
  }
  FindNext();
}

void StackIterator::Next() {
  AdvanceEqual();
  FindNext();
}

// Moves every source off the entry that suffix_ names.
void StackIterator::AdvanceEqual() {
  for (auto& s : sources_) {
    if (s->live && s->suffix == suffix_) {
      s->it->Next();
      Load(s.get());
    }
  }
}

std::string_view StackIterator::value() const { return ToView(current_->it->value()); }

void StackIterator::FindNext() {
  valid_ = false;
  while (status_.ok()) {
    current_ = nullptr;
    for (auto& s : sources_) {
      // Sources rise by layer: of equal suffixes the last, uppermost, wins.
      if (s->live && (current_ == nullptr || s->suffix <= current_->suffix)) current_ = s.get();
    }
    if (current_ == nullptr) return;
    suffix_.assign(current_->suffix);
    layer_ = current_->layer;
    bool tombstone = false;
    RecordId id;
    uint64_t hash = 0;
    if (suffix_.size() < 6 || !DecodeEntryRowHead(value(), &tombstone, &id, &hash)) {
      status_ =
          absl::DataLossError(Message("a malformed entry row in segment ", stack_[layer_]->id));
      return;
    }
    hidden_ = tombstone ? Hidden::kByTombstoneRow : Hidden::kNo;
    if (!tombstone) {
      std::string_view document = DocumentKeyOf(suffix_);
      if (tombstone_document_ != document) {
        tombstone_document_ = document;
        tombstone_layer_ = -1;
        for (size_t l = stack_.size(); l-- > 1 && tombstone_layer_ < 0;) {
          if (!stack_[l]->document_tombstones) continue;
          absl::StatusOr<bool> has = db_.Has(
              kDocuments, DocumentTombstoneKey(kb_prefix_, stack_[l]->id, document), snapshot_);
          if (!has.ok()) {
            status_ = has.status();
            return;
          }
          if (*has) tombstone_layer_ = static_cast<int64_t>(l);
        }
      }
      if (tombstone_layer_ > static_cast<int64_t>(layer_)) hidden_ = Hidden::kByDocument;
      for (size_t l = layer_ + 1; l < stack_.size() && hidden_ == Hidden::kNo; ++l) {
        if (!stack_[l]->record_tombstones) continue;
        absl::StatusOr<bool> has =
            db_.Has(kDocuments, RecordTombstoneKey(kb_prefix_, stack_[l]->id, id), snapshot_);
        if (!has.ok()) {
          status_ = has.status();
          return;
        }
        if (*has) hidden_ = Hidden::kByRecord;
      }
    }
    if (hidden_ == Hidden::kNo || hidden_too_) {
      valid_ = true;
      return;
    }
    AdvanceEqual();
  }
}

}  // namespace memory3
