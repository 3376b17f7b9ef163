#include "cli/servers.h"

#include <arpa/inet.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/support/channel_arguments.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace memory3 {

std::string ServerFlags::ValueOf(const std::vector<std::string>& flags, const std::string& name) {
  for (const std::string_view flag : flags)
    if (flag.starts_with("--" + name + "=")) return std::string(flag.substr(name.size() + 3));
  return "";
}

absl::StatusOr<std::unique_ptr<Servers>> Servers::Start(const ServerFlags& flags,
                                                        const ClientTls& tls,
                                                        absl::Duration patience,
                                                        const std::string& log_directory) {
  absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> credentials =
      MakeChannelCredentials(tls);
  if (!credentials.ok()) return credentials.status();
  std::unique_ptr<Servers> servers(new Servers());
  for (const auto& [name, own] :
       {std::pair{std::string("memory_server"), &flags.memory_server},
        std::pair{std::string("inference_server"), &flags.inference_server}}) {
    const std::string log =
        log_directory.empty() ? "" : absl::StrCat(log_directory, "/", name, ".log");
    absl::StatusOr<ServerProcess> server = ServerProcess::Start(name, *own, log);
    if (!server.ok()) return server.status();
    servers->servers_.push_back(std::make_unique<ServerProcess>(*std::move(server)));
    grpc::ChannelArguments soon;  // the first attempt nearly always comes before the server listens
    soon.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    soon.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 500);
    absl::Status ready = servers->servers_.back()->WaitUntilServing(
        grpc::CreateCustomChannel(Reachable(ServerFlags::ValueOf(*own, "listen")), *credentials,
                                  soon),
        patience);
    if (!ready.ok() && log.empty()) return ready;
    if (!ready.ok()) {
      return absl::Status(ready.code(), absl::StrCat(std::string(ready.message()), "; see ", log));
    }
  }
  return servers;
}

Servers::~Servers() {
  while (!servers_.empty()) servers_.pop_back();
}

absl::Status Servers::Running() {
  for (const std::unique_ptr<ServerProcess>& server : servers_) {
    if (const std::optional<std::string> how = server->Ended(); how.has_value())
      return absl::InternalError(absl::StrCat(server->name(), " ended: ", *how));
  }
  return absl::OkStatus();
}

std::string Reachable(const std::string& address) {
  for (const std::string any : {"0.0.0.0:", "[::]:"})
    if (address.starts_with(any)) return absl::StrCat("localhost:", address.substr(any.size()));
  return address;
}

absl::StatusOr<std::string> FreeAddress() {
  const int probe = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const bool ok = probe >= 0 && bind(probe, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
                  getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  const int error = errno;
  if (probe >= 0) close(probe);
  if (!ok) return absl::UnavailableError(absl::StrCat("no free port: ", std::strerror(error)));
  return absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
}

}  // namespace memory3
