// A training run: batches in, parameters out, with what makes long runs bearable — schedule,
// clipping, accumulation, skipping of loss spikes, metrics, checkpoints, exact resumption.
//
// Thread-safety: the device's thread; RequestStop from a signal handler. One run per directory at a
// time (locked).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "trainer/schedule.h"
#include "transformer/parameters.h"
#include "transformer/training_batch.h"
#include "transformer/training_step.h"

namespace memory3 {

// Where batches come from. A batch is a function of its number alone, so that a resumed run sees
// what the other one would have.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual absl::StatusOr<TrainingBatch> Make(int64_t number) = 0;
  // Of the last batch made, what each sequence is ("text", "one_memory", …): the metrics have a
  // loss for each kind. Default: one kind, that is not told apart.
  virtual std::vector<std::string> Kinds() const { return {}; }
};

struct RunOptions {
  std::string directory;  // checkpoint-*.m3c, metrics.jsonl
  Schedule schedule;
  int accumulate = 1;  // batches of one update
  double weight_decay = 0.1, clip = 1.0;
  // An update whose loss is this many standard deviations above the running mean is skipped; 0:
  // none is. Updates that are not finite are always skipped.
  double spike_deviations = 6;
  int64_t save_every = 500;
  int keep = 3;            // checkpoints
  int64_t stop_after = 0;  // stops after this many steps of this process; 0: at the schedule's end
  // What makes the run what it is: model, data, seed, batch size. A checkpoint made with others is
  // refused by the name of the first that differs.
  nlohmann::json settings;
};

struct RunOutcome {
  int64_t step = 0;       // steps done, also by processes before
  bool finished = false;  // false: stopped
  double loss = 0;        // mean nats per token of the last step
};

// `extra` (may be null) is called with the number of steps done after every step and adds fields to
// the step's metrics. Errors: those of batches, step and checkpoints; FAILED_PRECONDITION: a
// checkpoint of another run, or the directory is in use; ABORTED: twenty updates in a row were not
// finite.
absl::StatusOr<RunOutcome> RunTraining(
    Parameters* parameters, BatchSource* batches, const RunOptions& options,
    const std::function<absl::Status(int64_t step, nlohmann::json* metrics)>& extra);

// Makes RunTraining save a checkpoint and return after the step under way. Async-signal-safe.
void RequestStop();
// From now on SIGTERM and SIGINT do the same. Call before other threads start.
void StopOnSignals();

}  // namespace memory3
