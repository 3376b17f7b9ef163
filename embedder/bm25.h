// Exact BM25 over an inverted index: what the embedders are measured against.
//
// score(q, d) = Σ over words w of q, each as often as q says it, of
//   ln(1 + (N - df + 0.5) / (df + 0.5)) · tf · (k1 + 1) / (tf + k1 · (1 - b + b · |d| / mean |d|))
// (Robertson and Zaragoza 2009, IDF in Lucene's form), words as embedder/words.h makes them.
//
// Thread-safety: Add belongs to one thread; const methods from any.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace memory3 {

class Bm25Index {
 public:
  explicit Bm25Index(double k1 = 1.2, double b = 0.75) : k1_(k1), b_(b) {}

  // Documents are numbered from 0 in the order they come.
  void Add(std::string_view text);
  // [documents]: the score of each.
  std::vector<float> Scores(std::string_view query) const;

 private:
  struct Posting {
    uint32_t document, count;
  };
  double k1_, b_;
  absl::flat_hash_map<uint64_t, std::vector<Posting>> postings_;  // by HashWord
  std::vector<uint32_t> lengths_;                                 // in words
  uint64_t total_length_ = 0;
};

}  // namespace memory3
