// The operations the decoder is written in, forward and backward, once for every device.
//
// A Device owns memory and runs operations in the order they are called. The CPU device computes
// before it returns; the CUDA device queues on its stream, so a caller reads results only through
// Download (which waits) or after Synchronize.
//
// Shapes are row-major. `rows` are tokens, of any mixture of sequences. Activations have the
// device's activation type (f32 on the CPU, bf16 or f32 on CUDA); the residual stream, logits,
// statistics and gradients of parameters are always f32.
//
// Determinism. On the CPU every output row of every forward operation depends on that row's inputs
// alone, with one fixed order of summation: a token's logits do not depend on what else is in the
// batch. On every device a call repeated with the same arguments gives the same bits (no atomics on
// floating point), so that training resumes bit for bit.
//
// Thread-safety: one thread at a time drives a Device (the engine thread). Buffers may be allocated
// and freed, and host memory uploaded with UploadAside or a VectorDecoder, by
// other threads.
//
// Errors: operations on well-formed arguments cannot fail on the CPU; shapes are checked with
// CHECK, for a wrong shape is a bug in the decoder. Device faults surface as a Status from
// Synchronize and Download. Allocation reports RESOURCE_EXHAUSTED.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/codec.h"
#include "transformer/tensor.h"

namespace memory3 {

enum class WeightFormat : uint8_t {
  kF32,   // exact
  kBF16,  // rounded to nearest even
  kInt8,  // symmetric, one scale per output channel; activations are quantised per row on the fly
};

// A linear map y = x Wᵀ as a device wants it (packed, quantised). W is [out, in] as in checkpoints.
class Weight {
 public:
  virtual ~Weight() = default;
  int64_t out() const { return out_; }
  int64_t in() const { return in_; }
  WeightFormat format() const { return format_; }
  // Bytes that a product with one row reads.
  virtual int64_t bytes() const = 0;

 protected:
  Weight(int64_t out, int64_t in, WeightFormat format) : out_(out), in_(in), format_(format) {}

 private:
  int64_t out_, in_;
  WeightFormat format_;
};

// ---- Attention over a list of key/value sources, one softmax -----------------------------------
//
// Keys and values live in blocks. A source says how the blocks of one kind are laid out (the
// prefix, the memory pool, the pages of the context, the live qkv activations in training; a bank
// of evicted context later), a block is a run of tokens of one source, a segment is a run of query
// rows that see the same list of blocks. New kinds of memory are new sources.

struct KvSource {
  DType dtype = DType::kF32;
  // In elements. The key of layer l, head h, token t is at base + l*layer_stride + h*head_stride +
  // t*token_stride, its value `value_offset` further on; head_dim elements are contiguous.
  int64_t layer_stride = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t value_offset = 0;
};

struct KvBlock {
  int source = 0;              // index into AttentionPlan::sources
  const void* base = nullptr;  // device memory
  // Device memory laid out as base (f32); null: no gradient wanted. Two blocks whose gradients
  // share memory begin at one address.
  float* gradient = nullptr;
  int tokens = 0;
  // Index, in its sequence's context, of the block's first token: row i of a segment sees token t
  // iff first + t <= segment.first + i. kSeenByAll: no mask (prefix, memories).
  int first = kSeenByAll;
  static constexpr int kSeenByAll = INT32_MIN;
};

struct AttentionSegment {
  int row = 0;  // first row of the segment in q
  int rows = 0;
  int first = 0;                       // context index of the first row
  int block_begin = 0, block_end = 0;  // range of AttentionPlan::block_ids
};

struct AttentionPlan {
  std::vector<KvSource> sources;
  std::vector<KvBlock> blocks;
  std::vector<int32_t> block_ids;          // indices into blocks, grouped by segment
  std::vector<AttentionSegment> segments;  // disjoint rows, ascending
};

struct AttentionShape {
  int heads = 0;     // query heads
  int kv_heads = 0;  // heads % kv_heads == 0; query head h reads KV head h / (heads / kv_heads)
  int head_dim = 0;
  float scale = 0;  // 1/√head_dim
};

// What one forward pass needs besides activations, brought to the device once and used by every
// layer: token ids, positions, where each row's key and value go, and the attention plan.
struct BatchInput {
  std::vector<int32_t> token_ids;  // [rows]
  std::vector<int32_t> positions;  // [rows], RoPE positions
  AttentionPlan attention;
  // Where row r's key of layer l and head h is written: destination[r] + l*layer_stride +
  // h*head_stride of `destination_source`, value value_offset further; null: not kept. Empty:
  // nothing is kept.
  std::vector<void*> destination;  // [rows]
  int destination_source = 0;
  std::vector<int32_t> logit_rows;  // rows whose logits are wanted, ascending
};

// Device-side form of a BatchInput; made by Device::Prepare, valid until the next Prepare with the
// same `slot` on that device.
class PreparedBatch {
 public:
  virtual ~PreparedBatch() = default;
  int rows = 0;
  int logit_rows = 0;
};

// References laid out in consecutive rows, for writing memories.
struct ReferenceRows {
  int row = 0;     // first row
  int tokens = 0;  // >= 1
};

// Decodes what one codec has encoded, with the codec's tables in device memory. Thread-safety: any
// thread, beside compute. The device must outlive it.
class VectorDecoder {
 public:
  virtual ~VectorDecoder() = default;
  // Brings `codes` to the device, decodes them into `vectors` there and returns when that is done.
  // INVALID_ARGUMENT: not a whole number of codes. Errors of the device.
  virtual absl::Status DecodeAside(const VectorRuns& vectors, std::span<const uint8_t> codes) = 0;
};

struct AdamW {
  float learning_rate = 0, beta1 = 0.9f, beta2 = 0.95f, epsilon = 1e-8f, weight_decay = 0;
  int64_t step = 1;  // counts from 1
};

class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;  // "cpu (avx512_bf16, 2 threads)", "cuda:0 NVIDIA H200"
  virtual bool is_cpu() const = 0;
  virtual DType activation_dtype() const = 0;

