#include "inference_server/generate_stream.h"

#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "inference_server/wire_message.h"
#include "serving/status.h"

namespace memory3 {
namespace {

constexpr size_t kEventBytes = 64;  // of an event in the queue, whatever is in it

}  // namespace

std::shared_ptr<GenerateStream> GenerateStream::Create(grpc::CallbackServerContext* context,
                                                       Inference* inference, WorkerThreads* pump,
                                                       size_t buffer_bytes,
                                                       std::shared_ptr<void> open) {
  std::shared_ptr<GenerateStream> stream(
      new GenerateStream(context, inference, pump, buffer_bytes, std::move(open)));
  const std::lock_guard lock(stream->mutex_);
  stream->self_ = stream;
  return stream;
}

void GenerateStream::Taken(uint64_t number) {
  {
    const std::lock_guard lock(mutex_);
    number_ = number;
    if (!cancelled_ && !overflowed_) return;
  }
  inference_->Cancel(number);
}

void GenerateStream::Refused(const absl::Status& status,
                             std::optional<absl::Duration> retry_after) {
  if (retry_after) {
    context_->AddTrailingMetadata("retry-after-ms",
                                  absl::StrCat(absl::ToInt64Milliseconds(*retry_after)));
  }
  Finish(ToGrpc(status));
}

bool GenerateStream::cancelled() const {
  const std::lock_guard lock(mutex_);
  return cancelled_;
}

void GenerateStream::Send(v1::GenerateResponse event) {
  std::optional<uint64_t> cancel;
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_ || overflowed_) return;
    // One event may be larger than the buffer; what waits before it must not be.
    if (queued_bytes_ > buffer_bytes_) {
      overflowed_ = true;
      DropQueue();
      cancel = number_;
    } else {
      size_t bytes = event.ByteSizeLong();
      if (event.has_delta() && !queue_.empty() && queue_.back().message.has_delta()) {
        v1::Delta& last = *queue_.back().message.mutable_delta();
        last.mutable_text()->append(event.delta().text());
        last.mutable_token_ids()->MergeFrom(event.delta().token_ids());
        for (v1::TokenLogprobs& logprobs : *event.mutable_delta()->mutable_logprobs())
          last.add_logprobs()->Swap(&logprobs);
        queue_.back().bytes += bytes;
      } else {
        bytes += kEventBytes;
        queue_.push_back({std::move(event), bytes});
      }
      queued_bytes_ += bytes;
      Schedule();
    }
  }
  if (cancel) inference_->Cancel(*cancel);
}

void GenerateStream::End(absl::Status status) {
  const std::lock_guard lock(mutex_);
  if (overflowed_) {
    status = absl::AbortedError(absl::StrCat("the client does not read: more than ", buffer_bytes_,
                                             " bytes of events wait to be sent"));
  }
  ended_ = std::move(status);
  Schedule();
}

void GenerateStream::Schedule() {
  if (busy_) return;
  busy_ = true;
  pump_->Add([self = shared_from_this()] { self->WriteNext(); });
}

void GenerateStream::DropQueue() {
  queue_.clear();
  queued_bytes_ = 0;
}

void GenerateStream::WriteNext() {
  std::optional<Event> event;
  std::optional<absl::Status> ended;
  {
    const std::lock_guard lock(mutex_);
    if (!queue_.empty()) {
      event = std::move(queue_.front());
      queue_.pop_front();
      queued_bytes_ -= event->bytes;
    } else {
      ended.swap(ended_);
      busy_ = ended.has_value();  // for good, once the stream ends
    }
  }
  if (event) {
    written_ = SerializeMessage(event->message);
    StartWrite(&written_);
  } else if (ended) {
    Finish(ToGrpc(*ended));
  }
}

void GenerateStream::OnWriteDone(bool ok) {
  const std::lock_guard lock(mutex_);
  if (!ok) DropQueue();  // the client is gone; OnCancel says so too
  busy_ = false;
  if (!queue_.empty() || ended_) Schedule();
}

void GenerateStream::OnCancel() {
  std::optional<uint64_t> number;
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    DropQueue();
    number = number_;
  }
  if (number) inference_->Cancel(*number);
}

void GenerateStream::OnDone() {
  std::shared_ptr<GenerateStream> self;
  const std::lock_guard lock(mutex_);
  self = std::move(self_);  // outlives the lock
}

}  // namespace memory3
