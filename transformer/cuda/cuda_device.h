// The CUDA device: bf16 (or, to compare with the CPU, f32) activations, one compute stream.
//
// Products run on cuBLASLt, those of few rows on a kernel of our own; attention, norms and the rest
// are kernels in this directory, one concern a file. Operations queue and return; an error of any
// of them is kept and comes out of the next Synchronize or Download.
//
// What depends on the data of a step (ids, positions, the attention plan) goes through Prepare into
// device memory that stays where it is, so that Run can record the operations of a key once and
// replay them as a graph. A recording stands for the shapes it was made with: Run compares the
// signature of every batch it reads, and records again where one differs. Operations that take host
// data of their own (CrossEntropy's targets, references, AdamW's options, Upload) are never
// recorded: a key whose operations hold one runs them one by one.
//
// Thread-safety: as device.h says; Allocate, UploadAside, MakeVectorDecoder and the freeing of
// buffers from any thread. Ownership: owns its streams and scratch memory; must outlive its
// buffers.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/cuda/attention.h"
#include "transformer/cuda/cublaslt.h"
#include "transformer/cuda/plan.h"
#include "transformer/cuda/prepared_batch.h"
#include "transformer/cuda/transfers.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

class CudaWeight;

class CudaDevice final : public Device {
 public:
  // FAILED_PRECONDITION: no such GPU, or one older than sm_80, or no cuBLASLt. INVALID_ARGUMENT:
  // activations neither bf16 nor f32.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Make(const CudaDeviceOptions& options);
  ~CudaDevice() override;

  cudaStream_t stream() const { return stream_; }
  // Every entry point's first step: this thread works on this device.
  void Bind() const { cudaSetDevice(ordinal_); }
  CublasLt& cublaslt() { return *lt_; }
  AsideUploader& aside() { return *aside_; }

  std::string name() const override;
  bool is_cpu() const override { return false; }
  DType activation_dtype() const override { return activations_; }

  // cuda_device.cc
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  void Upload(void* device, const void* host, size_t bytes) override;
  absl::Status Download(void* host, const void* device, size_t bytes) override;
  void Copy(void* to, const void* from, size_t bytes) override;
  void Zero(void* device, size_t bytes) override;
  absl::Status Synchronize() override;
  absl::Status UploadAside(void* device, const void* host, size_t bytes) override;
  void Run(uint64_t key, const std::function<void()>& operations) override;

  // vq_decode.cc
  bool DecodesVectors(CodecId codec) const override { return codec == CodecId::kVq; }
  absl::StatusOr<std::unique_ptr<VectorDecoder>> MakeVectorDecoder(const Codec& codec) override;

  // prepare.cc
  PreparedBatch* Prepare(const BatchInput& input, int slot) override;

  // matmul.cc
  absl::StatusOr<std::unique_ptr<Weight>> PrepareWeight(std::span<const float> w, int64_t out,
                                                        int64_t in, WeightFormat format) override;
  std::unique_ptr<Weight> TrainableWeight(Tensor w, void* shadow) override;
  void MatMul(Tensor y, Tensor x, const Weight& w, bool accumulate) override;
  void MatMulBackwardInput(Tensor dx, Tensor dy, const Weight& w, bool accumulate) override;
  void MatMulBackwardWeight(Tensor dw, Tensor dy, Tensor x) override;