  // ---- memory ----
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;  // zeroed
  virtual void Upload(void* device, const void* host, size_t bytes) = 0;
  virtual absl::Status Download(void* host, const void* device, size_t bytes) = 0;
  virtual void Copy(void* to, const void* from, size_t bytes) = 0;
  virtual void Zero(void* device, size_t bytes) = 0;
  virtual absl::Status Synchronize() = 0;
  // For the memory reader: copies beside compute, from any thread; waits until the bytes are there.
  virtual absl::Status UploadAside(void* device, const void* host, size_t bytes) = 0;
  // Whether MakeVectorDecoder knows this kind of codec; on the others the host decodes.
  virtual bool DecodesVectors(CodecId) const { return false; }
  // From any thread. UNIMPLEMENTED: not this kind of codec. RESOURCE_EXHAUSTED: device full.
  virtual absl::StatusOr<std::unique_ptr<VectorDecoder>> MakeVectorDecoder(const Codec& codec);

  // w: [out, in] row-major f32 on the host.
  virtual absl::StatusOr<std::unique_ptr<Weight>> PrepareWeight(std::span<const float> w,
                                                                int64_t out, int64_t in,
                                                                WeightFormat format) = 0;
  // A weight that is the matrix in device memory itself, for training: not packed, follows `w`. On
  // a device with bf16 activations `shadow` is its bf16 copy, kept by AdamWStep.
  virtual std::unique_ptr<Weight> TrainableWeight(Tensor w, void* shadow) = 0;

  virtual PreparedBatch* Prepare(const BatchInput& input, int slot) = 0;
  // Runs `operations`. CUDA records them as a graph under `key` (same key: same shapes, same
  // pointers, same prepared slot) and replays it; 0 never records.
  virtual void Run(uint64_t key, const std::function<void()>& operations) = 0;

