// References cut from packed text, and exact search over them: the offline retrieval of training
// and evaluation (explicit-memory.md, Training).
//
// Thread-safety: immutable once built; any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "embedder/embedder.h"
#include "trainer/corpus.h"
#include "trainer/pack.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// How much of `reference` stands in `text`: the longest common subsequence of the reference and a
// stretch of the text of at most twice its length, over the reference's length; the largest over
// all stretches (each begins at a multiple of half the reference's length).
double Overlap(std::span<const int32_t> reference, std::span<const int32_t> text);

class ReferenceIndex {
 public:
  struct Options {
    int reference_tokens = 128;
    int64_t most = 50000;  // a uniform sample where there are more; 4 KiB each
    uint64_t seed = 1;
  };
  // References are pieces of reference_tokens tokens of a document (the last one shorter, but at
  // least 16). All three must outlive the index. Errors: INVALID_ARGUMENT (no piece), the
  // embedder's.
  static absl::StatusOr<std::unique_ptr<ReferenceIndex>> Build(const TokenCorpus* corpus,
                                                               const Tokenizer* tokenizer,
                                                               const Embedder* embedder,
                                                               const Options& options,
                                                               const ProgressFunction& progress);

  int64_t size() const { return static_cast<int64_t>(places_.size()); }
  std::vector<int32_t> Tokens(int64_t reference) const;
  // Its document's id.
  std::string_view DocumentId(int64_t reference) const;

  // The `k` nearest to each query by cosine, best first; for a query without a word, none.
  absl::StatusOr<std::vector<std::vector<int>>> Search(std::span<const std::string> queries,
                                                       int k) const;

  // A random piece of the document around `window` that shares no token with it; empty: there is
  // none.
  std::vector<int32_t> FromSameDocument(const TokenCorpus& corpus, const Window& window, int tokens,
                                        uint64_t at, uint64_t random) const;

 private:
  struct Place {
    uint32_t shard;
    uint32_t tokens;
    uint64_t first;
  };
  const TokenCorpus* corpus_ = nullptr;
  const Embedder* embedder_ = nullptr;
  int32_t eos_ = -1;
  int reference_tokens_ = 0;
  std::vector<Place> places_;
  std::vector<float> vectors_;  // [places, dimension]
};

}  // namespace memory3
