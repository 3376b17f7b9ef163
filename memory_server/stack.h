// Segments and the stacks they make. A version of a knowledge base is a stack of segments: a row
// for (document, ordinal) in an upper segment hides those below; tombstones hide without replacing.
// A segment is frozen once another is put on it, so versions share segments and publishing copies
// nothing. docs/store.md has the rules.
//
// Thread-safety: a Stack is immutable; a StackIterator belongs to one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "memory_server/database.h"
#include "memory_server/encoding.h"

namespace memory3 {

struct Segment {
  explicit Segment(uint64_t segment_id) : id(segment_id) {}
  const uint64_t id;
  // Whether it may hold such rows; they only turn true. They save most lookups.
  std::atomic<bool> rows{false};
  std::atomic<bool> document_tombstones{false};
  std::atomic<bool> record_tombstones{false};
  // Rows and tombstones of a frozen segment, once counted; -1: not yet.
  std::atomic<int64_t> counted{-1};

  bool empty() const { return !rows && !document_tombstones && !record_tombstones; }
};

using Stack = std::vector<std::shared_ptr<Segment>>;  // bottom first

// Keys within a segment: kb prefix, segment id, what follows.
std::string SegmentKey(std::string_view kb_prefix, uint64_t segment, std::string_view rest);
// In kDocuments, after the segment: 'd' document key; 'r' record id; 'm' key, value, entry suffix.
std::string DocumentTombstoneKey(std::string_view kb_prefix, uint64_t segment,
                                 std::string_view document_key);
std::string RecordTombstoneKey(std::string_view kb_prefix, uint64_t segment, const RecordId& id);
// Keys of the postings of metadata key = value; the entry's suffix follows.
std::string PostingPrefix(std::string_view kb_prefix, uint64_t segment, std::string_view key,
                          std::string_view value);

// Whether a tombstone above `layer` hides the row of this document and record. `document_key` as in
// DocumentKeyOf.
absl::StatusOr<bool> HasTombstoneAbove(const Database& db, std::string_view kb_prefix,
                                       const Stack& stack, size_t layer,
                                       std::string_view document_key, const RecordId& id,
                                       const rocksdb::Snapshot* snapshot);

struct FoundRow {
  size_t layer = 0;
  EntryRow row;
};
// The visible row of one entry among the first `layers` segments seen through the whole stack, if
// any.
absl::StatusOr<std::optional<FoundRow>> FindVisible(const Database& db, std::string_view kb_prefix,
                                                    const Stack& stack, size_t layers,
                                                    std::string_view suffix,
                                                    const rocksdb::Snapshot* snapshot);
// Whether any of the first `layers` segments has a row or tombstone row for the entry.
absl::StatusOr<bool> AnyRowBelow(const Database& db, std::string_view kb_prefix, const Stack& stack,
                                 size_t layers, std::string_view suffix,
                                 const rocksdb::Snapshot* snapshot);

// Walks the visible entries of a stack in order of document and ordinal; `hidden_too`: every entry
// that any segment has a row for.
class StackIterator {
 public:
  enum class Hidden { kNo, kByTombstoneRow, kByDocument, kByRecord };

  // Entries whose suffix is >= `begin` and begins with `within` (a document key, or empty for all).
  StackIterator(const Database& db, std::string kb_prefix, const Stack& stack,
                std::string_view begin, std::string_view within, const rocksdb::Snapshot* snapshot,
                bool fill_cache = true, bool hidden_too = false);
  bool Valid() const { return valid_; }
  void Next();
  // Skips to the first entry whose suffix is >= `suffix`.
  void Seek(std::string_view suffix);
  std::string_view suffix() const { return suffix_; }
  std::string_view value() const;  // the encoded row
  size_t layer() const { return layer_; }
  Hidden hidden() const { return hidden_; }  // of the uppermost row
  const absl::Status& status() const { return status_; }

 private:
  struct Source {
    std::unique_ptr<rocksdb::Iterator> it;
    size_t layer;
    std::string prefix;
    std::string upper;
    rocksdb::Slice upper_slice;
    bool live = false;
    std::string_view suffix;
  };
  void Load(Source* s);
  void FindNext();  // from where the sources stand
  void AdvanceEqual();

  const Database& db_;
  std::string kb_prefix_;
  const Stack& stack_;
  const rocksdb::Snapshot* snapshot_;
  const bool hidden_too_;
  Hidden hidden_ = Hidden::kNo;
  std::vector<std::unique_ptr<Source>> sources_;  // by layer, rising
  Source* current_ = nullptr;
  bool valid_ = false;
  size_t layer_ = 0;
  std::string suffix_;
  std::string tombstone_document_;  // the document tombstone_layer_ is of
  int64_t tombstone_layer_ = -1;    // topmost segment with a tombstone of it
  absl::Status status_;
};

}  // namespace memory3
