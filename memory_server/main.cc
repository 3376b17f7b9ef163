// memory_server: the durable store of explicit memories behind memory3.v1.MemoryService.
#include <spdlog/spdlog.h>

#include <cstdio>
#include <filesystem>

#include "memory_server/rocksdb_store.h"
#include "memory_server/server.h"
#include "serving/flags.h"
#include "serving/signals.h"

namespace memory3 {
namespace {

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "memory_server: %s\n", std::string(status.message()).c_str());
  return 1;
}

int Main(int argc, char** argv) {
  Signals signals;
  ServingOptions serving = {.listen = "0.0.0.0:7070"};
  RetrieveOptionsOfServer retrieve;
  RocksDbStoreOptions store_options;
  uint64_t cache_mb = store_options.cache_bytes >> 20;
  uint64_t write_buffer_mb = store_options.write_buffer_bytes >> 20;
  CLI::App app("Durable store of explicit memories; answers retrieval. It never loads a model.");
  app.set_version_flag("--version", MEMORY3_VERSION);
  AddFlag(app, "data", store_options.directory, "Directory of the database")->required();
  AddFlag(app, "backup_root", store_options.backup_root,
          "Directory below which backups may be made; empty: none");
  AddSwitch(app, "accept_log_damage", store_options.accept_log_damage,
            "Open although the write-ahead log is damaged, without what was acknowledged after the "
            "damage");
  AddFlag(app, "cache_mb", cache_mb, "MiB of records, texts and rows kept in memory")
      ->check(CLI::Range(1, 1 << 20));
  AddFlag(app, "write_buffer_mb", write_buffer_mb,
          "MiB of a write buffer; records have up to four, embeddings three")
      ->check(CLI::Range(1, 1 << 14));
  AddFlag(app, "held_limit", retrieve.held_limit,
          "Records remembered per Retrieve stream as held by its client")
      ->check(CLI::Range(1, 100'000'000));
  AddFlag(app, "max_retrieve_streams", retrieve.max_streams, "Retrieve streams at a time")
      ->check(CLI::Range(1, 1'000'000));
  AddFlag(app, "search_threads", retrieve.search_threads, "Threads that search; 0: one per core")
      ->check(CLI::Range(0, 4096));
  AddServingFlags(app, serving);
  int exit_code = 0;
  if (!ParseFlags(app, argc, argv, exit_code)) return exit_code;
  store_options.cache_bytes = cache_mb << 20;
  store_options.write_buffer_bytes = write_buffer_mb << 20;
  spdlog::set_level(spdlog::level::from_str(serving.log_level));

  absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(store_options);
  if (!store.ok()) return Fail(store.status());
  absl::StatusOr<std::unique_ptr<MemoryServer>> server =
      MemoryServer::Start(store->get(), serving, retrieve);
  if (!server.ok()) return Fail(server.status());
  spdlog::info("memory_server {} ready: gRPC on port {}, data in {}", MEMORY3_VERSION,
               (*server)->port(), store_options.directory);

  if ((*server)->metrics_port() != 0) spdlog::info("metrics on port {}", (*server)->metrics_port());
  const int signal = signals.WaitForShutdown([&] {
    const absl::Status status = (*server)->ReloadApiKeys();
    spdlog::info("SIGHUP: API keys {}", status.ok() ? "read again" : std::string(status.message()));
  });
  spdlog::info("signal {}: draining for up to {} s", signal, serving.drain_seconds);
  (*server)->Shutdown(absl::Seconds(serving.drain_seconds));
  spdlog::info("memory_server stopped");
  return 0;
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
