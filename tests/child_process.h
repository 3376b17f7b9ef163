// Runs a built binary for a black-box test: its output (stdout and stderr) is kept and can be
// waited on.
//
// Thread-safety: one thread. The destructor kills what still runs.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace memory3 {

class ChildProcess {
 public:
  // `binary` is looked for beside the test's own directory (build/bin). `environment` is added.
  ChildProcess(const std::string& binary, const std::vector<std::string>& arguments,
               const std::map<std::string, std::string>& environment = {});
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;

  // Waits for a line of output that matches the regular expression, also one from before; answers
  // its first group (the line, if it has none). Nothing after `timeout` or when the process ends
  // without it.
  std::optional<std::string> WaitForLine(
      const std::string& regex, std::chrono::milliseconds timeout = std::chrono::seconds(60));
  void Signal(int signal);
  // Waits for the end; the exit code, or -signal. Kills it after `timeout`.
  int Wait(std::chrono::seconds timeout = std::chrono::seconds(60));
  std::string output();
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = -1;
  int status_ = -1;
  bool reaped_ = false;
  std::thread reader_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string output_;
  bool ended_ = false;  // of the output
};

}  // namespace memory3
