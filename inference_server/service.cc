#include "inference_server/service.h"

#include <condition_variable>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "inference_server/generate_stream.h"
#include "inference_server/wire_message.h"
#include "serving/status.h"

namespace memory3 {
namespace {

constexpr int kPumpThreads = 2;

// A unary call whose answer comes later, maybe from a request of the engine's that a client's going
// away ends. Owns itself until gRPC is done with it; whoever answers holds a reference.
class UnaryCall final : public grpc::ServerUnaryReactor,
                        public std::enable_shared_from_this<UnaryCall> {
 public:
  static std::shared_ptr<UnaryCall> Create(grpc::CallbackServerContext* context,
                                           grpc::ByteBuffer* response, Inference* inference,
                                           std::shared_ptr<void> open) {
    std::shared_ptr<UnaryCall> call(new UnaryCall(context, response, inference, std::move(open)));
    const std::lock_guard lock(call->mutex_);
    call->self_ = call;
    return call;
  }

  // One of these two ends the call.
  void Refused(const absl::Status& status, std::optional<absl::Duration> retry_after) {
    if (retry_after) {
      context_->AddTrailingMetadata("retry-after-ms",
                                    absl::StrCat(absl::ToInt64Milliseconds(*retry_after)));
    }
    Finish(ToGrpc(status));
  }
  template <typename Response>
  void End(const absl::StatusOr<Response>& response) {
    if (response.ok()) *response_ = SerializeMessage(*response);
    Finish(ToGrpc(response.status()));
  }

  void Taken(uint64_t number) {
    {
      const std::lock_guard lock(mutex_);
      number_ = number;
      if (!cancelled_) return;
    }
    inference_->Cancel(number);
  }
  bool cancelled() const {
    const std::lock_guard lock(mutex_);
    return cancelled_;
  }

  void OnCancel() override {
    std::optional<uint64_t> number;
    {
      const std::lock_guard lock(mutex_);
      cancelled_ = true;
      number = number_;
    }
    if (number) inference_->Cancel(*number);
  }
  void OnDone() override {
    std::shared_ptr<UnaryCall> self;
    const std::lock_guard lock(mutex_);
    self = std::move(self_);  // outlives the lock
  }

 private:
  UnaryCall(grpc::CallbackServerContext* context, grpc::ByteBuffer* response, Inference* inference,
            std::shared_ptr<void> open)
      : context_(context), response_(response), inference_(inference), open_(std::move(open)) {}

  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_;
  Inference* const inference_;
  const std::shared_ptr<void> open_;
  mutable std::mutex mutex_;  // guards what follows
  std::shared_ptr<UnaryCall> self_;
  std::optional<uint64_t> number_;
  bool cancelled_ = false;
};

}  // namespace

struct InferenceServiceImpl::OpenCalls {
  std::mutex mutex;  // guards what follows
  std::condition_variable closed;
  int count = 0;
};

InferenceServiceImpl::InferenceServiceImpl(Inference* inference,
                                           const InferenceServiceOptions& options)
    : inference_(inference),
      options_(options),
      calls_(std::make_shared<OpenCalls>()),
      pump_(kPumpThreads),
      admission_(options.admission_threads) {}

std::shared_ptr<void> InferenceServiceImpl::Open() const {
  const std::lock_guard lock(calls_->mutex);
  ++calls_->count;
  return {nullptr, [calls = calls_](void*) {
            const std::lock_guard closing(calls->mutex);
            if (--calls->count == 0) calls->closed.notify_all();
          }};
}

void InferenceServiceImpl::AwaitNoCalls(absl::Duration limit) {
  std::unique_lock lock(calls_->mutex);
  calls_->closed.wait_for(lock, absl::ToChronoMilliseconds(limit),
                          [this] { return calls_->count == 0; });
}

absl::StatusOr<Identity> InferenceServiceImpl::Authenticate(
    const grpc::CallbackServerContext& context) const {
  const auto& metadata = context.client_metadata();
  const auto header = metadata.find("authorization");
  return inference_->Authenticate(
      header == metadata.end() ? std::string_view()
                               : std::string_view(header->second.data(), header->second.size()));
}

absl::Status InferenceServiceImpl::RunAdmission(bool may_block, std::function<void()> work) {
  if (!may_block) {
    work();
    return absl::OkStatus();
  }
  {
    const std::lock_guard lock(mutex_);
    if (admitting_ >= options_.max_admitting) {
      return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", admitting_,
                                                       " requests wait for their knowledge base"));
    }
    ++admitting_;
  }
  admission_.Add([this, work = std::move(work)] {
    work();
    const std::lock_guard lock(mutex_);
    --admitting_;
  });
  return absl::OkStatus();
}

std::optional<absl::Duration> InferenceServiceImpl::RetryHint(const absl::Status& status) const {
  if (!absl::IsResourceExhausted(status)) return std::nullopt;
  return inference_->RetryAfter();
}

