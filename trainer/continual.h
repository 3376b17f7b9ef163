// Batches of continual training: sequences whose 64-token chunks read references, encoded live
// (explicit-memory.md, Training), and copying exercises that teach to read at all.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "trainer/corpus.h"
#include "trainer/exercises.h"
#include "trainer/random.h"
#include "trainer/reference_index.h"
#include "transformer/config.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// A value that changes with the step: "128@0,32@2000,8@4000".
class StepSchedule {
 public:
  // INVALID_ARGUMENT names the flag. The first step is 0, steps ascend, values are within
  // [least, most].
  static absl::StatusOr<StepSchedule> Parse(const std::string& text, const std::string& flag,
                                            int least, int most);
  int At(int64_t step) const;

 private:
  std::vector<std::pair<int64_t, int>> steps_;
};

struct RetrievalOptions {
  bool own_chunk_query = true;      // the paper's in training; false: the previous 64 tokens
  bool share_previous = true;       // a chunk also reads the references of the 4 chunks before it
  double overlap_limit = 0.9;       // rejects references above; >= 1: no filter
  double same_document = 0;         // probability of a piece of the same document instead
  bool leave_out_document = false;  // rejects references of the window's own documents
};

// Fills chunk_references of the batch's sequences, which are the windows', from `index`.
// `share_previous`: one reference a chunk (references_per_chunk with the chunks before), else
// references_per_chunk a chunk.
absl::Status AttachReferences(const ModelConfig& config, const Tokenizer& tokenizer,
                              const TokenCorpus& corpus, const ReferenceIndex& index,
                              const std::vector<Window>& windows, const RetrievalOptions& options,
                              uint64_t seed, TrainingBatch* batch);

// Warm-up: ordinary language modelling in the plain layout (`<s>` and tokens-1 tokens in, the
// tokens of the window as targets), and copying exercises in the context.
struct WarmupOptions {
  int sequences = 8, tokens = 256;
  double copy = 0;  // part of the sequences that are copying exercises
  uint64_t seed = 1;
};
class WarmupBatches : public BatchSource {
 public:
  // Both must outlive it.
  WarmupBatches(const ModelConfig* config, const TokenCorpus* corpus, WindowOrder order,
                const WarmupOptions& options)
      : config_(config), corpus_(corpus), order_(std::move(order)), options_(options) {}
  absl::StatusOr<TrainingBatch> Make(int64_t number) override;
  std::vector<std::string> Kinds() const override;

 private:
  const ModelConfig* config_;
  const TokenCorpus* corpus_;
  WindowOrder order_;
  WarmupOptions options_;
};

struct ContinualOptions {
  int sequences = 8, tokens = 257;
  int accumulate = 1;   // batches of a step
  double copy = -1;     // part of the sequences that are copying exercises
  double retrieve = 1;  // part of the others that read references
  // Part of the batches whose query is the 64 tokens before a chunk, as in use, not the chunk's
  // own.
  double previous_query = 0;
  StepSchedule kept, level;
  bool gradient_through_writing = true;
  RetrievalOptions retrieval;
  uint64_t seed = 1;
};

class ContinualBatches : public BatchSource {
 public:
  // All must outlive it.
  ContinualBatches(const ModelConfig* config, const Tokenizer* tokenizer, const TokenCorpus* corpus,
                   const ReferenceIndex* index, WindowOrder order, ContinualOptions options)
      : config_(config),
        tokenizer_(tokenizer),
        corpus_(corpus),
        index_(index),
        order_(std::move(order)),
        options_(std::move(options)) {}
  absl::StatusOr<TrainingBatch> Make(int64_t number) override;
  std::vector<std::string> Kinds() const override { return kinds_; }

 private:
  const ModelConfig* config_;
  const Tokenizer* tokenizer_;
  const TokenCorpus* corpus_;
  const ReferenceIndex* index_;
  WindowOrder order_;
  ContinualOptions options_;
  std::vector<std::string> kinds_;
};

}  // namespace memory3
