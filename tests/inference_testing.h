// What the black-box tests of inference_server share: the binary as a process and its client, a
// model that the offline loops run beside it, and a knowledge base of real memories.
//
// The model is stories260K of the shared data. Its checkpoint knows nothing of memories, so it
// works in dense mode. Thread-safety: one thread, but for Client, which is any thread's.
#pragma once

#include <grpcpp/channel.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "embedder/embedder.h"
#include "memory/explicit_memory.h"
#include "memory/hash.h"
#include "memory3/v1/inference.grpc.pb.h"
#include "memory_server/client.h"
#include "tests/child_process.h"
#include "transformer/checkpoint.h"
#include "transformer/decoder.h"
#include "transformer/generate.h"
#include "transformer/model.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// Null where the shared data is not there: the test is to be skipped, loudly.
std::optional<std::string> StoriesDirectory();

#define SKIP_WITHOUT_STORIES() \
  if (!memory3::StoriesDirectory()) GTEST_SKIP() << "no fixtures/stories260K below MEMORY3_DATA"

// A directory of the test's own, gone with it.
class TestDirectory {
 public:
  TestDirectory();
  ~TestDirectory() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// A Generate stream from its first message to its status.
struct Generated {
  grpc::Status status;
  std::optional<int> retry_after_ms;
  absl::Duration first_token = absl::InfiniteDuration();  // since the call, as the client saw it
  std::optional<v1::PromptInfo> prompt;
  std::string text;
  std::vector<int32_t> ids;
  std::vector<v1::TokenLogprobs> logprobs;
  std::vector<v1::ChunkProvenance> provenance;
  std::optional<v1::Finish> finish;
};

class Client {
 public:
  explicit Client(const std::string& target,
                  const std::shared_ptr<grpc::ChannelCredentials>& credentials = nullptr,
                  std::string api_key = "");

  v1::InferenceService::Stub& stub() { return *stub_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  void Prepare(grpc::ClientContext& context) const;  // the key
  // Reads to the end and checks the order of the messages.
  Generated Generate(const v1::GenerateRequest& request);
  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::InferenceService::Stub::*method)(grpc::ClientContext*,
                                                                       const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    Prepare(context);
    return (*stub_.*method)(&context, request, response);
  }
  // Bytes as a request of `method`.
  grpc::Status CallRaw(const std::string& method, const std::string& request,
                       std::string* response);
  // Of grpc.health.v1: 1 SERVING, 2 NOT_SERVING; 0 where the call fails.
  int Health(const std::string& service);

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InferenceService::Stub> stub_;
  std::string api_key_;
};

// The binary, listening on a port of its own choice, with small caches and weights in f32 unless
// `flags` say otherwise.
class InferenceProcess {
 public:
  // Waits until it is ready, or only until it listens.
  explicit InferenceProcess(const std::vector<std::string>& flags, bool until_ready = true);

  ChildProcess& process() { return *process_; }
  std::string target() const { return "localhost:" + port_; }
  Client& client() { return *client_; }
  void WaitUntilReady();
  // A metric's value from /metrics, by the line's name and labels; -1: there is no such line.
  double Metric(const std::string& name);
  // Waits, within a minute, until it is so.
  void WaitForMetric(const std::string& name, double value);

 private:
  std::unique_ptr<ChildProcess> process_;
  std::string port_;
  std::string metrics_port_;
  std::unique_ptr<Client> client_;
};

// all-MiniLM-L6-v2, where tools/setup or MEMORY3_MINILM has put it.
std::optional<std::string> MiniLmDirectory();

struct OfflineModelOptions {
  WeightFormat weights = WeightFormat::kF32;
  std::string embedder = "lexical";
};

// The same model in this process.
class OfflineModel {
 public:
  explicit OfflineModel(const std::string& directory, const OfflineModelOptions& options = {});

  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const Hash256& fingerprint() const { return fingerprint_; }
  const Embedder& embedder() const { return *embedder_; }
  v1::KnowledgeBaseSpec Spec(const std::string& name) const;
  // Writes the test's references, with this model, into a new knowledge base of a memory server.
  void FillKnowledgeBase(MemoryClient& client, const v1::KnowledgeBaseSpec& spec);
  // What the server must answer. With memories: the best `references` of a chunk by exact search.
  Generation Generate(const std::vector<int32_t>& prompt, int max_new_tokens, bool memory,
                      int references = 5);
  size_t references() const { return memories_.size(); }
  RecordId IdOf(size_t reference) const;
  // The record of a reference as written by a model of this fingerprint.
  std::string RecordOf(size_t reference, const Hash256& writer) const;
  static std::string TextOf(size_t reference);

 private:
  std::vector<RetrievedMemory> Retrieve(std::span<const int32_t> query, int references) const;

  std::unique_ptr<Device> device_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Embedder> embedder_;
  ExplicitMemoryConfig dense_;
  Hash256 fingerprint_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<std::vector<int32_t>> ids_;  // of the references
  std::vector<ExplicitMemory> memories_;
  std::vector<std::vector<float>> embeddings_;
};

// A memory server on `data`; port 0: one of its own choice.
class MemoryProcess {
 public:
  explicit MemoryProcess(const std::string& data, const std::string& port = "0",
                         const std::vector<std::string>& flags = {});
  ChildProcess& process() { return *process_; }
  const std::string& port() const { return port_; }
  std::string target() const { return "localhost:" + port_; }
  std::unique_ptr<MemoryClient> Connect() const;

 private:
  std::unique_ptr<ChildProcess> process_;
  std::string port_;
};

// `count` ids that the model would find in a story: the same for a seed.
std::vector<int32_t> StoryIds(const OfflineModel& model, int count, int seed);

v1::GenerateRequest RequestOf(const std::vector<int32_t>& prompt, int max_new_tokens,
                              const std::string& knowledge_base = "");

}  // namespace memory3
