// One change to a knowledge base while it is put together: the write batch, and what it does to
// rows, references and index, so that what will be visible after it is known before it is written.
//
// Thread-safety: one thread, under the store's write lock.
#pragma once

#include <rocksdb/write_batch.h>

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "memory_server/rocksdb_core.h"

namespace memory3 {

// In kReferences: tenant, record id, kb, embedding hash, segment, entry suffix. A record lives
// while there is a key that begins with its own.
std::string ReferenceKey(const KnowledgeBase& kb, const RecordId& id, uint64_t embedding_hash,
                         uint64_t segment, std::string_view suffix);
struct Reference {
  uint64_t kb = 0;
  uint64_t embedding_hash = 0;
  uint64_t segment = 0;
  std::string_view suffix;
};
// `rest`: a key without tenant and record id. False: malformed.
bool ParseReference(std::string_view rest, Reference* reference);

// The metadata row of a version that shares the index file of version `version`'s `row`.
std::string SharedIndexRow(std::string_view row, uint64_t version);
std::string RecordKey(const KnowledgeBase& kb, const RecordId& id);
std::string EmbeddingKey(const KnowledgeBase& kb, const RecordId& id, uint64_t hash);

struct RocksDbCore::Prepared {
  const NewEntry* entry = nullptr;
  std::string suffix;
  std::vector<float> embedding;  // normalised for cosine
  uint64_t hash = 0;
};

struct RocksDbCore::Batch {
  std::vector<Prepared> entries;             // the last of each name, in order of first mention
  std::vector<uint32_t> by_record, by_name;  // their positions, sorted
  absl::flat_hash_map<RecordId, std::string_view> records;  // bytes given
};

struct RocksDbCore::ReadyPut {
  std::weak_ptr<RocksDbCore> core;  // that made it ready
  std::shared_ptr<Load> load;
  absl::Time begun;
  Batch batch;
  std::vector<std::string> row_keys;     // by name
  std::vector<std::string> record_keys;  // as RecordKeysOf
  // True: build `changes`, too, all that is to be written where nothing of the batch is there yet.
  bool build = false;
  bool built = false;
  rocksdb::WriteBatch changes;  // its memory is used again
};

struct RocksDbCore::Change {
  Change() = default;
  // Borrows the memory of `scratch`: large batches would otherwise fault in new pages each time.
  explicit Change(rocksdb::WriteBatch* scratch) : batch(std::move(*scratch)), scratch_(scratch) {
    batch.Clear();
  }
  ~Change() {
    if (scratch_ != nullptr && batch.GetDataSize() <= kMaxScratch) *scratch_ = std::move(batch);
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;

  rocksdb::WriteBatch batch;
  // False: only the batch is wanted (a load's entries that replace nothing).
  bool track = true;
  // Of the top segment: rows put or turned into tombstones; rows taken away.
  absl::flat_hash_set<std::string> written_rows;
  absl::flat_hash_set<std::string> removed_rows;
  absl::flat_hash_set<std::string> document_tombstones;  // document keys
  absl::flat_hash_set<RecordId> record_tombstones;
  // Reference keys, and per record which embeddings this change adds.
  std::set<std::string> removed_references;
  std::set<std::string> added_references;
  absl::flat_hash_map<RecordId, std::set<uint64_t>> added;
  std::map<RecordId, std::set<uint64_t>> unreferenced;  // to be looked at: lost a reference
  absl::flat_hash_set<RecordId> new_records;            // had no reference before
  std::map<RecordId, bool>
      affected;  // whose visible entries change → nothing of it was there before
  absl::flat_hash_map<RecordId, std::map<uint64_t, const std::vector<float>*>> embeddings;
  int64_t entries = 0;  // counters
  int64_t documents = 0;
  bool writes_rows = false, writes_document_tombstones = false, writes_record_tombstones = false;

  void RemoveReference(std::string key, const RecordId& id, uint64_t hash) {
    added_references.erase(key);
    removed_references.insert(std::move(key));
    unreferenced[id].insert(hash);
  }
  void AddReference(std::string key, const RecordId& id, uint64_t hash) {
    removed_references.erase(key);
    added_references.insert(std::move(key));
    added[id].insert(hash);
  }

 private:
  static constexpr size_t kMaxScratch = size_t{16} << 20;
  rocksdb::WriteBatch* scratch_ = nullptr;
};

}  // namespace memory3
