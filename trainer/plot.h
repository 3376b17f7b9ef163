// Curves of training runs as one HTML page: inline script and SVG, no outside address, so that it
// opens from a disk or as an attachment. One chart for each number of metrics.jsonl, all runs in
// it; linear or logarithmic axes, smoothing, values under the pointer.
//
// Thread-safety: functions and plain values.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace memory3 {

// One run's metrics.
struct RunCurves {
  std::string name;
  // Metric → (x, y), ascending in x: the line's `step`, else its `seconds`, else its number.
  std::map<std::string, std::vector<std::pair<double, double>>> curves;
  std::string x_name = "step";
  // Lines that are no JSON object, such as the last one of a killed process.
  int64_t bad_lines = 0;
};

// `path`: a run's directory (its metrics.jsonl) or a .jsonl. Every finite number of a line belongs
// to the curve of its field; null (a loss that was not finite) leaves a gap. Where a step stands
// twice, the later line counts. Errors: NOT_FOUND, INVALID_ARGUMENT (nothing to draw); they name
// the file.
absl::StatusOr<RunCurves> ReadRunCurves(const std::string& path, const std::string& name);

// Means of neighbouring points where a curve has more than `most` of them; most >= 2.
void Thin(RunCurves* run, size_t most);

// The page. Names may hold anything.
std::string CurvesPage(const std::vector<RunCurves>& runs, const std::string& title);

}  // namespace memory3
