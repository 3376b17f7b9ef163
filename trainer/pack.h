// Documents → token shards, and documents → a tokenizer. What is held out never gets in.
//
// Thread-safety: functions; they use `threads` threads of their own.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "trainer/documents.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// Called now and then with what is done of `total`.
using ProgressFunction = std::function<void(int64_t done, int64_t total)>;

// "10:3": id % 10 == 3. INVALID_ARGUMENT names the flag. Empty: nothing is held out by id.
absl::StatusOr<HoldOut> ParseHoldOut(const std::string& ids,
                                     const std::vector<std::string>& titles);

// A uniform sample of lines, about `sample_bytes` of them, whatever the order of the documents.
// Empty and over-long (16 KiB) lines are left out.
absl::StatusOr<std::vector<std::string>> SampleLines(DocumentReader* reader,
                                                     const HoldOut& hold_out, int64_t sample_bytes,
                                                     const ProgressFunction& progress);

struct PackOptions {
  bool only_held_out = false;  // packs what is held out instead: for evaluation
  uint64_t shard_tokens = uint64_t{1} << 24;
  int threads = 1;
};
struct PackCounts {
  int64_t documents = 0, held_out = 0, tokens = 0, shards = 0;
};

// Writes DIRECTORY/shard-00000.m3s, …. A document is Encode(title, blank line, text) and eos where
// the tokenizer has one. ALREADY_EXISTS where the directory holds a shard; INVALID_ARGUMENT where
// no document is left.
absl::StatusOr<PackCounts> PackDocuments(DocumentReader* reader, const HoldOut& hold_out,
                                         const Tokenizer& tokenizer, const std::string& directory,
                                         const PackOptions& options,
                                         const ProgressFunction& progress);

// The shards of a directory (or one shard), in the order of their names.
absl::StatusOr<std::vector<std::string>> ShardPaths(const std::vector<std::string>& inputs);

}  // namespace memory3
