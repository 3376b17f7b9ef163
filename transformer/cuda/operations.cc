// CudaDevice's operations besides products: checks, scratch memory, and the launch.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "transformer/check.h"
#include "transformer/cuda/cross_entropy.h"
#include "transformer/cuda/cuda_device.h"
#include "transformer/cuda/norm.h"
#include "transformer/cuda/optimizer.h"
#include "transformer/cuda/pointwise.h"
#include "transformer/cuda/rope.h"
#include "transformer/cuda/writing.h"

namespace memory3 {
namespace {

void CheckFloats(const Tensor& t) {
  CHECK((t.dtype == DType::kF32 || t.dtype == DType::kBF16) && t.stride >= t.cols);
}

// Vectors of head_dim numbers can be read 16 bytes at a time.
bool AlignedHeads(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride * SizeOf(t.dtype) % 16 == 0;
}

static_assert(sizeof(ReferenceRange) == sizeof(ReferenceRows) &&
              offsetof(ReferenceRange, tokens) == offsetof(ReferenceRows, tokens));

SourceAtLayer AtLayer(const KvSource& source, int layer) {
  SourceAtLayer at;
  at.dtype = source.dtype;
  at.layer_offset = std::max(layer, 0) * source.layer_stride;
  at.head_stride = source.head_stride;
  at.token_stride = source.token_stride;
  at.value_offset = source.value_offset;
  at.read = layer >= 0;
  return at;
}

int Longest(std::span<const ReferenceRows> references) {
  int longest = 0;
  for (const ReferenceRows& r : references) longest = std::max(longest, r.tokens);
  return longest;
}

}  // namespace

// ---- forward ----

void CudaDevice::Embed(Tensor y, const PreparedBatch& batch, Tensor table) {
  CHECK(y.rows == batch.rows && y.cols == table.cols);
  CheckFloats(y);
  CheckFloats(table);
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr) return;
  Note(LaunchGatherRows(y, table, b->token_ids, stream_), "Embed");
}

void CudaDevice::RmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms) {
  CHECK(y.rows == x.rows && y.cols == x.cols);
  CheckFloats(y);
  CheckFloats(x);
  Bind();
  Note(LaunchRmsNorm(y, x, gain, eps, inv_rms, stream_), "RmsNorm");
}

void CudaDevice::Rope(Tensor x, const PreparedBatch& batch, std::span<const float> inv_freq,
                      int heads, int head_dim, bool inverse) {
  CHECK(x.rows == batch.rows && x.cols >= int64_t{heads} * head_dim);
  CHECK(head_dim % 2 == 0 && head_dim <= kMaxHeadDim &&
        static_cast<int>(inv_freq.size()) == head_dim / 2);
  CheckFloats(x);
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr) return;
  CHECK(b->has_positions);
  // A model's frequencies never change: they are brought once and stay.
  auto table = std::find_if(frequencies_.begin(), frequencies_.end(), [&](const FrequencyTable& t) {
    return std::equal(t.host.begin(), t.host.end(), inv_freq.begin(), inv_freq.end());
  });
  if (table == frequencies_.end()) {
    const size_t bytes = inv_freq.size_bytes();
    FrequencyTable fresh;
    fresh.host.assign(inv_freq.begin(), inv_freq.end());
    if (recording_) {
      recording_failed_ = true;
      return;
    }
    cudaError_t error = cudaMalloc(&fresh.device, bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return Note(error, "Rope");
    }
    error =
        cudaMemcpyAsync(fresh.device, fresh.host.data(), bytes, cudaMemcpyHostToDevice, stream_);
    frequencies_.push_back(std::move(fresh));
    if (error != cudaSuccess) return Note(error, "Rope");
    table = frequencies_.end() - 1;
  }
  Note(LaunchRope(x, b->positions, static_cast<const float*>(table->device), heads, head_dim,
                  inverse, stream_),
       "Rope");
}

