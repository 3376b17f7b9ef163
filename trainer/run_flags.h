// Flags that every training command has: the run and its schedule, batch, seed.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "trainer/training_run.h"
#include "transformer/parameters.h"

namespace memory3 {

struct RunFlags {
  RunOptions run;
  std::string schedule = "cosine";
  int batch = 8;
  uint64_t seed = 1;
  bool recompute = false;

  void AddTo(CLI::App* flags);
  // Takes over what the flags say into `run`.
  void Apply() {
    run.schedule.kind = schedule == "wsd" ? Schedule::Kind::kWsd : Schedule::Kind::kCosine;
  }
};

// Batches with activations recomputed.
class Recomputed : public BatchSource {
 public:
  explicit Recomputed(BatchSource* source) : source_(source) {}
  absl::StatusOr<TrainingBatch> Make(int64_t number) override {
    absl::StatusOr<TrainingBatch> batch = source_->Make(number);
    if (batch.ok()) batch->recompute_activations = true;
    return batch;
  }
  std::vector<std::string> Kinds() const override { return source_->Kinds(); }

 private:
  BatchSource* source_;
};

// A model directory that may be there already, as that of a run that goes on.
absl::Status SaveModelOnce(const Parameters& parameters, const std::string& directory,
                           const std::string& tokenizer);

}  // namespace memory3
