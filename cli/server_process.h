// A server started by `memory3 serve` or `memory3 demo`: a child process that ends with us.
//
// Thread-safety: one thread. Ownership: the destructor stops the process and waits for it.
#pragma once

#include <grpcpp/channel.h>
#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace memory3 {

class ServerProcess {
 public:
  // Runs `binary` from the directory of the running program. Its output goes to `log_file`, or
  // where ours goes. It gets SIGTERM when this process dies, however that happens. NOT_FOUND: no
  // such binary beside us.
  static absl::StatusOr<ServerProcess> Start(const std::string& binary,
                                             const std::vector<std::string>& arguments,
                                             const std::string& log_file = "");
  ServerProcess(ServerProcess&& other) noexcept;
  ServerProcess& operator=(ServerProcess&&) = delete;
  ~ServerProcess();

  const std::string& name() const { return name_; }
  // How it ended: "exit code 1", "signal 9"; nothing while it runs.
  std::optional<std::string> Ended();
  // SIGTERM, then SIGKILL after `patience`. Waits for the end.
  void Stop(absl::Duration patience);
  // Waits until grpc.health.v1 on `channel` says SERVING for the whole server. FAILED_PRECONDITION:
  // the process ended (kToldAlready, where it chose to and its output goes where ours goes);
  // DEADLINE_EXCEEDED; CANCELLED: Interrupted().
  absl::Status WaitUntilServing(const std::shared_ptr<grpc::Channel>& channel,
                                absl::Duration patience);

 private:
  ServerProcess(std::string name, pid_t pid, bool logs)
      : name_(std::move(name)), logs_(logs), pid_(pid) {}

  std::string name_;
  bool logs_;  // to a file
  pid_t pid_;  // -1: reaped
  std::string ended_;
};

// From here on SIGINT and SIGTERM do not end the program: Interrupted() says that one came. Call
// before threads start.
void CatchInterrupts();
bool Interrupted();  // false where CatchInterrupts() was not called
// Sleeps until one of them comes, a child ends, or `patience` is over.
void WaitForSignal(absl::Duration patience);

}  // namespace memory3
