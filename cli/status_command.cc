// memory3 status: both servers at a glance.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "cli/text.h"
#include "nlohmann/json.hpp"
#include "serving/status.h"

namespace memory3 {
namespace {

absl::StatusOr<v1::GetStatusResponse> AskMemoryServer(const Session& session) {
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  return (*client)->Call(&MemoryClient::Stub::GetStatus, v1::GetStatusRequest());
}

absl::StatusOr<v1::GetModelResponse> AskInferenceServer(const Session& session) {
  absl::StatusOr<std::unique_ptr<v1::InferenceService::Stub>> stub = session.OpenInference();
  if (!stub.ok()) return stub.status();
  v1::GetModelResponse response;
  const std::unique_ptr<grpc::ClientContext> context = session.NewContext(session.timeout_seconds);
  absl::Status status =
      FromGrpc((*stub)->GetModel(context.get(), v1::GetModelRequest(), &response));
  if (!status.ok()) return status;
  return response;
}

std::string Said(const v1::GetStatusResponse& store) {
  return absl::StrCat(
      "version ", store.version(), ", up since ", HumanTime(store.started_at()), " UTC\n  ",
      HumanCount(store.knowledge_bases()), " knowledge bases, ", HumanCount(store.entries()),
      " references, ", HumanCount(store.records()), " memories; ", HumanBytes(store.disk_bytes()),
      " on disk, ", HumanBytes(store.index_bytes()), " of index in memory\n  ",
      store.retrieve_streams(), " retrieve streams; ",
      store.writable() ? "writable" : absl::StrCat("NOT WRITABLE: ", store.not_writable_reason()));
}

std::string Said(const v1::GetModelResponse& model) {
  const v1::ServingState& state = model.state();
  const uint64_t read = state.device_hits() + state.host_hits() + state.store_hits();
  const auto part = [&](uint64_t hits) {
    return absl::StrFormat(
        "%.0f %%", read > 0 ? 100.0 * static_cast<double>(hits) / static_cast<double>(read) : 0.0);
  };
  const std::string reads =
      read == 0 ? "no memories read yet"
                : absl::StrCat(HumanCount(read), " memories read: ", part(state.device_hits()),
                               " lay on the device, ", part(state.host_hits()), " on the host, ",
                               part(state.store_hits()), " came from the store");
  return absl::StrCat(
      "model ", model.name(), ", ", HumanCount(model.parameters()), " parameters in ",
      model.weights(), model.dense_mode() ? ", dense mode" : "", ", on ", model.device(), "\n  ",
      state.running(), " running, ", state.waiting(), " waiting; ", state.kv_pages_used(), " of ",
      state.kv_pages(), " KV pages in use; ", HumanCount(state.generated_tokens()),
      " tokens generated\n  ", reads, "; ", HumanBytes(state.host_cache_bytes()),
      " cached on the host\n  reads ",
      model.knowledge_bases().empty() ? "no knowledge base"
                                      : absl::StrJoin(model.knowledge_bases(), ", "));
}

template <typename Response>
nlohmann::json ToJsonObject(const absl::StatusOr<Response>& response) {
  if (response.ok()) return nlohmann::json::parse(ToJson(*response));
  return {{"error",
           {{"code", absl::StatusCodeToString(response.status().code())},
            {"message", std::string(response.status().message())}}}};
}

template <typename Response>
void Print(const char* server, const std::string& target,
           const absl::StatusOr<Response>& response) {
  std::printf(
      "%s %s: %s\n", server, target.c_str(),
      response.ok() ? Said(*response).c_str() : std::string(response.status().message()).c_str());
}

absl::Status Status(const Session& session) {
  const absl::StatusOr<v1::GetStatusResponse> store = AskMemoryServer(session);
  const absl::StatusOr<v1::GetModelResponse> model = AskInferenceServer(session);
  if (session.json) {
    const nlohmann::json both = {{"memory_server", ToJsonObject(store)},
                                 {"inference_server", ToJsonObject(model)}};
    std::puts(both.dump().c_str());
  } else {
    Print("memory server", session.memory_server, store);
    Print("inference server", session.inference_server, model);
  }
  for (const auto& [server, status] : {std::pair{"memory server", store.status()},
                                       std::pair{"inference server", model.status()}}) {
    if (!status.ok())
      return absl::Status(status.code(), absl::StrCat("the ", server, " does not answer"));
  }
  return absl::OkStatus();
}

}  // namespace

void AddStatusCommand(CLI::App& app, Commands& commands) {
  CLI::App* status = app.add_subcommand("status", "Both servers at a glance");
  commands.push_back({status, [](const Session& session) { return Status(session); }});
}

}  // namespace memory3
