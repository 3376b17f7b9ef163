// memory3 status: both servers at a glance.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "cli/text.h"

namespace memory3 {
namespace {

void PrintDown(const Session& session, const char* server, const std::string& target,
               const absl::Status& status) {
  if (session.json) {
    v1::RetrieveResponse error;  // only its error fields
    error.set_error_code(static_cast<uint32_t>(status.raw_code()));
    error.set_error_message(
        absl::StrCat(server, " at ", target, ": ", std::string(status.message())));
    PrintJson(error);
  } else {
    std::printf("%s  %s: %s\n", server, target.c_str(), std::string(status.message()).c_str());
  }
}

absl::Status Status(const Session& session) {
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  absl::StatusOr<v1::GetStatusResponse> store =
      (*client)->Call(&MemoryClient::Stub::GetStatus, v1::GetStatusRequest());
  if (!store.ok()) {
    PrintDown(session, "memory server   ", session.memory_server, store.status());
  } else if (session.json) {
    PrintJson(*store);
  } else {
    std::printf(
        "memory server     %s: version %s, up since %s UTC\n"
        "                  %s knowledge bases, %s references, %s memories; %s on disk, %s of "
        "index in memory\n"
        "                  %u retrieve streams; %s\n",
        session.memory_server.c_str(), store->version().c_str(),
        HumanTime(store->started_at()).c_str(), HumanCount(store->knowledge_bases()).c_str(),
        HumanCount(store->entries()).c_str(), HumanCount(store->records()).c_str(),
        HumanBytes(store->disk_bytes()).c_str(), HumanBytes(store->index_bytes()).c_str(),
        store->retrieve_streams(),
        store->writable() ? "writable"
                          : absl::StrCat("NOT WRITABLE: ", store->not_writable_reason()).c_str());
  }
  return store.status();
}

}  // namespace

void AddStatusCommand(CLI::App& app, Commands& commands) {
  CLI::App* status = app.add_subcommand("status", "Both servers at a glance");
  commands.push_back({status, [](const Session& session) { return Status(session); }});
}

}  // namespace memory3
