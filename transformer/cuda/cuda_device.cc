#include "transformer/cuda/cuda_device.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transformer/check.h"

namespace memory3 {
namespace {

// cuBLASLt's advice for Hopper.
constexpr size_t kWorkspaceBytes = size_t{64} << 20;
// Graphs kept; past it all are dropped and made again as they are needed.
constexpr int kMostRecordings = 512;

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options) {
  absl::StatusOr<std::unique_ptr<CudaDevice>> device = CudaDevice::Make(options);
  if (!device.ok()) return device.status();
  return *std::move(device);
}

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Make(const CudaDeviceOptions& options) {
  if (options.activations != DType::kBF16 && options.activations != DType::kF32) {
    return absl::InvalidArgumentError("cuda: activations must be bf16 or f32");
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return absl::FailedPreconditionError(
        absl::StrCat("cuda: no usable GPU: ", cudaGetErrorString(error)));
  }
  if (options.ordinal < 0 || options.ordinal >= count) {
    return absl::FailedPreconditionError(
        absl::StrCat("cuda: no GPU ", options.ordinal, ", this machine has ", count));
  }
  cudaDeviceProp properties;
  absl::Status status =
      CudaStatus(cudaGetDeviceProperties(&properties, options.ordinal), "device properties");
  if (!status.ok()) return status;
  if (properties.major < 8) {
    return absl::FailedPreconditionError(absl::StrCat("cuda: ", properties.name, " is sm_",
                                                      properties.major, properties.minor,
                                                      ", sm_80 or newer is needed"));
  }
  std::unique_ptr<CudaDevice> device(new CudaDevice(options.ordinal, options.activations));
  device->gpu_name_ = properties.name;
  device->multiprocessors_ = properties.multiProcessorCount;
  status.Update(CudaStatus(cudaSetDevice(options.ordinal), "device"));
  status.Update(CudaStatus(cudaStreamCreateWithFlags(&device->stream_, cudaStreamNonBlocking),
                           "compute stream"));
  status.Update(CudaStatus(cudaMalloc(&device->workspace_, kWorkspaceBytes), "workspace"));
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<CublasLt>> lt =
      CublasLt::Open(device->workspace_, kWorkspaceBytes);
  if (!lt.ok()) return lt.status();
  device->lt_ = *std::move(lt);
  device->aside_ = std::make_unique<AsideUploader>(options.ordinal);
  return device;
}

CudaDevice::~CudaDevice() {
  Bind();
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  DropRecordings();
  for (const ScratchMemory& memory : scratch_) cudaFree(memory.data);
  for (const FrequencyTable& table : frequencies_) cudaFree(table.device);
  for (const auto& batch : prepared_) {
    if (batch != nullptr) cudaFree(batch->memory);
  }
  lt_.reset();
  cudaFree(workspace_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

std::string CudaDevice::name() const { return absl::StrCat("cuda:", ordinal_, " ", gpu_name_); }

// ---- memory ----

absl::StatusOr<Buffer> CudaDevice::Allocate(size_t bytes) {
  Bind();
  // A buffer of no bytes has memory too, so that every buffer's address is its own.
  const size_t size = std::max<size_t>(bytes, 1);
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, size);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(
        absl::StrCat(name(), ": ", bytes, " bytes: ", cudaGetErrorString(error)));
  }
  Buffer buffer(this, data, bytes);
  // On a stream of this thread: the compute stream may be recording for another one.
  error = cudaMemsetAsync(data, 0, size, cudaStreamPerThread);
  if (error == cudaSuccess) error = cudaStreamSynchronize(cudaStreamPerThread);
  if (error != cudaSuccess) return CudaStatus(error, "zeroing memory");
  return buffer;
}

void CudaDevice::Free(void* data) {
  Bind();
  cudaFree(data);  // waits for work that may still read it
}

void CudaDevice::Upload(void* device, const void* host, size_t bytes) {
  if (bytes == 0 || !NotRecordable()) return;
  Bind();
  // From pageable memory: `host` has been read when the call returns.
  Note(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), "upload");
}

absl::Status CudaDevice::Download(void* host, const void* device, size_t bytes) {
  if (!NotRecordable()) return absl::InternalError("cuda: a download among recorded operations");
  Bind();
  if (bytes > 0) {
    Note(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "download");
  }
  return Synchronize();
}

void CudaDevice::Copy(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  Bind();
  Note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy");
}

void CudaDevice::Zero(void* device, size_t bytes) {
  if (bytes == 0) return;
  Bind();
  Note(cudaMemsetAsync(device, 0, bytes, stream_), "zero");
}

absl::Status CudaDevice::Synchronize() {
  if (!NotRecordable()) return absl::InternalError("cuda: a wait among recorded operations");
  Bind();
  Note(cudaStreamSynchronize(stream_), "compute");
  return std::exchange(status_, absl::OkStatus());
}

