// One unary call to the memory server whose reply is printed: as JSON, or as what `said` makes of
// it.
#pragma once

#include <cstdio>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/session.h"

namespace memory3 {

// `said`: Response → text with its line ends.
template <typename Request, typename Response, typename Said>
absl::Status CallAndSay(const Session& session,
                        grpc::Status (MemoryClient::Stub::*method)(grpc::ClientContext*,
                                                                   const Request&, Response*),
                        const Request& request, Said said) {
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  absl::StatusOr<Response> reply = (*client)->Call(method, request);
  if (!reply.ok()) return reply.status();
  if (session.json) {
    PrintJson(*reply);
  } else {
    std::fputs(said(*reply).c_str(), stdout);
  }
  return absl::OkStatus();
}

}  // namespace memory3