  // ---- forward ----
  // y[rows] = table[token_ids], f32.
  virtual void Embed(Tensor y, const PreparedBatch& batch, Tensor table) = 0;
  // y = x / sqrt(mean(x²) + eps) * gain; x f32. inv_rms [rows] may be null.
  virtual void RmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms) = 0;
  // y = x Wᵀ, or y += x Wᵀ.
  virtual void MatMul(Tensor y, Tensor x, const Weight& w, bool accumulate) = 0;
  // Rotates `heads` heads of every row of x in place, pairs (i, i + head_dim/2), by
  // position * inv_freq[i] (f32 on the host, [head_dim/2]); `inverse` rotates back (backward).
  virtual void Rope(Tensor x, const PreparedBatch& batch, std::span<const float> inv_freq,
                    int heads, int head_dim, bool inverse) = 0;
  // Writes rows' keys and values ([rows, kv_heads*head_dim]) where batch.destination says.
  virtual void StoreKv(const PreparedBatch& batch, Tensor k, Tensor v, int layer, int kv_heads,
                       int head_dim) = 0;
  // out = softmax(scale * q·K over all blocks of the row's segment) V. source_layer[s] is the layer
  // index within source s, or -1: the source is not read at this layer. Rows outside every segment
  // are left alone. lse [rows, heads] (log-sum-exp, for backward) may be null.
  virtual void Attention(Tensor out, Tensor q, const PreparedBatch& batch,
                         std::span<const int> source_layer, const AttentionShape& shape,
                         float* lse) = 0;
  // y = silu(gate) * up, gate_up = [gate | up], each y.cols wide.
  virtual void SiluMul(Tensor y, Tensor gate_up) = 0;
  // y[i] = x[batch.logit_rows[i]].
  virtual void GatherRows(Tensor y, Tensor x, const PreparedBatch& batch) = 0;
  // Greedy choice, ties to the lower id: ids[r] = argmax_c logits[r, c].
  virtual void ArgMax(int32_t* ids, Tensor logits) = 0;

  // ---- writing (explicit-memory.md, Writing) ----
  // weights[row, kv_head] = Σ over the reference's rows i and the query heads of the group of
  // softmax_j(q_i·k_j * scale), neither masked nor rotated; q, k before RoPE.
  virtual void AttentionReceived(Tensor weights, Tensor q, Tensor k,
                                 std::span<const ReferenceRows> references,
                                 const AttentionShape& shape) = 0;
  // kept[reference, kv_head, i]: rows (absolute, ascending) of the `keep` largest weights, ties to
  // the lower row; -1 past the reference's length. Device memory, int32.
  virtual void SelectKept(int32_t* kept, Tensor weights, std::span<const ReferenceRows> references,
                          int keep) = 0;
  // memory[reference, 2, kv_head, i, head_dim] (f32) = rows `kept` of k and v; zero where kept is
  // -1.
  virtual void GatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references,
                          int keep, int kv_heads, int head_dim) = 0;

  // ---- backward: d* arguments named with `accumulate` semantics are added to ----
  virtual void MatMulBackwardInput(Tensor dx, Tensor dy, const Weight& w, bool accumulate) = 0;
  virtual void MatMulBackwardWeight(Tensor dw, Tensor dy, Tensor x) = 0;  // dw += dyᵀ x, f32
  virtual void EmbedBackward(Tensor dtable, Tensor dy, const PreparedBatch& batch) = 0;  // +=
  // dx += ..., dgain += ...
  virtual void RmsNormBackward(Tensor dx, float* dgain, Tensor dy, Tensor x, const float* gain,
                               const float* inv_rms) = 0;
  // dq = ...; adds to every block's `gradient`.
  virtual void AttentionBackward(Tensor dq, Tensor dout, Tensor out, Tensor q,
                                 const PreparedBatch& batch, std::span<const int> source_layer,
                                 const AttentionShape& shape, const float* lse) = 0;
  virtual void SiluMulBackward(Tensor dgate_up, Tensor dy, Tensor gate_up) = 0;
  virtual void ScatterRows(Tensor dx, Tensor dy,
                           const PreparedBatch& batch) = 0;  // dx[logit_rows[i]] += dy[i]
  // Adds dmemory (laid out as GatherKept's result) to rows `kept` of dk and dv.
  virtual void ScatterKept(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept,
                           int references, int keep, int kv_heads, int head_dim) = 0;
  // losses[r] = -log softmax(logits[r])[targets[r]], 0 where the target is -1; logits become
  // d(Σ losses * loss_scale)/d logits. targets: host.
  virtual void CrossEntropy(float* losses, Tensor logits, std::span<const int32_t> targets,
                            float loss_scale) = 0;

  // ---- optimiser ----
  virtual absl::StatusOr<double> SumOfSquares(const float* x, int64_t n) = 0;
  // AdamW (decoupled weight decay) on n elements, gradient scaled by `gradient_scale` first;
  // refreshes the bf16 copy where `shadow` is not null.
  virtual void AdamWStep(float* parameter, void* shadow, const float* gradient, float* m, float* v,
                         int64_t n, const AdamW& options, float gradient_scale) = 0;

 private:
  friend class Buffer;
  // Frees what Allocate gave; called when a Buffer dies, from any thread.
  virtual void Free(void* data) = 0;
};

struct CpuDeviceOptions {
  int threads = 0;  // 0: one per core
  // Highest instruction set to use: "generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16",
  // "amx"; empty: the best found.
  std::string instructions;
};
absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice(const CpuDeviceOptions& options);

struct CudaDeviceOptions {
  int ordinal = 0;
  DType activations = DType::kBF16;  // kF32 to compare with the CPU
};
// FAILED_PRECONDITION where the build has no CUDA or the machine no such GPU.
absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options);

}  // namespace memory3
