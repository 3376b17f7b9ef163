#include "trainer/progress.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

namespace memory3 {

using Clock = std::chrono::steady_clock;

Progress::Progress(std::string what, std::string unit, double scale)
    : what_(std::move(what)),
      unit_(std::move(unit)),
      scale_(scale),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(Clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (terminal_ && shown_) std::fputc('\n', stderr);
}

void Progress::Update(int64_t done, int64_t total, const std::string& note) {
  const Clock::time_point now = Clock::now();
  if (first_ < 0) first_ = done;                  // a resumed run's rate counts from where it began
  const bool last = done >= total && !complete_;  // said once
  if (now - last_ < std::chrono::milliseconds(terminal_ ? 200 : 10000) && !last) return;
  complete_ = complete_ || last;
  last_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double rate = seconds > 0 ? static_cast<double>(done - first_) / seconds : 0;
  const auto left = static_cast<int64_t>(rate > 0 ? static_cast<double>(total - done) / rate : 0);
  std::fprintf(stderr, "%s%s %5.1f %%  %.1f/%.1f %s  %.2f %s/s  %lld:%02lld:%02lld left  %s%s",
               terminal_ ? "\r\x1b[K" : "", what_.c_str(),
               total > 0 ? 100.0 * static_cast<double>(done) / static_cast<double>(total) : 100.0,
               static_cast<double>(done) / scale_, static_cast<double>(total) / scale_,
               unit_.c_str(), rate / scale_, unit_.c_str(), static_cast<long long>(left / 3600),
               static_cast<long long>(left / 60 % 60), static_cast<long long>(left % 60),
               note.c_str(), terminal_ ? "" : "\n");
  std::fflush(stderr);
  shown_ = true;
}

}  // namespace memory3
