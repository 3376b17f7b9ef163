// Reads JSON from files we did not write: duplicate keys, runaway nesting and anything that is not
// one JSON value are errors, for a reader that quietly takes the last of two keys disagrees with
// the next reader.
//
// Thread-safety: functions.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace memory3 {

// INVALID_ARGUMENT naming `source` and the place.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source);

// A file as it stands. NOT_FOUND or UNAVAILABLE naming the path, RESOURCE_EXHAUSTED above
// `max_bytes`.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes);

}  // namespace memory3
