// Batches of fine-tuning where references are shared: a group is as many references as a chunk
// reads, and every question of the group reads them all. Encoding references is most of the cost
// (some 550 tokens for an answer of five), so that a group asks all it can: the questions whose
// gold reference is in it, and clozes, new ones every time, of each of its references. A question's
// group is its gold reference, golds of its document's other questions and its nearest others, as
// at evaluation; groups of other texts are pieces of one document or two.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "trainer/continual.h"
#include "trainer/documents.h"
#include "trainer/qa_data.h"
#include "trainer/references.h"
#include "trainer/training_run.h"
#include "transformer/config.h"

namespace memory3 {

struct QaGroupOptions {
  int groups = 10;     // of a batch
  int accumulate = 1;  // batches of a step
  double texts = 0;    // part of the groups that are of texts
  int clozes = 2;      // of each reference
  int questions = 6;   // of a group, at most
  int golds = 3;       // of a question's document, at most; the other references are the nearest
  StepSchedule kept;
  // Part of the batches that keep fewer tokens of a reference: 64, 32, 16, 8 by turns.
  double sparse = 0;
  bool gradient_through_writing = true;
  uint64_t seed = 1;
};

// What a sequence of a group reads and asks.
struct QaGroup {
  std::vector<int> references;  // of the store
  std::vector<int> questions;   // of the examples
};

// One epoch: every example once, each group's references different, in random order.
std::vector<QaGroup> GroupQuestions(const std::vector<QaExample>& examples,
                                    const std::vector<Question>& questions, int references,
                                    const QaGroupOptions& options, int64_t epoch);

// A document's pieces, at least two.
using TextPieces = std::vector<CutReference>;

// The first `most_pieces` pieces of each document of the files that is not held out and has two.
absl::StatusOr<std::vector<TextPieces>> CutTexts(const std::vector<std::string>& paths,
                                                 const HoldOut& hold_out,
                                                 const Tokenizer& tokenizer, int reference_tokens,
                                                 int most_pieces);

class QaGroupBatches : public BatchSource {
 public:
  // All pointers must outlive it; `rehearsal` may be null. `questions` are those that the examples
  // name.
  QaGroupBatches(const ModelConfig* config, const Tokenizer* tokenizer, const QaStore* store,
                 const std::vector<Question>* questions, std::vector<QaExample> examples,
                 std::vector<TextPieces> texts, ContinualBatches* rehearsal,
                 QaGroupOptions options);
  absl::StatusOr<TrainingBatch> Make(int64_t number) override;
  std::vector<std::string> Kinds() const override { return kinds_; }

 private:
  const QaGroup& GroupAt(int64_t number);
  void AddQuestions(const QaGroup& group, Random* random, TrainingBatch* batch);
  void AddTexts(Random* random, TrainingBatch* batch);
  void AddClozes(const CutReference& reference, const std::vector<int>& reads, Random* random,
                 TrainingBatch* batch);
  void AddSequence(const QaExample& example, const std::vector<int>& reads, const char* kind,
                   TrainingBatch* batch);

  const ModelConfig* config_;
  const Tokenizer* tokenizer_;
  const QaStore* store_;
  const std::vector<Question>* questions_;
  const std::vector<QaExample> examples_;
  const std::vector<TextPieces> texts_;
  ContinualBatches* rehearsal_;
  const QaGroupOptions options_;
  std::vector<QaGroup> groups_;  // of all epochs so far, one after the other
  int64_t epochs_ = 0;
  std::vector<std::string> kinds_;
};

}  // namespace memory3
