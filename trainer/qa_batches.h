// Batches of fine-tuning: questions whose answers stand in references that are read as memories, or
// as text before the question, with the same examples in the same order; the loss is on the answer.
// Beside them a rehearsal of continual training, so that it is not unlearned.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "trainer/continual.h"
#include "trainer/qa_data.h"
#include "trainer/training_run.h"
#include "transformer/config.h"

namespace memory3 {

enum class QaMode : uint8_t { kMemory, kText };

struct QaBatchOptions {
  QaMode mode = QaMode::kMemory;
  int questions = 32;  // of a batch
  int accumulate = 1;  // batches of a step
  double cloze = 0.3;  // part of the questions that are clozes
  // Of a question's references besides gold: so many of the nearest, the rest others of the batch
  // (encoding them is most of the cost).
  int retrieved = 1;
  StepSchedule kept;
  bool gradient_through_writing = true;
  uint64_t seed = 1;
};

// Token ids of a question read as text, `<s>` first: references, a line each, then the prompt.
std::vector<int32_t> TextPrompt(const Tokenizer& tokenizer, int32_t bos, const QaStore& store,
                                const std::vector<int>& references,
                                const std::vector<int32_t>& prompt);

// A prompt, `<s>` first, and its answer, with the loss on the answer.
TrainingSequence AnswerSequence(std::vector<int32_t> prompt, const std::vector<int32_t>& answer);
// The same of `<s>` and an example.
TrainingSequence QuestionSequence(const ModelConfig& config, const QaExample& example);

class QaBatches : public BatchSource {
 public:
  // All must outlive it. `clozes` may be empty; `rehearsal` may be null.
  QaBatches(const ModelConfig* config, const Tokenizer* tokenizer, const QaStore* store,
            std::vector<QaExample> questions, std::vector<QaExample> clozes,
            ContinualBatches* rehearsal, QaBatchOptions options);
  absl::StatusOr<TrainingBatch> Make(int64_t number) override;
  std::vector<std::string> Kinds() const override { return kinds_; }

 private:
  // Example number 0, 1, … of a list; each once an epoch, in random order.
  struct Order {
    std::vector<QaExample> examples;
    int64_t epoch = -1;
    std::vector<uint32_t> order;
  };
  const QaExample& At(Order* list, int64_t number) const;
  void AddQuestion(const QaExample& example, std::vector<int> references, Random* random,
                   TrainingBatch* batch) const;

  const ModelConfig* config_;
  const Tokenizer* tokenizer_;
  const QaStore* store_;
  Order questions_, clozes_;
  ContinualBatches* rehearsal_;
  const QaBatchOptions options_;
  std::vector<std::string> kinds_;
};

// Appends the sequences and references of `more`.
void AppendBatch(TrainingBatch more, TrainingBatch* batch);

}  // namespace memory3
