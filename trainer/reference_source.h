// Documents as a stream of references ready to be written: read, cut and told apart by their
// records' ids in threads of their own, some way ahead of the one that takes them.
//
// A document whose id was met before is skipped and counted, so that what is written does not
// depend on which of the two comes last; so is one of whose id, title, uri or metadata the store
// would not take.
//
// Thread-safety: Next by one thread, counts from any. Owns its threads, which the destructor ends.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "memory/record.h"
#include "trainer/bounded_queue.h"
#include "trainer/documents.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// What the references of one document share.
struct DocumentHead {
  std::string id, title, uri;
  std::map<std::string, std::string> metadata;
};

struct ReferenceItem {
  std::shared_ptr<const DocumentHead> document;
  uint32_t ordinal = 0;
  uint64_t char_begin = 0, char_end = 0;  // code points of the document's text
  std::string text;                       // what was encoded: title, line feed, text
  std::vector<int32_t> token_ids;
  RecordId record_id;
  // The record needs no writing: an earlier item has it, or the store.
  bool has_record = false;
};

// The first sixteen bytes of an identity's SHA-256: enough to tell documents and records apart.
struct ShortHash {
  uint64_t low = 0, high = 0;
  static ShortHash Of(const Hash256& hash);
  static ShortHash OfText(std::string_view text) { return Of(Sha256Of(text)); }
  bool operator==(const ShortHash&) const = default;
  template <typename H>
  friend H AbslHashValue(H h, const ShortHash& v) {
    return H::combine(std::move(h), v.low, v.high);
  }
};

struct ReferenceSourceOptions {
  std::vector<std::string> inputs;
  DocumentOptions documents;
  int reference_tokens = 128;
  int shard = 0, shards = 1;  // every shards-th document, from number `shard`
  int threads = 1;            // that cut
  // What a record's id is made of.
  std::string tenant = "default";
  Hash256 writer_fingerprint;
  CodecId codec = CodecId::kF32;
  Hash256 codebook_hash;
  // Whether an item whose record an earlier item has is marked so.
  bool deduplicate = true;
  // How many references of a document the load holds already, from the first on; they are left out.
  absl::flat_hash_map<ShortHash, uint32_t> loaded;
  // Whether the store holds a record; from several threads at a time. Null: it is not asked.
  std::function<absl::StatusOr<bool>(const RecordId&)> store_has;
};

struct ReferenceCounts {
  int64_t bytes_read = 0, bytes_total = 0;  // of the files as they lie on disk
  int64_t documents = 0;                    // of this shard
  int64_t references = 0;                   // of them
  int64_t tokens = 0;
  int64_t loaded = 0;    // references left out because the load holds them
  int64_t in_run = 0;    // the rest: an earlier one has the record
  int64_t in_store = 0;  // the rest: the store has the record
  int64_t skipped = 0;   // documents, of all shards
};

class ReferenceSource {
 public:
  // `tokenizer` must outlive the source. Errors: DocumentReader::Open's.
  static absl::StatusOr<std::unique_ptr<ReferenceSource>> Open(const Tokenizer* tokenizer,
                                                               ReferenceSourceOptions options);
  ~ReferenceSource();

  // Replaces `items` by the next ones, in the documents' order, with at most `tokens` tokens to be
  // encoded (one item always fits) and at most `most` items. False: there are none left. Errors:
  // the reader's, the store's.
  absl::StatusOr<bool> Next(int64_t tokens, size_t most, std::vector<ReferenceItem>* items);

  ReferenceCounts counts() const;
  // "FILE:LINE: reason", the first 20.
  std::vector<std::string> warnings() const;

 private:
  struct Cut {  // a document of this shard
    Document document;
    std::vector<ReferenceItem> items;
    absl::Status status;
  };

  ReferenceSource(const Tokenizer* tokenizer, ReferenceSourceOptions options,
                  std::unique_ptr<DocumentReader> reader);
  void Run();
  absl::Status ReadAll();
  // Reads some documents of this shard; none at the end.
  absl::StatusOr<std::vector<Cut>> ReadSome();
  // Why no store takes the document; empty: it does.
  std::string Problem(const Document& document);
  void CutOne(Cut* cut) const;
  absl::Status AskStore(std::vector<ReferenceItem*>* items) const;
  void Warn(std::string warning);

  const Tokenizer* tokenizer_;
  const ReferenceSourceOptions options_;
  std::unique_ptr<DocumentReader> reader_;
  int64_t number_ = 0;  // of the next document, over all shards
  absl::flat_hash_set<ShortHash> documents_seen_, records_seen_;

  BoundedQueue<ReferenceItem> queue_;
  std::optional<ReferenceItem> next_;  // taken from the queue, not given yet

  mutable std::mutex mutex_;  // of the following three
  ReferenceCounts counts_;
  std::vector<std::string> warnings_;
  absl::Status status_;
  std::thread thread_;
};

// Calls work(0 … n-1) in up to `threads` threads, the caller's among them; returns when all are
// done.
void ParallelFor(int64_t n, int threads, const std::function<void(int64_t)>& work);

}  // namespace memory3
