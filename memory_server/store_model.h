// A plain model of one knowledge base, for tests: a version is the list of changes that led to it,
// replayed into a map; a load goes in where it was begun. The store must agree with it whatever
// happens.
//
// Thread-safety: none.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "memory_server/memory_store.h"

namespace memory3::store_testing {

inline constexpr uint32_t kModelDimension = 8;
inline constexpr const char* kModelKb = "kb";

using EntryName = std::pair<std::string, uint32_t>;  // document, ordinal
using ModelEntries = std::map<EntryName, uint64_t>;  // → number of the reference

// What is done to the knowledge base. One line of text each, so that another process can do it.
struct Operation {
  enum Kind {
    kPut,
    kDeleteDocuments,
    kDeleteRecords,
    kBeginLoad,
    kPutLoad,
    kCommitLoad,
    kAbortLoad,
    kRollback,
    kDropVersion,
  };
  Kind kind = kPut;
  std::vector<std::pair<EntryName, uint64_t>> entries;  // kPut, kPutLoad
  std::vector<std::string> documents;                   // kDeleteDocuments
  std::vector<uint64_t> numbers;                        // kDeleteRecords
  std::string key;                                      // loads: their idempotency key
  LoadMode mode = LoadMode::kAppend;
  uint64_t version = 0;  // kRollback, kDropVersion
  bool wait = true;      // of puts

  std::string ToLine() const;  // without line end
  static std::optional<Operation> FromLine(const std::string& line);
};

class StoreModel {
 public:
  struct Load {
    std::string key;
    LoadMode mode = LoadMode::kAppend;
    size_t at = 0;  // where in the live version's changes it goes in
    ModelEntries staged;
  };

  // `size`: of puts; larger ones make more of what a crash can hit.
  Operation Random(std::mt19937_64* random, int size);
  void Apply(const Operation& op);

  ModelEntries Live() const { return Replay(versions_.at(published_)); }
  // Where the store differs; "" where it does not. Looks at counts, documents, versions, open
  // loads, some records and retrievals; at all records and versions if `everything`.
  std::string Difference(MemoryStore* store, std::mt19937_64* random, bool everything) const;
  // After a crash of the store with `under_way` unanswered: it must hold what this model does, with
  // the operation or without; the model follows. "" or how it differs from both. Where nobody can
  // tell (what it did shows only once an open load is published: a deletion of what only the load
  // holds, another number for an entry staged already), the operation is done again, as a client
  // does that got no answer; all of them may be repeated.
  std::string Recover(MemoryStore* store, const std::optional<Operation>& under_way,
                      std::mt19937_64* random);
  bool replacing() const;
  uint64_t published() const { return published_; }

 private:
  struct Change {
    enum Kind { kPut, kDeleteDocument, kDeleteRecord, kPublished } kind = kPut;
    EntryName name;
    uint64_t number = 0;
  };
  static ModelEntries Replay(const std::vector<Change>& changes);
  std::string RetrieveDifference(MemoryStore* store, std::mt19937_64* random, uint64_t version,
                                 const ModelEntries& entries) const;

  std::map<uint64_t, std::vector<Change>> versions_{{1, {}}};
  uint64_t published_ = 1;
  uint64_t next_version_ = 2;
  std::vector<Load> loads_;
  int next_key_ = 0;
};

// Does it to a store. A put or delete that a REPLACE load forbids is FAILED_PRECONDITION.
absl::Status Execute(MemoryStore* store, const Operation& op);

}  // namespace memory3::store_testing
