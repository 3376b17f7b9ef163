// What a training run needs to go on as if it had never stopped: parameters, both moments of AdamW,
// and a JSON object with the run's settings and progress. One file, written atomically;
// docs/formats.md gives the bytes. All randomness of a run is a function of its seed and step
// (random.h), so the step is the random state and the data order.
//
// Thread-safety: the device's thread.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "transformer/device.h"
#include "transformer/parameters.h"

namespace memory3 {

// m, v: laid out as the parameters. Errors: AtomicFile's, the device's.
absl::Status SaveRunCheckpoint(const std::string& path, const nlohmann::json& about,
                               const Parameters& parameters, const Buffer& m, const Buffer& v);

// The JSON alone, after checking the whole file. DATA_LOSS (magic, length, CRC), UNIMPLEMENTED
// (version), NOT_FOUND; all name the path.
absl::StatusOr<nlohmann::json> ReadRunCheckpointAbout(const std::string& path);

// Fills parameters and, unless null, moments. FAILED_PRECONDITION: another number of parameters.
absl::Status LoadRunCheckpoint(const std::string& path, Parameters* parameters, Buffer* m,
                               Buffer* v);

// (step, path) of DIRECTORY/checkpoint-*.m3c, ascending. A directory that is not there has none.
std::vector<std::pair<int64_t, std::string>> ListRunCheckpoints(const std::string& directory);
std::string RunCheckpointPath(const std::string& directory, int64_t step);

// Removes all but the newest `keep`, and what a process that was killed left half written.
void PruneRunCheckpoints(const std::string& directory, int keep);

}  // namespace memory3
