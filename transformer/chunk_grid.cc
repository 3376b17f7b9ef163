#include "transformer/chunk_grid.h"

namespace memory3 {

int ChunkGrid::RetrievalOf(int token) const {
  const int prompt = prompt_retrievals();
  if (token == kBos) return prompt > 0 ? 0 : kNoRetrieval;
  if (token < n_) return token / chunk_;
  const int generated_chunk = (token - n_) / chunk_;
  return prompt - 1 + generated_chunk;  // kNoRetrieval where there is no prompt to inherit from
}

ChunkGrid::Range ChunkGrid::ReadersOf(int retrieval, int generated) const {
  const int prompt = prompt_retrievals();
  const int end = n_ + generated;
  if (retrieval < prompt - 1) return {retrieval * chunk_, chunk_};
  const int generated_chunk = retrieval - (prompt - 1);
  const int last = std::min(end, n_ + (generated_chunk + 1) * chunk_);
  const int first = retrieval < prompt ? retrieval * chunk_ : n_ + generated_chunk * chunk_;
  return {first, std::max(0, last - first)};
}

ChunkGrid::Range ChunkGrid::QueryOf(int retrieval) const {
  const int prompt = prompt_retrievals();
  if (retrieval < prompt) {
    const int first = retrieval * chunk_;
    if (first + chunk_ <= n_) return {first, chunk_};
    const int from = std::max(0, n_ - chunk_);
    return {from, n_ - from};
  }
  const int generated_chunk = retrieval - (prompt - 1);
  return {n_ + (generated_chunk - 1) * chunk_, chunk_};
}

}  // namespace memory3
