// The grid of retrievals (explicit-memory.md, Chunks and retrieval), as pure functions.
//
// Tokens are numbered without `<s>`: 0 … n-1 are the prompt's, n, n+1, … the generated ones; kBos
// stands for `<s>`. Retrievals are numbered 0, 1, … in the order of the tokens that read them: one
// per prompt chunk, then one per generated chunk but the first, which inherits the last prompt
// chunk's.
//
// Thread-safety: plain values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace memory3 {

class ChunkGrid {
 public:
  static constexpr int kBos = -1;
  static constexpr int kNoRetrieval = -1;

  // Tokens [first, first + tokens).
  struct Range {
    int first = 0;
    int tokens = 0;
    int end() const { return first + tokens; }
    bool operator==(const Range&) const = default;
  };

  // prompt_tokens >= 0, without `<s>`; chunk_tokens >= 1.
  ChunkGrid(int prompt_tokens, int chunk_tokens) : n_(prompt_tokens), chunk_(chunk_tokens) {}

  int prompt_tokens() const { return n_; }
  int chunk_tokens() const { return chunk_; }
  // Retrievals that the prompt makes: one for every chunk begun.
  int prompt_retrievals() const { return (n_ + chunk_ - 1) / chunk_; }
  // Retrievals of a sequence that generates `generated` tokens: none at the end of the last chunk.
  int Retrievals(int generated) const {
    return prompt_retrievals() + std::max(0, (generated + chunk_ - 1) / chunk_ - 1);
  }

  // The retrieval whose memories token `token` reads; kNoRetrieval: none (the first generated chunk
  // after an empty prompt has nothing to inherit). `<s>` reads what token 0 reads.
  int RetrievalOf(int token) const;
  // The tokens that read retrieval r's memories, `<s>` not counted, of a sequence that may generate
  // `generated` tokens: a prompt chunk, the last one with the generated chunk that inherits it, or
  // a generated chunk.
  Range ReadersOf(int retrieval, int generated) const;
  // The tokens whose text is retrieval r's query: a prompt chunk's own tokens, the last
  // chunk_tokens of the prompt where its last chunk is partial, or the generated chunk before.
  Range QueryOf(int retrieval) const;
  // Tokens (prompt and generated) that must be known before retrieval r may start. Its memories are
  // needed when token ReadersOf(r).first is fed; for a generated chunk that leaves it the step of
  // the last token of its query.
  int KnownTokensFor(int retrieval) const { return QueryOf(retrieval).end(); }

 private:
  int n_;
  int chunk_;
};

// The prompt's tokens without the `<s>` that they may begin with: it is fed once, by the layout.
inline std::span<const int32_t> WithoutBos(std::span<const int32_t> ids, int32_t bos) {
  return !ids.empty() && ids.front() == bos ? ids.subspan(1) : ids;
}

}  // namespace memory3
