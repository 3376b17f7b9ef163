// Packed text as a run draws from it: windows of one length over all shards, each once an epoch, in
// an order that is a function of (seed, epoch).
//
// Thread-safety: one thread. Owns the shards.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/hash.h"
#include "trainer/token_shard.h"
#include "trainer/training_run.h"

namespace memory3 {

class TokenCorpus {
 public:
  // Directories of shards, or shards. FAILED_PRECONDITION: packed with another tokenizer (names the
  // shard); the errors of TokenShard::Open.
  static absl::StatusOr<std::unique_ptr<TokenCorpus>> Open(const std::vector<std::string>& inputs,
                                                           const Hash256& tokenizer);

  const std::vector<std::unique_ptr<TokenShard>>& shards() const { return shards_; }
  int64_t tokens() const;
  // Of the shards' headers: tells corpora apart.
  std::string digest() const;

 private:
  std::vector<std::unique_ptr<TokenShard>> shards_;
};

// A place in the corpus.
struct Window {
  int shard = 0;
  uint64_t first = 0;
};

class WindowOrder {
 public:
  // `shuffle` off: in the corpus's order, every epoch the same. INVALID_ARGUMENT: no shard has
  // `tokens` tokens.
  static absl::StatusOr<WindowOrder> Create(const TokenCorpus* corpus, int tokens, uint64_t seed,
                                            bool shuffle);
  int64_t windows() const { return static_cast<int64_t>(windows_.size()); }
  // Window number 0, 1, …; epoch after epoch.
  Window At(int64_t number);

 private:
  std::vector<Window> windows_;
  std::vector<uint32_t> order_;
  uint64_t seed_ = 0;
  bool shuffle_ = true;
  int64_t epoch_ = -1;  // of order_
};

// The sequence of one window.
TrainingSequence SequenceOf(const TokenCorpus& corpus, const Window& window, int tokens,
                            int32_t bos);

}  // namespace memory3
