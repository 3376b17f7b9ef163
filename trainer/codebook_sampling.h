// Vectors of memories to train the vq codec's codebook on, and others to judge it by.
//
// Thread-safety: the device's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "trainer/documents.h"
#include "trainer/writing_model.h"

namespace memory3 {

struct CodebookSampleOptions {
  std::vector<std::string> inputs;
  DocumentOptions documents;
  int64_t vectors = 0;     // wanted for training
  int64_t references = 0;  // drawn from all of the input's; 0: twice what gives the vectors
  uint64_t seed = 1;
  int threads = 1;  // that cut
};

struct CodebookSample {
  int64_t memories = 0;
  // [n, head_dim]: of nine memories in ten, in random order, keys and values.
  std::vector<float> training;
  // Of the tenth.
  std::vector<float> held_out_keys, held_out_values;
  int64_t skipped = 0;  // documents
  std::vector<std::string> warnings;
};

// Draws references uniformly, writes their memories, and takes as many random vectors of each as
// are wanted. `done` of `total`: bytes read, then references written. INVALID_ARGUMENT: no text.
absl::StatusOr<CodebookSample> SampleVectors(
    const CodebookSampleOptions& options, const WritingModel& model,
    const std::function<void(bool reading, int64_t done, int64_t total)>& progress);

}  // namespace memory3
