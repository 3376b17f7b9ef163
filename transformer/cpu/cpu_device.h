// The CPU device: the reference the others are tested against.
//
// Packed weights are multiplied by our own kernels, chosen at run time for the CPU found
// (transformer/cpu/kernels.h), trainable ones, plain matrices that change every step, likewise;
// their backward products are oneDNN's. Work is shared among `threads` OpenMP threads, the runtime
// oneDNN uses too.
//
// Every output row depends on that row's inputs alone and is summed in one fixed order, whatever
// the batch, the slice and the number of threads: see device.h, Determinism.
//
// Thread-safety: as device.h says. Device memory is host memory, so a pointer to it may be read
// directly by whoever knows that the device is a CpuDevice.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

struct CpuKernels;

enum class CpuIsa : uint8_t { kGeneric, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };
std::string_view CpuIsaName(CpuIsa isa);
// The best that this CPU and its operating system run.
CpuIsa BestCpuIsa();

// A BatchInput as the CPU reads it: the input itself, copied.
struct CpuPreparedBatch final : PreparedBatch {
  BatchInput input;
};

// A weight that is the row-major f32 matrix [out, in] itself (Device::TrainableWeight).
class CpuTrainableWeight final : public Weight {
 public:
  explicit CpuTrainableWeight(Tensor w) : Weight(w.rows, w.cols, WeightFormat::kF32), matrix_(w) {}
  int64_t bytes() const override { return out() * in() * 4; }
  const Tensor& matrix() const { return matrix_; }

 private:
  Tensor matrix_;
};

class CpuDevice final : public Device {
 public:
  // INVALID_ARGUMENT: an unknown instruction set, or threads < 0. An instruction set that the CPU
  // has not is lowered to the best it has.
  static absl::StatusOr<std::unique_ptr<CpuDevice>> Make(const CpuDeviceOptions& options);

  int threads() const { return threads_; }
  CpuIsa isa() const { return isa_; }

  std::string name() const override;
  bool is_cpu() const override { return true; }
  DType activation_dtype() const override { return DType::kF32; }

  // cpu_device.cc
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  void Upload(void* device, const void* host, size_t bytes) override;
  absl::Status Download(void* host, const void* device, size_t bytes) override;
  void Copy(void* to, const void* from, size_t bytes) override;
  void Zero(void* device, size_t bytes) override;
  absl::Status Synchronize() override;
  absl::Status UploadAside(void* device, const void* host, size_t bytes) override;
  PreparedBatch* Prepare(const BatchInput& input, int slot) override;
  void Run(uint64_t key, const std::function<void()>& operations) override;

  // matmul.cc
  absl::StatusOr<std::unique_ptr<Weight>> PrepareWeight(std::span<const float> w, int64_t out,
                                                        int64_t in, WeightFormat format) override;
  std::unique_ptr<Weight> TrainableWeight(Tensor w, void* shadow) override;
  void MatMul(Tensor y, Tensor x, const Weight& w, bool accumulate) override;

  // rows.cc
  void Embed(Tensor y, const PreparedBatch& batch, Tensor table) override;
  void RmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms) override;
  void Rope(Tensor x, const PreparedBatch& batch, std::span<const float> inv_freq, int heads,
            int head_dim, bool inverse) override;
  void StoreKv(const PreparedBatch& batch, Tensor k, Tensor v, int layer, int kv_heads,
               int head_dim) override;
  void SiluMul(Tensor y, Tensor gate_up) override;
  void GatherRows(Tensor y, Tensor x, const PreparedBatch& batch) override;
  void ArgMax(int32_t* ids, Tensor logits) override;

  // attention.cc
  void Attention(Tensor out, Tensor q, const PreparedBatch& batch,
                 std::span<const int> source_layer, const AttentionShape& shape,
                 float* lse) override;

  // writing.cc
  void AttentionReceived(Tensor weights, Tensor q, Tensor k,
                         std::span<const ReferenceRows> references,
                         const AttentionShape& shape) override;
  void SelectKept(int32_t* kept, Tensor weights, std::span<const ReferenceRows> references,
                  int keep) override;
  void GatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references, int keep,
                  int kv_heads, int head_dim) override;

  // backward.cc. Products with a weight take a CpuTrainableWeight; a packed one is a CHECK failure.
  void MatMulBackwardInput(Tensor dx, Tensor dy, const Weight& w, bool accumulate) override;
  void MatMulBackwardWeight(Tensor dw, Tensor dy, Tensor x) override;
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

  // optimizer.cc
  absl::StatusOr<double> SumOfSquares(const float* x, int64_t n) override;
  void AdamWStep(float* parameter, void* shadow, const float* gradient, float* m, float* v,
                 int64_t n, const AdamW& options, float gradient_scale) override;

 private:
  CpuDevice(int threads, CpuIsa isa, const CpuKernels& kernels)
      : threads_(threads), isa_(isa), kernels_(kernels) {}

  void Free(void* data) override;
  // At least `bytes` of 64-byte aligned scratch, contents undefined, valid until the next call.
  void* Scratch(size_t bytes);

  const int threads_;
  const CpuIsa isa_;
  const CpuKernels& kernels_;
  std::vector<std::unique_ptr<CpuPreparedBatch>> prepared_;  // by slot
  Buffer scratch_;
  // Rope's table for the rows of the batch it was last called with: cos then sin of
  // position * inv_freq, [rows, 2, head_dim/2]. Made anew when positions or frequencies differ.
  std::vector<int32_t> rope_positions_;
  std::vector<float> rope_inv_freq_;
  std::vector<float> rope_table_;
};

}  // namespace memory3
