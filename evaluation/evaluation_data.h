// What is asked and what is loaded for it: development questions, and the held-out documents that
// the answers stand in. Everything is read from the shared data (its README says what is held out).
//
// Wikipedia's held-out articles are loaded a paragraph a document, and so are SQuAD's paragraphs
// (of the articles' later versions), so that a filter on the paragraph of the answer is a retrieval
// that never errs.
//
// Thread-safety: functions and plain values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "trainer/qa_data.h"

namespace memory3 {

struct EvaluationDataOptions {
  std::string directory;  // the shared data
  int questions = 100;    // of each set, drawn at random
  int documents = 2000;   // in the knowledge base, those of the answers among them
  int title_words = 2;    // least n_title_words of grounded questions: the cleaner ones
  uint64_t seed = 1;
};

struct EvaluationQuestion {
  Question question;
  std::string document_id, title;  // of the paragraph that holds the answer
};

struct EvaluationSet {
  std::string name;  // "grounded", "squad"
  std::vector<EvaluationQuestion> questions;
};

struct EvaluationDocument {
  std::string id, title, text;
};

struct EvaluationData {
  std::vector<EvaluationSet> sets;
  // Paragraphs of the answers; then others of the articles asked about, then of other held-out
  // articles, both in random order, up to the number asked for.
  std::vector<EvaluationDocument> documents;
};

// A function of the options and the files. NOT_FOUND or INVALID_ARGUMENT name the file.
absl::StatusOr<EvaluationData> ReadEvaluationData(const EvaluationDataOptions& options);

// As a .jsonl that memory3 load reads.
absl::Status WriteEvaluationDocuments(const std::vector<EvaluationDocument>& documents,
                                      const std::string& path);

// `documents` of a file, drawn at random; all where it has no more.
absl::StatusOr<std::vector<EvaluationDocument>> SampleDocuments(const std::string& path,
                                                                int documents, uint64_t seed);

}  // namespace memory3
