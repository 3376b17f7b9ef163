// Question answering, measured: the model generates an answer greedily and is marked by SQuAD's
// rules (qa_metrics.h); beside it the log-likelihood of the gold answer. The same questions and
// references in every mode.
//
// Thread-safety: the device's thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/codec.h"
#include "trainer/pack.h"
#include "trainer/qa_data.h"
#include "transformer/model.h"

namespace memory3 {

enum class QaReading : uint8_t {
  kNone,      // the question alone
  kMemory,    // references as memories
  kMemoryVq,  // the same, through the vq codec
  kText,      // references as text before the question
};
const char* QaReadingName(QaReading reading);  // "none", "memory", "memory_vq", "text"

struct QaEvaluationOptions {
  std::vector<QaReading> readings;
  int tokens_kept = 0;        // 0: the model's
  double overlap_limit = 1;   // drops references that overlap the question more; 1: none
  const Codec* vq = nullptr;  // for kMemoryVq
  int max_new_tokens = 24;
  uint64_t seed = 1;  // of the order of references as text
};

struct QaResult {
  QaReading reading = QaReading::kNone;
  int64_t questions = 0, dropped_references = 0;
  double exact_match = 0, f1 = 0;  // means
  double log_likelihood = 0;       // of a gold answer with its end, mean over questions, nats
  std::vector<std::string> answers;
};

// `examples` are of `questions` (QaExample::question); each reads its gold reference and its
// others. FAILED_PRECONDITION: a model without explicit_memory; INVALID_ARGUMENT: kMemoryVq without
// a codec; the errors of decoder and writer.
absl::StatusOr<std::vector<QaResult>> EvaluateQuestions(
    const std::shared_ptr<const Model>& model, const Tokenizer& tokenizer,
    const std::vector<Question>& questions, const std::vector<QaExample>& examples,
    const QaStore& store, const QaEvaluationOptions& options, const ProgressFunction& progress);

}  // namespace memory3
