#include "bench/report.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

namespace memory3 {
namespace {

// First value of `key` in a "key : value" file of /proc.
std::string ProcField(const char* file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(key)) {
      const size_t at = line.find_first_not_of(" \t", line.find(':') + 1);
      return at == std::string::npos ? "" : line.substr(at);
    }
  }
  return "";
}

}  // namespace

std::string MachineName() {
  const double gib =
      std::strtod(ProcField("/proc/meminfo", "MemTotal").c_str(), nullptr) / (1 << 20);
  char tail[64];
  std::snprintf(tail, sizeof tail, ", %u cores, %.0f GiB", std::thread::hardware_concurrency(),
                gib);
  return ProcField("/proc/cpuinfo", "model name") + tail;
}

void BenchReport::Add(std::string_view metric, double value, std::string_view unit,
                      std::string_view target) {
  rows_.push_back({std::string(metric), value, std::string(unit), std::string(target)});
}

int BenchReport::Write(std::string_view directory) const {
  std::printf("%s on %s\n", name_.c_str(), MachineName().c_str());
  for (const Row& row : rows_) {
    std::printf("  %-44s %14.4g %-12s %s\n", row.metric.c_str(), row.value, row.unit.c_str(),
                row.target.c_str());
  }
  for (const std::string& note : notes_) std::printf("  note: %s\n", note.c_str());

  nlohmann::ordered_json metrics = nlohmann::ordered_json::object();
  for (const Row& row : rows_) metrics[row.metric] = row.value;
  const char* commit = std::getenv("MEMORY3_COMMIT");  // bench/run sets it
  const nlohmann::ordered_json json = {{"name", name_},
                                       {"commit", commit == nullptr ? "unknown" : commit},
                                       {"machine", MachineName()},
                                       {"metrics", metrics}};
  const std::filesystem::path path = std::filesystem::path(directory) / (name_ + ".json");
  const std::filesystem::path temporary = path.string() + ".tmp";
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  std::ofstream out(temporary);
  out << json.dump(2) << "\n";
  out.close();
  if (out) std::filesystem::rename(temporary, path, error);
  if (!out || error) {
    std::cerr << name_ << ": cannot write " << path << "\n";
    return 1;
  }
  return 0;
}

}  // namespace memory3