template <typename Request, typename Call, typename Submit>
void InferenceServiceImpl::Admit(const grpc::CallbackServerContext& context, const Buffer& buffer,
                                 std::shared_ptr<Call> call, Submit submit) {
  const absl::Time arrived = absl::Now();
  absl::StatusOr<Identity> identity = Authenticate(context);
  auto request = std::make_shared<Request>();
  absl::Status status = identity.ok() ? ParseMessage(buffer, request.get()) : identity.status();
  if (status.ok()) {
    const bool may_block = Inference::MayBlock(request->memory());
    status = RunAdmission(
        may_block, [this, call, request, submit, arrived, identity = *std::move(identity)] {
          if (call->cancelled()) {
            call->Refused(absl::CancelledError("the client is gone"), std::nullopt);
            return;
          }
          const absl::StatusOr<uint64_t> number = submit(identity, *request, arrived);
          if (number.ok()) {
            call->Taken(*number);
          } else {
            call->Refused(number.status(), RetryHint(number.status()));
          }
        });
  }
  if (!status.ok()) call->Refused(status, RetryHint(status));
}

template <typename Request, typename Method>
grpc::ServerUnaryReactor* InferenceServiceImpl::AnswerNow(grpc::CallbackServerContext* context,
                                                          const Buffer& buffer, Buffer* response,
                                                          Method method) {
  const std::shared_ptr<UnaryCall> call = UnaryCall::Create(context, response, inference_, Open());
  const absl::StatusOr<Identity> identity = Authenticate(*context);
  Request request;
  absl::Status status = identity.ok() ? ParseMessage(buffer, &request) : identity.status();
  if (status.ok()) {
    call->End(method(*identity, request));
  } else {
    call->Refused(status, std::nullopt);
  }
  return call.get();
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceServiceImpl::Generate(
    grpc::CallbackServerContext* context, const Buffer* request) {
  const std::shared_ptr<GenerateStream> stream =
      GenerateStream::Create(context, inference_, &pump_, options_.stream_buffer_bytes, Open());
  Admit<v1::GenerateRequest>(*context, *request, stream,
                             [this, stream](const Identity& identity, const auto& r, absl::Time t) {
                               return inference_->Generate(identity, r, stream, t);
                             });
  return stream.get();
}

grpc::ServerUnaryReactor* InferenceServiceImpl::GenerateUnary(grpc::CallbackServerContext* context,
                                                              const Buffer* request,
                                                              Buffer* response) {
  const std::shared_ptr<UnaryCall> call = UnaryCall::Create(context, response, inference_, Open());
  Admit<v1::GenerateRequest>(
      *context, *request, call,
      [this, call](const Identity& identity, const auto& r, absl::Time t) {
        return inference_->Generate(
            identity, r,
            CollectUnary([call](const absl::StatusOr<v1::GenerateUnaryResponse>& answer) {
              call->End(answer);
            }),
            t);
      });
  return call.get();
}

grpc::ServerUnaryReactor* InferenceServiceImpl::Score(grpc::CallbackServerContext* context,
                                                      const Buffer* request, Buffer* response) {
  const std::shared_ptr<UnaryCall> call = UnaryCall::Create(context, response, inference_, Open());
  Admit<v1::ScoreRequest>(
      *context, *request, call,
      [this, call](const Identity& identity, const auto& r, absl::Time t) {
        return inference_->Score(
            identity, r,
            [call](const absl::StatusOr<v1::ScoreResponse>& answer) { call->End(answer); }, t);
      });
  return call.get();
}

grpc::ServerUnaryReactor* InferenceServiceImpl::Tokenize(grpc::CallbackServerContext* context,
                                                         const Buffer* request, Buffer* response) {
  return AnswerNow<v1::TokenizeRequest>(
      context, *request, response,
      [this](const Identity&, const auto& r) { return inference_->Tokenize(r); });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::Detokenize(grpc::CallbackServerContext* context,
                                                           const Buffer* request,
                                                           Buffer* response) {
  return AnswerNow<v1::DetokenizeRequest>(
      context, *request, response,
      [this](const Identity&, const auto& r) { return inference_->Detokenize(r); });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::Abort(grpc::CallbackServerContext* context,
                                                      const Buffer* request, Buffer* response) {
  return AnswerNow<v1::AbortRequest>(
      context, *request, response,
      [this](const Identity& identity, const auto& r) -> absl::StatusOr<v1::AbortResponse> {
        if (absl::Status status = inference_->Abort(identity, r); !status.ok()) return status;
        return v1::AbortResponse();
      });
}

grpc::ServerUnaryReactor* InferenceServiceImpl::GetModel(grpc::CallbackServerContext* context,
                                                         const Buffer* request, Buffer* response) {
  const std::shared_ptr<UnaryCall> call = UnaryCall::Create(context, response, inference_, Open());
  absl::StatusOr<Identity> identity = Authenticate(*context);
  v1::GetModelRequest message;
  absl::Status status = identity.ok() ? ParseMessage(*request, &message) : identity.status();
  if (status.ok()) {
    status = RunAdmission(/*may_block=*/true, [this, call, identity = *std::move(identity)] {
      call->End(inference_->GetModel(identity));
    });
  }
  if (!status.ok()) call->Refused(status, RetryHint(status));
  return call.get();
}

}  // namespace memory3