absl::Status CudaDevice::UploadAside(void* device, const void* host, size_t bytes) {
  return aside_->Upload(device, host, bytes);
}

void CudaDevice::Note(absl::Status status) { status_.Update(std::move(status)); }

void CudaDevice::Note(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here; not to be found by the next launch, which may be well
  Note(CudaStatus(error, what));
}

void* CudaDevice::Scratch(ScratchUse use, size_t bytes) {
  ScratchMemory& memory = scratch_[use];
  if (memory.bytes >= bytes && memory.data != nullptr) return memory.data;
  if (recording_) {
    recording_failed_ = true;
    return nullptr;
  }
  cudaFree(memory.data);
  memory = {};
  ++generation_;
  const size_t size = std::max<size_t>(bytes + bytes / 4, 4096);
  const cudaError_t error = cudaMalloc(&memory.data, size);
  if (error != cudaSuccess) {
    cudaGetLastError();
    memory.data = nullptr;
    Note(error, "scratch memory");
    return nullptr;
  }
  memory.bytes = size;
  return memory.data;
}

void* CudaDevice::HostData(const void* host, size_t bytes) {
  if (!NotRecordable()) return nullptr;
  void* device = Scratch(kHostData, bytes);
  if (device == nullptr) return nullptr;
  absl::StatusOr<void*> staged = staging_.Next(bytes);
  if (!staged.ok()) {
    Note(staged.status());
    return nullptr;
  }
  std::memcpy(*staged, host, bytes);
  absl::Status status = staging_.Send(device, bytes, stream_);
  if (status.ok()) return device;
  Note(std::move(status));
  return nullptr;
}

// ---- recording ----

bool CudaDevice::NotRecordable() {
  took_host_data_ = true;
  if (recording_) recording_failed_ = true;
  return !recording_;
}

const CudaPreparedBatch* CudaDevice::Use(const PreparedBatch& batch) {
  const auto& prepared = static_cast<const CudaPreparedBatch&>(batch);
  if (!prepared.valid) return nullptr;
  if (std::find(used_.begin(), used_.end(), &prepared) == used_.end()) used_.push_back(&prepared);
  return &prepared;
}

bool CudaDevice::Matches(const Recording& recording) const {
  if (recording.generation != generation_) return false;
  for (const auto& [slot, signature] : recording.batches) {
    const CudaPreparedBatch* batch = prepared_[slot].get();
    if (!batch->valid || batch->signature != signature) return false;
  }
  return true;
}

void CudaDevice::DropRecordings() {
  for (auto& [key, recordings] : recordings_) {
    for (const Recording& recording : recordings) {
      if (recording.graph != nullptr) cudaGraphExecDestroy(recording.graph);
    }
  }
  recordings_.clear();
  recording_count_ = 0;
}

bool CudaDevice::Record(Recording& recording, const std::function<void()>& operations) {
  // Other threads may allocate meanwhile.
  if (cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  recording_ = true;
  recording_failed_ = false;
  operations();
  recording_ = false;
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamEndCapture(stream_, &graph);
  if (error == cudaSuccess && !recording_failed_) {
    error = cudaGraphInstantiate(&recording.graph, graph, 0);
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (error == cudaSuccess && recording.graph != nullptr) return true;
  cudaGetLastError();
  recording.graph = nullptr;
  return false;
}

void CudaDevice::Run(uint64_t key, const std::function<void()>& operations) {
  Bind();
  if (key == 0 || recording_ || !status_.ok()) {
    operations();
    return;
  }
  auto& recordings = recordings_[key];
  const auto found = std::find_if(recordings.begin(), recordings.end(),
                                  [&](const Recording& r) { return Matches(r); });
  if (found == recordings.end()) {
    // The first time the operations run one by one: that finds the products' algorithms, makes the
    // scratch memory as large as it must be, and tells which batches are read.
    used_.clear();
    took_host_data_ = false;
    operations();
    if (!status_.ok()) return;
    if (recording_count_ >= kMostRecordings) {
      DropRecordings();
    } else {
      std::erase_if(recordings, [&](const Recording& r) {
        if (r.generation == generation_) return false;
        if (r.graph != nullptr) cudaGraphExecDestroy(r.graph);
        --recording_count_;
        return true;
      });
    }
    Recording& recording = recordings_[key].emplace_back();
    for (const CudaPreparedBatch* batch : used_) {
      recording.batches.emplace_back(batch->slot, batch->signature);
    }
    recording.generation = generation_;
    recording.by_itself = took_host_data_;
    ++recording_count_;
    return;
  }
  Recording& recording = *found;
  if (!recording.by_itself && recording.graph == nullptr) {
    recording.by_itself = !Record(recording, operations);
  }
  if (recording.by_itself) {
    operations();
  } else {
    Note(cudaGraphLaunch(recording.graph, stream_), "graph");
  }
}

}  // namespace memory3
