// A line of progress with rate and time left on stderr: rewritten in place on a terminal, a line
// every 10 s elsewhere.
//
// Thread-safety: one thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace memory3 {

class Progress {
 public:
  // `what`: "packing"; `unit`: what is counted, "MB", "steps"; `scale`: counts in one unit.
  Progress(std::string what, std::string unit, double scale = 1);
  ~Progress();  // ends the line
  // `note` stands at the end of the line.
  void Update(int64_t done, int64_t total, const std::string& note = "");

 private:
  const std::string what_, unit_;
  const double scale_;
  const bool terminal_;
  int64_t first_ = -1;
  bool shown_ = false, complete_ = false;
  std::chrono::steady_clock::time_point start_, last_;
};

}  // namespace memory3
