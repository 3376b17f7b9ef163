// One set of questions put to the inference server in one way of reading: Generate gives the
// answers and what was read for them, Score the likelihood of the gold answers.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "cli/question.h"
#include "cli/session.h"
#include "evaluation/evaluation_data.h"
#include "evaluation/report.h"

namespace memory3 {

struct ReadingMode {
  std::string knowledge_base;  // empty: nothing is retrieved
  // What is retrieved is read as text before the question, best last, instead of as memories.
  bool as_text = false;
  // Only the paragraph that holds the answer can be retrieved.
  bool gold = false;
  std::optional<uint32_t> references_per_chunk;  // default: the model's
};

// Fills what is measured of `row`, but bytes_per_reference and references. CANCELLED: Interrupted()
// (cli/server_process.h); else the server's errors.
absl::Status Examine(const Session& session, v1::InferenceService::Stub& stub,
                     const EvaluationSet& set, const ReadingMode& mode, const std::string& prompt,
                     EvaluationRow* row);

}  // namespace memory3