void CudaDevice::StoreKv(const PreparedBatch& batch, Tensor k, Tensor v, int layer, int kv_heads,
                         int head_dim) {
  CHECK(k.rows == batch.rows && v.rows == batch.rows);
  CHECK(k.cols == int64_t{kv_heads} * head_dim && v.cols == k.cols);
  CheckFloats(k);
  CheckFloats(v);
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr || b->destination == nullptr) return;
  Note(LaunchStoreKv(b->destination, AtLayer(b->sources[b->destination_source], layer), k, v,
                     kv_heads, head_dim, stream_),
       "StoreKv");
}

AttentionCall CudaDevice::MakeCall(Tensor out, Tensor q, const CudaPreparedBatch& batch,
                                   std::span<const int> source_layer, const AttentionShape& shape,
                                   float* lse) const {
  CHECK(source_layer.size() == batch.sources.size());
  CHECK(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0);
  CHECK(shape.head_dim > 0 && shape.head_dim <= kMaxHeadDim);
  for (const Tensor& t : {out, q}) {
    CheckFloats(t);
    CHECK(t.cols == int64_t{shape.heads} * shape.head_dim);
  }
  AttentionCall call;
  call.q = q;
  call.out = out;
  call.lse = lse;
  call.units = batch.units;
  for (size_t s = 0; s < source_layer.size(); ++s) {
    call.sources.at[s] = AtLayer(batch.sources[s], source_layer[s]);
  }
  call.heads = shape.heads;
  call.kv_heads = shape.kv_heads;
  call.head_dim = shape.head_dim;
  call.scale = shape.scale;
  call.aligned = batch.aligned && shape.head_dim % 8 == 0 && AlignedHeads(q);
  return call;
}

void CudaDevice::Attention(Tensor out, Tensor q, const PreparedBatch& batch,
                           std::span<const int> source_layer, const AttentionShape& shape,
                           float* lse) {
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr) return;
  const AttentionCall call = MakeCall(out, q, *b, source_layer, shape, lse);
  const bool tiles = activations_ == DType::kBF16 && shape.head_dim <= kMaxTileDim;
  const int rows = tiles ? b->short_items : b->all_items;
  if (rows > 0) {
    const int splits = AttentionSplits(rows, shape.heads, shape.kv_heads, multiprocessors_);
    float* scratch = nullptr;
    if (splits > 1) {
      scratch = static_cast<float*>(
          Scratch(kAttentionScratch,
                  sizeof(float) * AttentionRowScratch(rows, shape.heads, shape.head_dim, splits)));
      if (scratch == nullptr) return;
    }
    Note(LaunchAttentionRows(call, b->items, rows, splits, scratch, stream_), "Attention");
  }
  if (tiles) Note(LaunchAttentionTiles(call, b->tiles, b->tile_count, stream_), "Attention");
}

void CudaDevice::SiluMul(Tensor y, Tensor gate_up) {
  CHECK(gate_up.cols == 2 * y.cols && gate_up.rows == y.rows);
  CheckFloats(y);
  CheckFloats(gate_up);
  Bind();
  Note(LaunchSiluMul(y, gate_up, stream_), "SiluMul");
}

void CudaDevice::GatherRows(Tensor y, Tensor x, const PreparedBatch& batch) {
  CHECK(y.rows == batch.logit_rows && y.cols == x.cols);
  CheckFloats(y);
  CheckFloats(x);
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr) return;
  Note(LaunchGatherRows(y, x, b->logit_row_ids, stream_), "GatherRows");
}

void CudaDevice::ArgMax(int32_t* ids, Tensor logits) {
  CHECK(logits.dtype == DType::kF32);
  Bind();
  Note(LaunchArgMax(ids, logits, stream_), "ArgMax");
}

// ---- writing ----

void CudaDevice::AttentionReceived(Tensor weights, Tensor q, Tensor k,
                                   std::span<const ReferenceRows> references,
                                   const AttentionShape& shape) {
  CHECK(weights.dtype == DType::kF32 && weights.cols == shape.kv_heads);
  CHECK(q.cols == int64_t{shape.heads} * shape.head_dim);
  CHECK(k.cols == int64_t{shape.kv_heads} * shape.head_dim);
  CHECK(shape.heads % shape.kv_heads == 0);
  CheckFloats(q);
  CheckFloats(k);
  if (references.empty()) return;
  Bind();
  const void* list = HostData(references.data(), references.size_bytes());
  if (list == nullptr) return;
  const HeadShape heads{shape.heads, shape.kv_heads, shape.head_dim, shape.scale};
  Note(LaunchAttentionReceived(weights, q, k, static_cast<const ReferenceRange*>(list),
                               static_cast<int>(references.size()), Longest(references), heads,
                               stream_),
       "AttentionReceived");
}

