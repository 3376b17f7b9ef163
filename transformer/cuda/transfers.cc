#include "transformer/cuda/transfers.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace memory3 {

absl::Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message = absl::StrCat("cuda: ", what, ": ", cudaGetErrorString(error));
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(message)
                                            : absl::InternalError(message);
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

absl::Status PinnedBuffer::Reserve(size_t bytes) {
  if (bytes <= bytes_) return absl::OkStatus();
  if (data_ != nullptr) cudaFreeHost(data_);
  data_ = nullptr;
  bytes_ = 0;
  const absl::Status status = CudaStatus(cudaMallocHost(&data_, bytes), "pinned memory");
  if (status.ok()) {
    bytes_ = bytes;
  } else {
    data_ = nullptr;
    cudaGetLastError();  // reported; not to be found by the next launch
  }
  return status;
}

StagingRing::~StagingRing() {
  for (Slot& slot : slots_) {
    if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
  }
}

absl::StatusOr<void*> StagingRing::Next(size_t bytes) {
  Slot& slot = slots_[next_];
  cudaError_t error;
  if (slot.copied == nullptr) {
    error = cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming);
  } else {
    error = cudaEventSynchronize(slot.copied);
  }
  if (error != cudaSuccess) return CudaStatus(error, "staging");
  if (slot.buffer.bytes() < bytes) {
    const absl::Status status = slot.buffer.Reserve(std::max<size_t>(bytes + bytes / 2, 64 << 10));
    if (!status.ok()) return status;
  }
  return slot.buffer.data();
}

absl::Status StagingRing::Send(void* device, size_t bytes, cudaStream_t stream) {
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % kBuffers;
  const cudaError_t error =
      cudaMemcpyAsync(device, slot.buffer.data(), bytes, cudaMemcpyHostToDevice, stream);
  if (error != cudaSuccess) return CudaStatus(error, "upload");
  return CudaStatus(cudaEventRecord(slot.copied, stream), "upload");
}

AsideUploader::Lane::~Lane() {
  for (cudaEvent_t event : copied) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaFree(device);
}

AsideUploader::~AsideUploader() = default;

absl::StatusOr<std::unique_ptr<AsideUploader::Lane>> AsideUploader::Take() {
  {
    std::unique_lock lock(mutex_);
    returned_.wait(lock, [&] { return !free_.empty() || lanes_ < kMostLanes; });
    if (!free_.empty()) {
      std::unique_ptr<Lane> lane = std::move(free_.back());
      free_.pop_back();
      return lane;
    }
    ++lanes_;
  }
  auto lane = std::make_unique<Lane>();
  absl::Status status = lane->buffer.Reserve(2 * kHalfBytes);
  // Not ordered after the default stream, nor it after this.
  status.Update(CudaStatus(cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking),
                           "stream for uploads"));
  for (cudaEvent_t& event : lane->copied) {
    status.Update(
        CudaStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event for uploads"));
  }
  if (!status.ok()) {
    lane.reset();
    std::lock_guard lock(mutex_);
    --lanes_;
    returned_.notify_one();
    return status;
  }
  return lane;
}

void AsideUploader::Return(std::unique_ptr<Lane> lane) {
  std::lock_guard lock(mutex_);
  free_.push_back(std::move(lane));
  returned_.notify_one();
}

cudaError_t AsideUploader::Copy(Lane& lane, void* device, const void* host, size_t bytes) {
  int half = 0;
  for (size_t at = 0; at < bytes; at += kHalfBytes, half = 1 - half) {
    const size_t piece = std::min(kHalfBytes, bytes - at);
    char* pinned = static_cast<char*>(lane.buffer.data()) + half * kHalfBytes;
    // At once where it was never recorded.
    cudaError_t error = cudaEventSynchronize(lane.copied[half]);
    if (error != cudaSuccess) return error;
    std::memcpy(pinned, static_cast<const char*>(host) + at, piece);
    error = cudaMemcpyAsync(static_cast<char*>(device) + at, pinned, piece, cudaMemcpyHostToDevice,
                            lane.stream);
    if (error == cudaSuccess) error = cudaEventRecord(lane.copied[half], lane.stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

absl::Status AsideUploader::Upload(void* device, const void* host, size_t bytes) {
  absl::Status status = CudaStatus(cudaSetDevice(ordinal_), "device");
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<Lane>> taken = Take();
  if (!taken.ok()) return taken.status();
  const cudaError_t error = Copy(**taken, device, host, bytes);
  const cudaError_t done = cudaStreamSynchronize((*taken)->stream);
  status = CudaStatus(error != cudaSuccess ? error : done, "upload aside");
  Return(*std::move(taken));
  return status;
}

absl::Status AsideUploader::UploadFor(const Use& use, const void* host, size_t bytes) {
  absl::Status status = CudaStatus(cudaSetDevice(ordinal_), "device");
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<Lane>> taken = Take();
  if (!taken.ok()) return taken.status();
  Lane& lane = **taken;
  if (lane.device_bytes < bytes) {
    cudaFree(lane.device);
    lane.device = nullptr;
    lane.device_bytes = 0;
    status = CudaStatus(cudaMalloc(&lane.device, bytes), "memory for uploads");
    if (status.ok()) {
      lane.device_bytes = bytes;
    } else {
      lane.device = nullptr;
      cudaGetLastError();  // reported; not to be found by the next launch
    }
  }
  if (status.ok()) {
    cudaError_t error = Copy(lane, lane.device, host, bytes);
    if (error == cudaSuccess) error = use(lane.device, lane.stream);
    const cudaError_t done = cudaStreamSynchronize(lane.stream);
    status = CudaStatus(error != cudaSuccess ? error : done, "upload and use aside");
  }
  Return(*std::move(taken));
  return status;
}

}  // namespace memory3
