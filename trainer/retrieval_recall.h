// How often retrieval finds the passage that answers a question: recall@k of an embedder (exact
// search by inner product) and of exact BM25, over the same store of references.
//
// Thread-safety: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "embedder/embedder.h"

namespace memory3 {

struct RetrievalSet {
  std::vector<std::string> references;  // all different
  std::vector<std::string> questions;
  std::vector<int> gold;  // per question: the reference that answers it
};

struct RetrievalSetOptions {
  int64_t max_questions = INT64_MAX;  // the first so many
  int64_t other_references = 20000;
  // Other references come from articles with id % modulus == remainder (modulus 0: from all).
  int64_t modulus = 10, remainder = 3;
  // Pieces of a paragraph, cut at sentence ends: about 128 tokens.
  int reference_bytes = 600;
};

// `questions`: a .jsonl with `question` and `passage` (shared data's qa/grounded-*). The store: the
// distinct passages, and other references taken from `articles`: of all pieces of their paragraphs
// that hold no passage and are part of none, those with the smallest hash. FAILED_PRECONDITION
// where the articles do not give enough.
absl::StatusOr<RetrievalSet> LoadRetrievalSet(const std::string& questions,
                                              const std::vector<std::string>& articles,
                                              const RetrievalSetOptions& options = {});

// The part of the questions whose gold reference is among the k best; a tie counts for it.
double Bm25Recall(const RetrievalSet& set, int k, double k1, double b);
absl::StatusOr<double> EmbedderRecall(const RetrievalSet& set, int k, const Embedder& embedder);

// Cuts a paragraph into pieces of at most `max_bytes` at sentence ends (a longer sentence stays
// whole). Views into `paragraph`.
std::vector<std::string_view> CutAtSentences(std::string_view paragraph, int max_bytes);

}  // namespace memory3
