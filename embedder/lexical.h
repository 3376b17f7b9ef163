// The default embedder: bag of words, no neural weights.
//
// Terms of a text: its words (embedder/words.h) and its pairs of neighbouring words. A term's
// weight is tf · (k + 1) / (tf + k) · idf, tf its count in the text, k = 32; a pair's idf is a
// fifth of the smaller of its words' (so "of the" weighs nothing and "Bruce Lee" helps). Each term
// is spread over 16 of the 1,024 dimensions with random signs drawn from its hash, and the sum is
// brought to L2 norm 1. (One dimension a term, plain feature hashing (Weinberger et al. 2009),
// loses more than half of BM25's recall: a query is six words, and one collision with a rare word
// of a reference is worth a match. Sixteen make the error of a product Gaussian and small.
// docs/results/embedder.md)
//
// Hash: h = HashWord(word) for a word, MixHash(h1 · 0x9E3779B97F4A7C15 + h2) for a pair. The
// positions come 4 by 4 from r_j = MixHash(h + (j + 1) · 0x9E3779B97F4A7C15), j = 0 … 3: each 16
// bits of it, low ones first, give the dimension (low 10 bits) and the sign (top bit: minus).
//
// Thread-safety: as Embedder. Embed runs in the caller's thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "embedder/embedder.h"
#include "embedder/idf_table.h"

namespace memory3 {

class LexicalEmbedder : public Embedder {
 public:
  static constexpr int kDimension = 1024;

  // Reads directory/idf.bin.
  static absl::StatusOr<std::unique_ptr<LexicalEmbedder>> Load(const std::string& directory);
  explicit LexicalEmbedder(IdfTable idf);

  int dimension() const override { return kDimension; }
  const Hash256& fingerprint() const override { return fingerprint_; }
  absl::Status Embed(std::span<const std::string_view> texts, std::span<float> out) const override;

  const IdfTable& idf() const { return idf_; }

 private:
  IdfTable idf_;
  Hash256 fingerprint_;
};

}  // namespace memory3
