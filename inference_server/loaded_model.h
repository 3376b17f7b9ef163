// A model with everything it needs to serve: device, tokenizer, embedder, memories, engine.
//
// Thread-safety: made and destroyed by one thread; its parts say for themselves.
// Ownership: owns its parts, which are destroyed from the last to the first: the engine ends its
// requests before what they read goes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "embedder/embedder.h"
#include "inference_server/engine.h"
#include "inference_server/memory_reader.h"
#include "inference_server/memory_source.h"
#include "memory_server/memory_store.h"
#include "transformer/chat_template.h"
#include "transformer/device.h"
#include "transformer/tokenizer.h"

namespace memory3 {

struct LoadedModel {
  ~LoadedModel();

  std::string name;
  std::string weights;  // "f32", "bf16", "int8"
  bool dense_mode = false;
  // How long a chunk waits at most, the knowledge base's look-up included.
  absl::Duration wait_cap = absl::Seconds(30);
  ChatTemplate chat = ChatTemplate::kPlain;
  Hash256 writer_fingerprint;

  std::unique_ptr<Device> device;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Embedder> embedder;    // null: no memories
  std::unique_ptr<MemoryStore> store;    // null: none in this process
  std::unique_ptr<MemorySource> source;  // null: no memories
  std::unique_ptr<MemoryReader> reader;  // null: no memories
  std::unique_ptr<Engine> engine;
};

// What the flags of inference_server say of the model. Defaults: as the flags'.
struct ModelOptions {
  std::string model;            // directory, Hugging Face's layout
  std::string name;             // empty: the directory's own
  std::string device = "auto";  // cpu, cuda, auto: cuda where there is one
  int threads = 0;              // of the CPU device; 0: one per core
  std::string weights = "bf16";
  std::string chat_template =
      "auto";  // auto: chatml where the tokenizer has its tokens, else plain
  std::string embedder = "lexical";

  std::string memory = "none";  // embedded:PATH, HOST:PORT, none
  std::string memory_api_key;   // HOST:PORT only, as the four below
  std::string memory_tenant = "default";
  std::string memory_tls_ca, memory_tls_certificate, memory_tls_key;
  double wait_cap_seconds = 30;

  int max_running = 32;
  int max_waiting = 256;
  int slice_tokens = 256;
  uint64_t kv_cache_bytes = uint64_t{1} << 30;
  uint64_t device_cache_bytes = uint64_t{1} << 30;  // memories on the device
  uint64_t host_cache_bytes = uint64_t{1} << 30;    // memories on the host
};

// The shape of the model's memories, as a knowledge base states it.
v1::Geometry GeometryOf(const ModelConfig& config, const ExplicitMemoryConfig& memory);

// Loads all of it. Errors are one line that names the flag, file or field at fault; a memory server
// that is not there is none. `on_retrieved`: as MemoryReaderOptions'.
absl::StatusOr<std::unique_ptr<LoadedModel>> LoadModel(
    const ModelOptions& options, std::function<void(absl::Duration)> on_retrieved = nullptr);

}  // namespace memory3
