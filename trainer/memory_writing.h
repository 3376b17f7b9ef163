// Documents → references → memories → a knowledge base, as one bulk load: what `trainer write` and
// `memory3 load` run.
//
//   read, cut, tell apart | encode        | compress, embed | upload
//   ReferenceSource       | MemoryWriter  | Codec, Embedder | LoadUpload
//
// run side by side with bounded queues between them (on a CPU device, encoding and compressing take
// turns on the same cores).
//
// Interruptions. The load's idempotency key is a hash of the input's bytes, the model and every
// option that changes what is written. The same call again, after either side was killed at any
// moment, finds the same load, asks which references of which documents it holds, writes the others
// and commits; the knowledge base then is the one an undisturbed call makes. A call after the
// commit does nothing and says so. While it runs, it outlives a server that goes away for up to
// `patience`.
//
// Shards. With shards > 1 a call writes its share of the documents into the load that the same call
// without shards would make, and does not commit. That call, made last, checks that everything is
// there, writes what is not, and commits.
//
// Thread-safety: one call at a time per WritingModel; in the device's thread, which also calls
// `progress`.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "embedder/embedder.h"
#include "memory/codec.h"
#include "memory_server/client.h"
#include "trainer/documents.h"
#include "trainer/reference_source.h"
#include "trainer/writing_model.h"

namespace memory3 {

struct MemoryWritingOptions {
  std::vector<std::string> inputs;  // documents.h
  DocumentOptions documents;

  std::string knowledge_base;
  std::string description;  // where it is made
  bool replace = false;     // else the references are added to what is there
  // Of records. Default: the knowledge base's; bf16 where it is made.
  std::optional<CodecId> codec;
  std::string codebook;  // the file's bytes, for vq. Default: the knowledge base's
  // Of the API key: part of a record's id.
  std::string tenant = "default";
  // Tells two loads of the same input apart: another label loads it again.
  std::string label;
  int shard = 0, shards = 1;

  // Asked before every batch and while the server builds the index. True: CANCELLED, nothing is
  // published that was not, and the same call goes on from there.
  std::function<bool()> cancelled = nullptr;
  int threads = 1;  // that cut and compress
  // Tokens encoded at once. Default: 0, 2,048 on a CPU, 16,384 elsewhere.
  int rows = 0;
  absl::Duration patience = absl::Seconds(120);
  // Sent before the server is asked whether it is synced (and after two seconds at most): what a
  // killed server may lose, and what is kept to be sent again.
  int64_t unacknowledged_bytes = int64_t{64} << 20;
};

struct MemoryWritingProgress {
  enum class Phase : uint8_t { kChecking, kWriting, kIndexing, kDone };
  Phase phase = Phase::kChecking;
  ReferenceCounts counts;    // what was read so far
  int64_t encoded = 0;       // references
  int64_t acknowledged = 0;  // entries that are synced on the server
  int64_t bytes_acknowledged = 0;
  double indexing_fraction = 0;  // 0 … 1
};
// Called before every batch, and every 200 ms while the server builds the index.
using MemoryWritingCallback = std::function<void(const MemoryWritingProgress&)>;

struct MemoryWritingResult {
  MemoryWritingProgress progress;
  // Of one copy each of what must be encoded: their records and all entries' texts and embeddings.
  int64_t record_bytes = 0, text_bytes = 0, embedding_bytes = 0;
  std::vector<std::string> warnings;  // "FILE:LINE: reason", the first 20; counts.skipped are all
  std::string load_id;
  bool resumed = false;        // the load was there
  bool committed = false;      // false: a shard's share is in the load
  bool nothing_to_do = false;  // the load had been committed before
  uint64_t version = 0;        // published, if committed
};

// `model` with its writer. Errors: INVALID_ARGUMENT (option, file and line at fault; no reference
// in the input), FAILED_PRECONDITION (the knowledge base is of another model, codec, codebook or
// embedder: says which), UNAVAILABLE (the server is not reached), the store's, the device's. After
// any of them the same call goes on.
absl::StatusOr<MemoryWritingResult> WriteMemories(const MemoryWritingOptions& options,
                                                  const WritingModel& model,
                                                  const Embedder& embedder, MemoryClient* client,
                                                  const MemoryWritingCallback& progress);

// What WriteMemories would read and send to an empty knowledge base, without a server or a writer:
// counts and bytes.
absl::StatusOr<MemoryWritingResult> CountMemories(const MemoryWritingOptions& options,
                                                  const WritingModel& model,
                                                  const Embedder& embedder,
                                                  const MemoryWritingCallback& progress);

}  // namespace memory3
