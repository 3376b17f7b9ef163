// inference_server: streaming generation behind memory3.v1.InferenceService, by a model that reads
// explicit memories while it runs.
#include <pthread.h>
#include <spdlog/spdlog.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "absl/synchronization/notification.h"
#include "inference_server/http_gateway.h"
#include "inference_server/inference_api.h"
#include "inference_server/loaded_model.h"
#include "inference_server/server.h"
#include "serving/flags.h"
#include "serving/signals.h"

namespace memory3 {
namespace {

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "inference_server: %s\n", std::string(status.message()).c_str());
  return 1;
}

// "1GiB", "64MB", "4096".
void AddBytesFlag(CLI::App& app, const std::string& name, uint64_t& value,
                  const std::string& help) {
  AddFlag(app, name, value, help)->transform(CLI::AsSizeValue(/*kb_is_1000=*/false));
}

void AddModelFlags(CLI::App& app, ModelOptions& options) {
  AddFlag(app, "model", options.model, "Model directory (Hugging Face's layout)")->required();
  AddFlag(app, "model_name", options.name, "Name in answers; empty: the directory's");
  AddFlag(app, "device", options.device, "cpu, cuda, or auto: cuda where there is one")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}));
  AddFlag(app, "threads", options.threads, "Threads that compute on the CPU; 0: one per core")
      ->check(CLI::Range(0, 4096));
  AddFlag(app, "weights", options.weights, "What weights are kept as")
      ->check(CLI::IsMember({"f32", "bf16", "int8"}));
  AddFlag(app, "chat_template", options.chat_template,
          "plain, llama2, chatml, or auto: chatml where the tokenizer has its tokens, else plain");
  AddFlag(app, "embedder", options.embedder, "lexical, lexical:DIR or bert:DIR");
  AddFlag(app, "memory", options.memory,
          "HOST:PORT of a memory server, embedded:PATH of a store in this process, or none");
  AddFlag(app, "memory_api_key", options.memory_api_key, "Key shown to the memory server");
  AddFlag(app, "memory_tenant", options.memory_tenant, "Tenant that this key stands for");
  AddFlag(app, "memory_tls_ca", options.memory_tls_ca,
          "PEM file that signed the memory server's certificate; empty: plain text");
  AddFlag(app, "memory_tls_certificate", options.memory_tls_certificate,
          "PEM file with this client's certificate, for mutual TLS");
  AddFlag(app, "memory_tls_key", options.memory_tls_key, "PEM file with its private key");
  AddFlag(app, "wait_cap_seconds", options.wait_cap_seconds,
          "How long a chunk waits for its memories at most")
      ->check(CLI::Range(0.001, 3600.0));
  AddFlag(app, "max_running", options.max_running, "Sequences in the batch")
      ->check(CLI::Range(1, 4096));
  AddFlag(app, "max_waiting", options.max_waiting, "Requests that wait to be; more are refused")
      ->check(CLI::Range(1, 1'000'000));
  AddFlag(app, "slice_tokens", options.slice_tokens, "Prompt tokens fed in one step")
      ->check(CLI::Range(1, 65536));
  AddBytesFlag(app, "kv_cache_bytes", options.kv_cache_bytes,
               "KV cache on the device, for example 4GiB");
  AddBytesFlag(app, "device_cache_bytes", options.device_cache_bytes, "Memories on the device");
  AddBytesFlag(app, "host_cache_bytes", options.host_cache_bytes, "Memories on the host");
}

int Main(int argc, char** argv) {
  Signals signals;
  ServingOptions serving = {.listen = "0.0.0.0:7071"};
  ModelOptions model;
  uint64_t stream_buffer_bytes = InferenceServiceOptions().stream_buffer_bytes;
  CLI::App app("Streaming generation by a model that reads explicit memories while it runs.");
  app.set_version_flag("--version", MEMORY3_VERSION);
  AddModelFlags(app, model);
  std::string http_listen;
  AddFlag(app, "http_listen", http_listen,
          "Address of the OpenAI-compatible API and the page, HOST:PORT; empty: none");
  AddBytesFlag(app, "stream_buffer_bytes", stream_buffer_bytes,
               "Events a client has not read yet, per stream; more end it");
  AddServingFlags(app, serving);
  int exit_code = 0;
  if (!ParseFlags(app, argc, argv, exit_code)) return exit_code;
  spdlog::set_level(spdlog::level::from_str(serving.log_level));

  Inference inference;
  absl::StatusOr<std::unique_ptr<InferenceServer>> server =
      InferenceServer::Start(&inference, serving, {.stream_buffer_bytes = stream_buffer_bytes});
  if (!server.ok()) return Fail(server.status());
  spdlog::info("inference_server {} listens: gRPC on port {}", MEMORY3_VERSION, (*server)->port());
  if ((*server)->metrics_port() != 0) spdlog::info("metrics on port {}", (*server)->metrics_port());
  std::unique_ptr<HttpGateway> http;
  if (!http_listen.empty()) {
    absl::StatusOr<std::unique_ptr<HttpGateway>> started =
        HttpGateway::Start({.listener = {.address = http_listen,
                                         .tls_certificate = serving.tls_certificate,
                                         .tls_key = serving.tls_key,
                                         .tls_client_ca = serving.tls_client_ca}},
                           &inference);
    if (!started.ok()) return Fail(started.status());
    http = *std::move(started);
    spdlog::info("HTTP on port {}", http->port());
  }

  const pthread_t waiter = pthread_self();
  absl::Status loaded;
  absl::Notification loading_done;
  std::thread loader([&] {
    absl::StatusOr<std::unique_ptr<LoadedModel>> result = LoadModel(
        model, [&inference](absl::Duration took) { inference.metrics().Retrieved(took); });
    loaded = result.status();
    if (result.ok()) {
      const std::string device = (*result)->device->name();
      inference.Serve(*std::move(result));
      (*server)->SetReady();
      spdlog::info("ready: {} on {}, weights {}, memory {}", inference.model_name(), device,
                   model.weights, model.memory);
    }
    loading_done.Notify();
    // To the thread that waits below or is about to: libraries have started threads of their own,
    // before signals were blocked, and one of them would die of a signal to the process.
    if (!loaded.ok()) pthread_kill(waiter, SIGTERM);
  });
  const int signal = signals.WaitForShutdown([&] {
    const absl::Status status = (*server)->ReloadApiKeys();
    spdlog::info("SIGHUP: API keys {}", status.ok() ? "read again" : std::string(status.message()));
  });
  if (!loading_done.HasBeenNotified()) {
    // Nobody was served yet, and loading cannot be interrupted.
    spdlog::info("signal {} while the model was being loaded: stopped", signal);
    spdlog::shutdown();
    std::_Exit(0);
  }
  loader.join();
  if (!loaded.ok()) return Fail(loaded);
  spdlog::info("signal {}: draining for up to {} s", signal, serving.drain_seconds);
  (*server)->Shutdown(absl::Seconds(serving.drain_seconds));  // HTTP's requests too
  if (http != nullptr) http->Shutdown(absl::Seconds(1));
  spdlog::info("inference_server stopped");
  return 0;
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
