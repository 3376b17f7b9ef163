// One Generate call: the sink of a running request and the stream to its client.
//
// The engine's thread only queues events; a thread of the service's pump serializes and writes
// them. One write is under way at a time; while it is, deltas that follow each other grow together.
// A client that does not read fills the queue up to its bound, whereupon the queue is dropped, the
// request cancelled, and the stream ends with ABORTED as soon as the client takes what was being
// written.
//
// Thread-safety: any thread, as gRPC's reactors are used. Ownership: owns itself until gRPC is done
// with it (OnDone); the engine's reference goes with End. Inference and pump must outlive both.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "inference_server/inference_api.h"
#include "inference_server/worker_threads.h"

namespace memory3 {

class GenerateStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                             public EventSink,
                             public std::enable_shared_from_this<GenerateStream> {
 public:
  // `open` is let go of when gRPC is done with the stream.
  static std::shared_ptr<GenerateStream> Create(grpc::CallbackServerContext* context,
                                                Inference* inference, WorkerThreads* pump,
                                                size_t buffer_bytes, std::shared_ptr<void> open);

  // The engine has taken the request under this number.
  void Taken(uint64_t number);
  // It has not: the call ends with this. `retry_after`: goes along, where given.
  void Refused(const absl::Status& status, std::optional<absl::Duration> retry_after);
  bool cancelled() const;

  // EventSink.
  void Send(v1::GenerateResponse event) override;
  void Scored(ContinuationScore) override {}
  void End(absl::Status status) override;

  // The reactor.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  GenerateStream(grpc::CallbackServerContext* context, Inference* inference, WorkerThreads* pump,
                 size_t buffer_bytes, std::shared_ptr<void> open)
      : context_(context),
        inference_(inference),
        pump_(pump),
        buffer_bytes_(buffer_bytes),
        open_(std::move(open)) {}

  // Has the pump write what there is to write. For these two mutex_ is held.
  void Schedule();
  void DropQueue();
  void WriteNext();

  grpc::CallbackServerContext* const context_;
  Inference* const inference_;
  WorkerThreads* const pump_;
  const size_t buffer_bytes_;
  const std::shared_ptr<void> open_;

  mutable std::mutex mutex_;  // guards what follows but written_
  std::shared_ptr<GenerateStream> self_;
  std::optional<uint64_t> number_;
  bool cancelled_ = false;   // the client is gone
  bool overflowed_ = false;  // the client does not read
  bool busy_ = false;        // scheduled, or a write is under way
  struct Event {
    v1::GenerateResponse message;
    size_t bytes = 0;  // about
  };
  std::deque<Event> queue_;
  size_t queued_bytes_ = 0;
  std::optional<absl::Status> ended_;
  grpc::ByteBuffer written_;  // of the write under way
};

}  // namespace memory3
