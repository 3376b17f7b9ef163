// What every door of the inference server (gRPC, HTTP) calls: requests of the wire in, events out.
// Checks them, resolves and pins the knowledge base, and hands them to the engine.
//
// A door exists before the model does: until Serve has been called, and again once Drain has, every
// call answers UNAVAILABLE.
//
// Errors are those of inference.proto; a message names the field and its value.
//
// Thread-safety: every method from any thread, but for Serve, Drain and the destructor: one thread.
// Ownership: owns the model it serves. A sink is held until its End has been called, which happens
// for every request that was taken, at the latest in the destructor. Doors must be closed before
// the destructor runs.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "inference_server/engine.h"
#include "inference_server/inference_metrics.h"
#include "inference_server/loaded_model.h"
#include "memory3/v1/inference.pb.h"
#include "serving/api_keys.h"
#include "transformer/chat_template.h"

namespace memory3 {

class Inference {
 public:
  using ScoreCallback = std::function<void(absl::StatusOr<v1::ScoreResponse>)>;
  using UnaryCallback = std::function<void(absl::StatusOr<v1::GenerateUnaryResponse>)>;

  Inference();
  ~Inference();
  Inference(const Inference&) = delete;
  Inference& operator=(const Inference&) = delete;

  // ---- life ----
  // From now on requests are taken. Once.
  void Serve(std::unique_ptr<LoadedModel> model);
  // Refuses new requests with UNAVAILABLE, waits up to `limit` for those that run, then ends them
  // with UNAVAILABLE.
  void Drain(absl::Duration limit);
  // OK: the model is loaded and requests are taken. UNAVAILABLE says what stands in the way.
  absl::Status Ready() const;

  // ---- who asks ----
  void SetApiKeys(ApiKeys keys);
  // As ApiKeys::Authenticate, for the header `authorization`.
  absl::StatusOr<Identity> Authenticate(std::string_view authorization) const;

  // ---- requests ----
  // Generate and Score may block while the knowledge base is looked up at the memory server, for as
  // long as the request's policy lets a chunk wait at most. They answer a number for Cancel, and
  // call `sink` (`done`) only where they do; that may be before they return.
  // `arrived`: what the request's times and deadlines count from.
  absl::StatusOr<uint64_t> Generate(const Identity& identity, const v1::GenerateRequest& request,
                                    std::shared_ptr<EventSink> sink,
                                    absl::Time arrived = absl::Now());
  absl::StatusOr<uint64_t> Score(const Identity& identity, const v1::ScoreRequest& request,
                                 ScoreCallback done, absl::Time arrived = absl::Now());
  // True: Generate (Score) with these options asks the memory server, so that it may block.
  static bool MayBlock(const v1::MemoryOptions& memory);
  // Ends it within a decode step; its sink hears CANCELLED. Unknown numbers do nothing.
  void Cancel(uint64_t number);
  absl::Status Abort(const Identity& identity, const v1::AbortRequest& request);
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request) const;
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request) const;
  // Blocks while the memory server lists its knowledge bases; one that cannot has none listed.
  absl::StatusOr<v1::GetModelResponse> GetModel(const Identity& identity) const;

  // ---- for the OpenAI-compatible door ----
  // The model's name; empty while none is served.
  std::string model_name() const;
  // The prompt of a conversation, by the model's chat template. INVALID_ARGUMENT names the message.
  absl::StatusOr<std::vector<int32_t>> EncodeChat(std::span<const ChatMessage> messages) const;
  // What ends an answer of a chat besides the model's eos; to be added to a request's stops.
  absl::StatusOr<ChatStops> StopsOfChat() const;

  // ---- state ----
  // When a client that was refused with RESOURCE_EXHAUSTED had better try again.
  absl::Duration RetryAfter() const;
  EngineStats stats() const;
  // The page of /metrics, in Prometheus' text format.
  std::string MetricsText() const;
  InferenceMetrics& metrics() { return *metrics_; }

 private:
  class ObservedSink;

  // The model while requests are taken, and counts one call in; UNAVAILABLE otherwise.
  class Use;
  absl::StatusOr<Use> Enter() const;
  // The same as long as there is a model, also while it drains.
  std::optional<Use> Peek() const;
  void Leave() const;
  // What `options` ask for, with the knowledge base opened.
  absl::StatusOr<MemoryPlan> PlanMemory(const LoadedModel& model, const Identity& identity,
                                        const v1::MemoryOptions& options, absl::Time arrived) const;
  absl::StatusOr<uint64_t> Submit(const LoadedModel& model, EngineRequest request,
                                  std::shared_ptr<EventSink> sink);

  const std::shared_ptr<InferenceMetrics> metrics_;
  mutable std::mutex mutex_;  // guards what follows but requests_
  mutable std::condition_variable left_;
  std::shared_ptr<const ApiKeys> keys_;
  std::unique_ptr<LoadedModel> model_;  // stays while calls_ > 0
  enum class State : uint8_t { kLoading, kServing, kDraining } state_ = State::kLoading;
  mutable int calls_ = 0;  // inside a method that uses the model
  // Requests taken whose End has not returned; sinks share it.
  struct RequestCount;
  const std::shared_ptr<RequestCount> requests_;
};

// A sink that collects the answer of a unary Generate and gives it to `done`, once.
std::shared_ptr<EventSink> CollectUnary(Inference::UnaryCallback done);

}  // namespace memory3
