#include "tests/child_process.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <regex>
#include <sstream>
#include <stdexcept>

namespace memory3 {
namespace {

std::string FindBinary(const std::string& name) {
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe");
  return (self.parent_path().parent_path() / "bin" / name).string();
}

}  // namespace

ChildProcess::ChildProcess(const std::string& binary, const std::vector<std::string>& arguments,
                           const std::map<std::string, std::string>& environment) {
  const std::string path = FindBinary(binary);
  std::vector<char*> argv = {const_cast<char*>(path.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("pipe");
  pid_ = fork();
  if (pid_ < 0) throw std::runtime_error("fork");
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // no test leaves a server behind
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
    execv(path.c_str(), argv.data());
    dprintf(STDERR_FILENO, "cannot run %s\n", path.c_str());
    _exit(127);
  }
  close(ends[1]);
  reader_ = std::thread([this, fd = ends[0]] {
    char buffer[4096];
    for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) {
      const std::lock_guard lock(mutex_);
      output_.append(buffer, static_cast<size_t>(n));
      changed_.notify_all();
    }
    close(fd);
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  });
}

ChildProcess::~ChildProcess() {
  if (!reaped_) {
    kill(pid_, SIGKILL);
    Wait();
  }
  reader_.join();
}

std::optional<std::string> ChildProcess::WaitForLine(const std::string& regex,
                                                     std::chrono::milliseconds timeout) {
  const std::regex pattern(regex);
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  size_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    for (size_t end; (end = output_.find('\n', seen)) != std::string::npos; seen = end + 1) {
      const std::string line = output_.substr(seen, end - seen);
      std::smatch match;
      if (std::regex_search(line, match, pattern)) return match.size() > 1 ? match[1].str() : line;
    }
    if (ended_ || changed_.wait_until(lock, deadline) == std::cv_status::timeout)
      return std::nullopt;
  }
}

void ChildProcess::Signal(int signal) {
  if (!reaped_) kill(pid_, signal);
}

int ChildProcess::Wait(std::chrono::seconds timeout) {
  if (!reaped_) {
    // The output ends when the process does: wait for that, within the time given.
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, timeout, [this] { return ended_; })) kill(pid_, SIGKILL);
    lock.unlock();
    waitpid(pid_, &status_, 0);
    reaped_ = true;
  }
  return WIFEXITED(status_) ? WEXITSTATUS(status_) : -WTERMSIG(status_);
}

std::string ChildProcess::output() {
  const std::lock_guard lock(mutex_);
  return output_;
}

}  // namespace memory3