void CudaDevice::SelectKept(int32_t* kept, Tensor weights,
                            std::span<const ReferenceRows> references, int keep) {
  CHECK(weights.dtype == DType::kF32 && keep >= 0);
  if (references.empty() || keep == 0) return;
  Bind();
  const void* list = HostData(references.data(), references.size_bytes());
  if (list == nullptr) return;
  Note(LaunchSelectKept(kept, weights, static_cast<const ReferenceRange*>(list),
                        static_cast<int>(references.size()), Longest(references), keep, stream_),
       "SelectKept");
}

void CudaDevice::GatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references,
                            int keep, int kv_heads, int head_dim) {
  CHECK(k.cols == int64_t{kv_heads} * head_dim && v.cols == k.cols);
  CheckFloats(k);
  CheckFloats(v);
  Bind();
  Note(LaunchGatherKept(memory, kept, k, v, references, keep, kv_heads, head_dim, stream_),
       "GatherKept");
}

// ---- backward ----

void CudaDevice::EmbedBackward(Tensor dtable, Tensor dy, const PreparedBatch& batch) {
  CHECK(dy.rows == batch.rows && dtable.cols == dy.cols);
  CheckFloats(dtable);
  CheckFloats(dy);
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr) return;
  Note(LaunchEmbedBackward(dtable, dy, b->token_groups, b->token_group_count, b->token_order,
                           stream_),
       "EmbedBackward");
}

void CudaDevice::RmsNormBackward(Tensor dx, float* dgain, Tensor dy, Tensor x, const float* gain,
                                 const float* inv_rms) {
  CHECK(dx.rows == x.rows && dy.rows == x.rows && dx.cols == x.cols && dy.cols == x.cols);
  CheckFloats(dx);
  CheckFloats(dy);
  CheckFloats(x);
  if (x.rows == 0) return;
  Bind();
  auto* scratch = static_cast<float*>(
      Scratch(kReduction, sizeof(float) * RmsNormBackwardScratch(x.rows, x.cols)));
  if (scratch == nullptr) return;
  Note(LaunchRmsNormBackward(dx, dgain, dy, x, gain, inv_rms, scratch, stream_), "RmsNormBackward");
}

void CudaDevice::AttentionBackward(Tensor dq, Tensor dout, Tensor out, Tensor q,
                                   const PreparedBatch& batch, std::span<const int> source_layer,
                                   const AttentionShape& shape, const float* lse) {
  for (const Tensor& t : {dq, dout}) {
    CheckFloats(t);
    CHECK(t.rows == q.rows && t.cols == q.cols);
  }
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr || q.rows == 0) return;
  AttentionBackwardCall call;
  call.forward = MakeCall(out, q, *b, source_layer, shape, const_cast<float*>(lse));
  call.forward.aligned = call.forward.aligned && AlignedHeads(dout);
  call.dq = dq;
  call.dout = dout;
  call.delta = static_cast<float*>(Scratch(kDelta, sizeof(float) * q.rows * int64_t{shape.heads}));
  if (call.delta == nullptr) return;
  Note(LaunchAttentionDelta(call, stream_), "AttentionBackward");
  const bool tiles = activations_ == DType::kBF16 && shape.head_dim <= kMaxTileDim;
  // Queries' gradients; of short segments from the row kernel in any case.
  if (tiles) {
    Note(LaunchAttentionBackwardTiles(call, b->tiles, b->tile_count, stream_), "AttentionBackward");
  }
  Note(LaunchAttentionBackwardRows(call, b->items, tiles ? b->short_items : b->all_items, stream_),
       "AttentionBackward");
  // Keys' and values' gradients, whichever rows see them.
  const auto keys = tiles ? LaunchAttentionBackwardKeyTiles : LaunchAttentionBackwardKeys;
  for (const auto& [begin, count] : b->key_waves) {
    Note(keys(call, b->key_tiles + begin, count, b->segments, stream_), "AttentionBackward");
  }
}

