// Copies from host to device through pinned memory.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace memory3 {

// "cuda: WHAT: the runtime's text"; RESOURCE_EXHAUSTED for memory, INTERNAL for the rest, OK for
// cudaSuccess.
absl::Status CudaStatus(cudaError_t error, const char* what);

// Host memory that the device copies from at full speed.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  // At least `bytes`; what was there is lost. The buffer must not be in use by a copy.
  absl::Status Reserve(size_t bytes);
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Small uploads queued on the compute stream: the caller fills Next's memory, Send copies it. A few
// buffers take turns, so that filling one does not wait for the copy before.
//
// Thread-safety: one thread.
class StagingRing {
 public:
  StagingRing() = default;
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  // Memory for the next upload of `bytes`, waiting for the copy that used it last.
  absl::StatusOr<void*> Next(size_t bytes);
  // Queues the copy of what Next gave.
  absl::Status Send(void* device, size_t bytes, cudaStream_t stream);

 private:
  static constexpr int kBuffers = 4;
  struct Slot {
    PinnedBuffer buffer;
    cudaEvent_t copied = nullptr;
  };
  Slot slots_[kBuffers];
  int next_ = 0;
};

// Uploads beside compute, on a stream of their own, from any threads at once.
class AsideUploader {
 public:
  explicit AsideUploader(int ordinal) : ordinal_(ordinal) {}
  ~AsideUploader();
  AsideUploader(const AsideUploader&) = delete;
  AsideUploader& operator=(const AsideUploader&) = delete;

  // Returns when the bytes are there.
  absl::Status Upload(void* device, const void* host, size_t bytes);
  // Queues work that reads the uploaded bytes on the stream; answers the launch's error.
  using Use = std::function<cudaError_t(const void* device, cudaStream_t stream)>;
  // Brings the bytes to device memory of the uploader's own, calls `use` and returns when its work
  // is done too.
  absl::Status UploadFor(const Use& use, const void* host, size_t bytes);

 private:
  // Two halves of pinned memory: one is filled while the other is copied.
  static constexpr size_t kHalfBytes = size_t{2} << 20;
  static constexpr int kMostLanes = 4;
  struct Lane {
    PinnedBuffer buffer;
    cudaStream_t stream = nullptr;
    cudaEvent_t copied[2] = {nullptr, nullptr};
    void* device = nullptr;  // UploadFor's
    size_t device_bytes = 0;
    ~Lane();
  };

  // Waits for a free lane.
  absl::StatusOr<std::unique_ptr<Lane>> Take();
  void Return(std::unique_ptr<Lane> lane);
  // Queues the copies; `host` has been read when it returns.
  static cudaError_t Copy(Lane& lane, void* device, const void* host, size_t bytes);

  const int ordinal_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<std::unique_ptr<Lane>> free_;
  int lanes_ = 0;
};

}  // namespace memory3