  // operations.cc
  void Embed(Tensor y, const PreparedBatch& batch, Tensor table) override;
  void RmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms) override;
  void Rope(Tensor x, const PreparedBatch& batch, std::span<const float> inv_freq, int heads,
            int head_dim, bool inverse) override;
  void StoreKv(const PreparedBatch& batch, Tensor k, Tensor v, int layer, int kv_heads,
               int head_dim) override;
  void Attention(Tensor out, Tensor q, const PreparedBatch& batch,
                 std::span<const int> source_layer, const AttentionShape& shape,
                 float* lse) override;
  void SiluMul(Tensor y, Tensor gate_up) override;
  void GatherRows(Tensor y, Tensor x, const PreparedBatch& batch) override;
  void ArgMax(int32_t* ids, Tensor logits) override;
  void AttentionReceived(Tensor weights, Tensor q, Tensor k,
                         std::span<const ReferenceRows> references,
                         const AttentionShape& shape) override;
  void SelectKept(int32_t* kept, Tensor weights, std::span<const ReferenceRows> references,
                  int keep) override;
  void GatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references, int keep,
                  int kv_heads, int head_dim) override;
  void EmbedBackward(Tensor dtable, Tensor dy, const PreparedBatch& batch) override;
  void RmsNormBackward(Tensor dx, float* dgain, Tensor dy, Tensor x, const float* gain,
                       const float* inv_rms) override;
  void AttentionBackward(Tensor dq, Tensor dout, Tensor out, Tensor q, const PreparedBatch& batch,
                         std::span<const int> source_layer, const AttentionShape& shape,
                         const float* lse) override;
  void SiluMulBackward(Tensor dgate_up, Tensor dy, Tensor gate_up) override;
  void ScatterRows(Tensor dx, Tensor dy, const PreparedBatch& batch) override;
  void ScatterKept(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept, int references,
                   int keep, int kv_heads, int head_dim) override;
  void CrossEntropy(float* losses, Tensor logits, std::span<const int32_t> targets,
                    float loss_scale) override;
  absl::StatusOr<double> SumOfSquares(const float* x, int64_t n) override;
  void AdamWStep(float* parameter, void* shadow, const float* gradient, float* m, float* v,
                 int64_t n, const AdamW& options, float gradient_scale) override;

 private:
  // Each has scratch memory of its own: two may be in use by one operation.
  enum ScratchUse : int {
    kAttentionScratch,
    kConvertedInput,
    kConvertedOutput,
    kConvertedWeight,
    kQuantizedRows,
    kQuantizedScales,
    kIntegerSums,
    kReduction,
    kDelta,
    kHostData,
    kScratchUses,
  };

  // The operations of a key, as a graph once they have run.
  struct Recording {
    std::vector<std::pair<int, uint64_t>> batches;  // slot and signature of those read
    uint64_t generation = 0;
    bool by_itself = false;  // never recorded: its operations take host data
    cudaGraphExec_t graph = nullptr;
  };

  struct FrequencyTable {
    std::vector<float> host;
    void* device = nullptr;
  };

  CudaDevice(int ordinal, DType activations) : ordinal_(ordinal), activations_(activations) {}

  void Free(void* data) override;
  // Keeps the first error until Synchronize or Download tells it.
  void Note(absl::Status status);
  void Note(cudaError_t error, const char* what);
  // Null on error, which is noted. Contents are undefined; valid until the next call of the same
  // use.
  void* Scratch(ScratchUse use, size_t bytes);
  // Device copy of host data of one operation; null on error.
  void* HostData(const void* host, size_t bytes);
  // Called where an operation takes host data or is waited for: it cannot be part of a graph.
  // False: stop, the recording in progress is given up.
  bool NotRecordable();
  // Null where the batch could not be prepared (the error has been noted).
  const CudaPreparedBatch* Use(const PreparedBatch& batch);

  bool Matches(const Recording& recording) const;
  bool Record(Recording& recording, const std::function<void()>& operations);
  void DropRecordings();

  // operations.cc
  AttentionCall MakeCall(Tensor out, Tensor q, const CudaPreparedBatch& batch,
                         std::span<const int> source_layer, const AttentionShape& shape,
                         float* lse) const;
  // matmul.cc: `t` itself or its copy in another type; data null on error.
  Tensor As(DType dtype, Tensor t, ScratchUse use);
  Tensor WeightAs(DType dtype, const CudaWeight& w);
  void Multiply(MatrixProduct product);
  void MultiplyInto(Tensor d, MatrixProduct product);
  void MatMulInt8(Tensor y, Tensor x, const CudaWeight& w, bool accumulate);

  const int ordinal_;
  const DType activations_;
  std::string gpu_name_;
  int multiprocessors_ = 1;
  cudaStream_t stream_ = nullptr;
  void* workspace_ = nullptr;
  std::unique_ptr<CublasLt> lt_;
  std::unique_ptr<AsideUploader> aside_;
  StagingRing staging_;
  absl::Status status_;

  struct ScratchMemory {
    void* data = nullptr;
    size_t bytes = 0;
  };
  std::array<ScratchMemory, kScratchUses> scratch_;
  std::vector<FrequencyTable> frequencies_;
  std::vector<std::unique_ptr<CudaPreparedBatch>> prepared_;  // by slot

  // Counts the times that memory which recordings point to moved.
  uint64_t generation_ = 0;
  std::map<uint64_t, std::vector<Recording>> recordings_;
  int recording_count_ = 0;
  bool recording_ = false, recording_failed_ = false, took_host_data_ = false;
  std::vector<const CudaPreparedBatch*> used_;  // by the operations of the Run in progress
};

}  // namespace memory3