void CudaDevice::SiluMulBackward(Tensor dgate_up, Tensor dy, Tensor gate_up) {
  CHECK(dy.rows == gate_up.rows && dgate_up.rows == gate_up.rows);
  CHECK(gate_up.cols == 2 * dy.cols && dgate_up.cols == gate_up.cols);
  CheckFloats(dgate_up);
  CheckFloats(dy);
  CheckFloats(gate_up);
  Bind();
  Note(LaunchSiluMulBackward(dgate_up, dy, gate_up, stream_), "SiluMulBackward");
}

void CudaDevice::ScatterRows(Tensor dx, Tensor dy, const PreparedBatch& batch) {
  CHECK(dy.rows == batch.logit_rows && dx.cols == dy.cols);
  CheckFloats(dx);
  CheckFloats(dy);
  Bind();
  const CudaPreparedBatch* b = Use(batch);
  if (b == nullptr) return;
  Note(LaunchScatterRows(dx, dy, b->logit_row_ids, stream_), "ScatterRows");
}

void CudaDevice::ScatterKept(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept,
                             int references, int keep, int kv_heads, int head_dim) {
  CHECK(dk.cols == int64_t{kv_heads} * head_dim && dv.cols == dk.cols);
  CheckFloats(dk);
  CheckFloats(dv);
  Bind();
  Note(LaunchScatterKept(dk, dv, dmemory, kept, references, keep, kv_heads, head_dim, stream_),
       "ScatterKept");
}

void CudaDevice::CrossEntropy(float* losses, Tensor logits, std::span<const int32_t> targets,
                              float loss_scale) {
  CHECK(logits.rows == static_cast<int64_t>(targets.size()) && logits.dtype == DType::kF32);
  if (targets.empty()) return;
  Bind();
  const void* list = HostData(targets.data(), targets.size_bytes());
  if (list == nullptr) return;
  Note(LaunchCrossEntropy(losses, logits, static_cast<const int32_t*>(list), loss_scale, stream_),
       "CrossEntropy");
}

// ---- optimiser ----

absl::StatusOr<double> CudaDevice::SumOfSquares(const float* x, int64_t n) {
  if (!NotRecordable()) return absl::InternalError("cuda: a sum among recorded operations");
  Bind();
  std::vector<double> sums(kSumPieces);
  auto* device = static_cast<double*>(Scratch(kReduction, kSumPieces * sizeof(double)));
  if (device != nullptr) Note(LaunchSumOfSquares(device, x, n, stream_), "SumOfSquares");
  absl::Status status = device == nullptr
                            ? Synchronize()
                            : Download(sums.data(), device, kSumPieces * sizeof(double));
  if (!status.ok()) return status;
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void CudaDevice::AdamWStep(float* parameter, void* shadow, const float* gradient, float* m,
                           float* v, int64_t n, const AdamW& options, float gradient_scale) {
  CHECK(options.step >= 1);
  if (!NotRecordable()) return;
  Bind();
  const double step = static_cast<double>(options.step);
  const double correction1 = 1 - std::pow(double{options.beta1}, step);
  const double correction2 = 1 - std::pow(double{options.beta2}, step);
  AdamWFactors factors;
  factors.beta1 = options.beta1;
  factors.beta2 = options.beta2;
  factors.epsilon = options.epsilon;
  factors.decay =
      static_cast<float>(1 - double{options.learning_rate} * double{options.weight_decay});
  factors.step_size = static_cast<float>(options.learning_rate / correction1);
  factors.root_scale = static_cast<float>(1 / std::sqrt(correction2));
  factors.gradient_scale = gradient_scale;
  Note(LaunchAdamW(parameter, shadow, gradient, m, v, n, factors, stream_), "AdamWStep");
}

}  // namespace memory3
