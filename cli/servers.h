// Both servers as child processes: what `memory3 serve` keeps running and `memory3 demo` talks to.
//
// Thread-safety: one thread, after CatchInterrupts(). Ownership: the destructor stops them, the
// inference server first.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cli/server_process.h"
#include "serving/credentials.h"

namespace memory3 {

// What each is started with, "--name=value".
struct ServerFlags {
  std::vector<std::string> memory_server, inference_server;

  // The value of `name`, "" without.
  static std::string ValueOf(const std::vector<std::string>& flags, const std::string& name);
};

class Servers {
 public:
  // Returns when both say SERVING. `log_directory`: their output goes to NAME.log there; empty: to
  // ours. CANCELLED: Interrupted(). Else an error names the server and says how it ended.
  static absl::StatusOr<std::unique_ptr<Servers>> Start(const ServerFlags& flags,
                                                        const ClientTls& tls,
                                                        absl::Duration patience,
                                                        const std::string& log_directory = "");
  ~Servers();
  Servers(const Servers&) = delete;
  Servers& operator=(const Servers&) = delete;

  // OK while both run; INTERNAL names one that ended, and how.
  absl::Status Running();

 private:
  Servers() = default;
  std::vector<std::unique_ptr<ServerProcess>> servers_;
};

// Where a client on this machine reaches a server that listens on `address`.
std::string Reachable(const std::string& address);
// An address of this machine that nobody listens on now, "127.0.0.1:PORT".
absl::StatusOr<std::string> FreeAddress();

}  // namespace memory3
