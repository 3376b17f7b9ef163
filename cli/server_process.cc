#include "cli/server_process.h"

#include <fcntl.h>
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cli/session.h"

namespace memory3 {
namespace {

bool interrupted = false;

sigset_t Watched() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&set, signal);
  return set;
}

// grpc.health.v1.Health/Check for the server as a whole: an empty request; the answer's field 1 is
// the status, of which 1 is SERVING.
bool IsServing(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(1));
  // While a call waits gRPC looks at the connection; between calls that fail at once it would only
  // look every five seconds.
  context.set_wait_for_ready(true);
  grpc::CompletionQueue queue;
  const grpc::Slice nothing;
  const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check",
                                          grpc::ByteBuffer(&nothing, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (!status.ok() || !answer.Dump(&slices).ok() || slices.empty()) return false;
  return std::string(slices[0].begin(), slices[0].end()) == "\x08\x01";
}

}  // namespace

void CatchInterrupts() {
  const sigset_t set = Watched();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

void WaitForSignal(absl::Duration patience) {
  const sigset_t set = Watched();
  const timespec time = absl::ToTimespec(patience);
  const int signal = sigtimedwait(&set, nullptr, &time);
  interrupted = interrupted || signal == SIGINT || signal == SIGTERM;
}

bool Interrupted() {
  WaitForSignal(absl::ZeroDuration());
  return interrupted;
}

absl::StatusOr<ServerProcess> ServerProcess::Start(const std::string& binary,
                                                   const std::vector<std::string>& arguments,
                                                   const std::string& log_file) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::string path = (self.parent_path() / binary).string();
  if (error || access(path.c_str(), X_OK) != 0)
    return absl::NotFoundError(absl::StrCat("no program ", path, ": `make build` makes it"));
  int log = -1;
  if (!log_file.empty()) {
    log = open(log_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (log < 0)
      return absl::FailedPreconditionError(absl::StrCat(log_file, ": ", std::strerror(errno)));
  }
  std::vector<char*> argv = {const_cast<char*>(path.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  if (pid == 0) {
    setpgid(0, 0);  // Ctrl-C is for us; we stop the servers in their order
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);
    const sigset_t set = Watched();
    sigprocmask(SIG_UNBLOCK, &set, nullptr);
    const int nothing = open("/dev/null", O_RDONLY);
    if (nothing >= 0) dup2(nothing, STDIN_FILENO);
    if (log >= 0) {
      dup2(log, STDOUT_FILENO);
      dup2(log, STDERR_FILENO);
    }
    execv(path.c_str(), argv.data());
    _exit(127);
  }
  if (log >= 0) close(log);
  return ServerProcess(binary, pid, log >= 0);
}

ServerProcess::ServerProcess(ServerProcess&& other) noexcept
    : name_(std::move(other.name_)),
      logs_(other.logs_),
      pid_(std::exchange(other.pid_, -1)),
      ended_(std::move(other.ended_)) {}

ServerProcess::~ServerProcess() { Stop(absl::Seconds(30)); }

std::optional<std::string> ServerProcess::Ended() {
  int status = 0;
  if (pid_ > 0 && waitpid(pid_, &status, WNOHANG) == pid_) {
    pid_ = -1;
    ended_ = WIFEXITED(status) ? absl::StrCat("exit code ", WEXITSTATUS(status))
                               : absl::StrCat("signal ", WTERMSIG(status));
  }
  if (pid_ > 0) return std::nullopt;
  return ended_;
}

void ServerProcess::Stop(absl::Duration patience) {
  if (Ended().has_value()) return;
  kill(pid_, SIGTERM);
  const absl::Time deadline = absl::Now() + patience;
  while (!Ended().has_value()) {
    if (absl::Now() > deadline) kill(pid_, SIGKILL);
    WaitForSignal(absl::Milliseconds(50));
  }
}

absl::Status ServerProcess::WaitUntilServing(const std::shared_ptr<grpc::Channel>& channel,
                                             absl::Duration patience) {
  const absl::Time deadline = absl::Now() + patience;
  while (!IsServing(channel)) {
    if (Interrupted()) return absl::CancelledError("interrupted");
    if (const std::optional<std::string> how = Ended(); how.has_value()) {
      absl::Status status =
          absl::FailedPreconditionError(absl::StrCat(name_, " did not start: ", *how));
      if (!logs_ && how->starts_with("exit code")) status.SetPayload(kToldAlready, absl::Cord());
      return status;
    }
    if (absl::Now() > deadline)
      return absl::DeadlineExceededError(
          absl::StrCat(name_, " was not ready after ", absl::FormatDuration(patience)));
    WaitForSignal(absl::Milliseconds(50));
  }
  return absl::OkStatus();
}

}  // namespace memory3
