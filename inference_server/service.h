// memory3.v1.InferenceService over an Inference: gRPC's callback interface, no thread a stream.
//
// What may block (a knowledge base looked up at the memory server) runs on a few threads behind a
// bounded queue; everything else on gRPC's own.
//
// Thread-safety: gRPC calls it from many threads. Inference must outlive it; its requests must have
// ended (Inference::Drain) before it is destroyed.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "inference_server/inference_api.h"
#include "inference_server/worker_threads.h"
#include "memory3/v1/inference.grpc.pb.h"

namespace memory3 {

struct InferenceServiceOptions {
  size_t stream_buffer_bytes = size_t{1} << 20;  // of events that a client has not read yet
  int admission_threads = 16;
  int max_admitting = 1024;  // calls that wait for those; more are RESOURCE_EXHAUSTED
};

// All methods take bytes, so that broken messages get an answer that names the field.
using RawInferenceService = v1::InferenceService::WithRawCallbackMethod_Generate<
    v1::InferenceService::WithRawCallbackMethod_GenerateUnary<
        v1::InferenceService::WithRawCallbackMethod_Score<
            v1::InferenceService::WithRawCallbackMethod_Tokenize<
                v1::InferenceService::WithRawCallbackMethod_Detokenize<
                    v1::InferenceService::WithRawCallbackMethod_GetModel<
                        v1::InferenceService::WithRawCallbackMethod_Abort<
                            v1::InferenceService::Service>>>>>>>;

class InferenceServiceImpl final : public RawInferenceService {
 public:
  InferenceServiceImpl(Inference* inference, const InferenceServiceOptions& options);

  // Waits until no call is open, at most so long.
  void AwaitNoCalls(absl::Duration limit);

  using Buffer = grpc::ByteBuffer;
  grpc::ServerWriteReactor<Buffer>* Generate(grpc::CallbackServerContext* context,
                                             const Buffer* request) override;
  grpc::ServerUnaryReactor* GenerateUnary(grpc::CallbackServerContext* context,
                                          const Buffer* request, Buffer* response) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context, const Buffer* request,
                                  Buffer* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const Buffer* request,
                                     Buffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const Buffer* request,
                                       Buffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context, const Buffer* request,
                                     Buffer* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const Buffer* request,
                                  Buffer* response) override;

 private:
  absl::StatusOr<Identity> Authenticate(const grpc::CallbackServerContext& context) const;
  // Runs `work` here, or, where it may block, on an admission thread. RESOURCE_EXHAUSTED: too many
  // wait for one.
  absl::Status RunAdmission(bool may_block, std::function<void()> work);
  // Identity and message of a call that becomes a request of the engine's: `submit`, also given
  // when the call came, gives its number or why there is none, and `call` is told.
  template <typename Request, typename Call, typename Submit>
  void Admit(const grpc::CallbackServerContext& context, const Buffer& buffer,
             std::shared_ptr<Call> call, Submit submit);
  // A call that is answered at once by method(identity, request).
  template <typename Request, typename Method>
  grpc::ServerUnaryReactor* AnswerNow(grpc::CallbackServerContext* context, const Buffer& buffer,
                                      Buffer* response, Method method);
  // How long a client had better wait that gets this status.
  std::optional<absl::Duration> RetryHint(const absl::Status& status) const;

  Inference* const inference_;
  const InferenceServiceOptions options_;
  struct OpenCalls;
  // Counts a call as open for as long as it is held.
  std::shared_ptr<void> Open() const;

  const std::shared_ptr<OpenCalls> calls_;
  std::mutex mutex_;  // guards admitting_
  int admitting_ = 0;
  WorkerThreads pump_;  // writes to streams
  WorkerThreads admission_;
};

}  // namespace memory3
