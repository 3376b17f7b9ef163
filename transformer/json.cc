#include "transformer/json.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr int kMaxDepth = 64;

}  // namespace

absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source) {
  std::vector<absl::flat_hash_set<std::string>> keys;  // of the objects now open
  std::string problem;
  const auto callback = [&](int depth, nlohmann::json::parse_event_t event,
                            nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    // Past the first problem nothing is kept, the parser only runs to its end.
    if (!problem.empty()) return false;
    switch (event) {
      case Event::object_start:
        keys.emplace_back();
        [[fallthrough]];
      case Event::array_start:
        if (depth > kMaxDepth) problem = absl::StrCat("nested deeper than ", kMaxDepth);
        break;
      case Event::object_end:
        keys.pop_back();
        break;
      case Event::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        if (!keys.back().insert(key).second) problem = absl::StrCat("key '", key, "' stands twice");
        break;
      }
      default:
        break;
    }
    return problem.empty();
  };
  try {
    nlohmann::json value = nlohmann::json::parse(text.begin(), text.end(), callback);
    if (!problem.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(std::string(source), ": ", problem));
    }
    return value;
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(source), ": not JSON: ", e.what()));
  }
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return absl::NotFoundError(absl::StrCat(path, ": no such file"));
  }
  if (!std::filesystem::is_regular_file(path, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a file"));
  }
  std::ifstream in(path, std::ios::binary);
  std::string bytes;
  if (in) {
    in.seekg(0, std::ios::end);
    const int64_t size = in.tellg();
    if (size > max_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat(path, ": ", size, " bytes, more than ", max_bytes));
    }
    if (size >= 0) {
      bytes.resize(size);
      in.seekg(0);
      in.read(bytes.data(), size);
    }
  }
  if (!in) return absl::UnavailableError(absl::StrCat(path, ": ", std::strerror(errno)));
  return bytes;
}

}  // namespace memory3
