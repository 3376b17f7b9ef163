// One block of the Transformer, for inference and training alike.
//
//   x_mid = x     + W_o · Attention(RoPE(q), sources)   where [q k v] = W_qkv · RmsNorm(x)
//   y     = x_mid + W_down · (silu(gate) ∘ up)          where [gate up] = W_gate_up ·
//   RmsNorm(x_mid)
//
// Attention is one softmax over a list of key/value sources: prefix, memories of the row's chunk,
// context (explicit-memory.md, Reading memories).
//
// Thread-safety: the device's thread. Nothing here owns memory except ActivationBuffers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/model.h"
#include "transformer/tensor.h"

namespace memory3 {

// What a block computes on. Inference uses one set for all layers, with x, x_mid and y the same
// memory; training keeps one set per layer and reads it backward.
// D = hidden_size, H = heads, G = kv_heads, d = head_dim, M = intermediate_size.
struct LayerActivations {
  Tensor x;                            // [rows, D] f32, the residual stream that enters
  Tensor attention_in;                 // [rows, D]
  float* attention_inv_rms = nullptr;  // [rows], null: not kept
  Tensor qkv;                          // [rows, (H + 2G) d]; q and k rotated in place
  Tensor attention;                    // [rows, H d]
  float* lse = nullptr;                // [rows, H], null: not kept
  Tensor x_mid;                        // [rows, D] f32
  Tensor mlp_in;                       // [rows, D]
  float* mlp_inv_rms = nullptr;        // [rows], null: not kept
  Tensor gate_up;                      // [rows, 2M]
  Tensor hidden;                       // [rows, M]
  Tensor y;                            // [rows, D] f32, the residual stream that leaves
};

// Columns of the fused qkv activations.
inline Tensor QueryOf(const ModelConfig& c, const Tensor& qkv) {
  return qkv.Cols(0, int64_t{c.heads} * c.head_dim);
}
inline Tensor KeyOf(const ModelConfig& c, const Tensor& qkv) {
  return qkv.Cols(int64_t{c.heads} * c.head_dim, int64_t{c.kv_heads} * c.head_dim);
}
inline Tensor ValueOf(const ModelConfig& c, const Tensor& qkv) {
  return qkv.Cols(int64_t{c.heads + c.kv_heads} * c.head_dim, int64_t{c.kv_heads} * c.head_dim);
}

// The source whose blocks are runs of rows of the qkv activations themselves (layer index 0): a
// block that starts at row r has base KeyOf(qkv).Rows(r, …).data.
KvSource LiveKvSource(const ModelConfig& config, const Tensor& qkv);

// Where a block stands in the model and in the sources it attends to.
struct BlockPlace {
  // Layer index within each source of the batch's plan, -1: not read at this layer.
  std::span<const int> source_layer;
  // Layer index within the destination of the batch's keys and values, -1: they are not stored.
  int store_layer = -1;
};

// The three parts of a block, in order. Between the first and the second, qkv holds q and k before
// RoPE, which the scores of explicit memories are computed from.
void BlockQkv(const Model& model, int layer, const LayerActivations& a);
void BlockRope(const Model& model, const PreparedBatch& batch, const LayerActivations& a);
void BlockAttention(const Model& model, int layer, const PreparedBatch& batch,
                    const BlockPlace& place, const LayerActivations& a);
void BlockMlp(const Model& model, int layer, const LayerActivations& a);
// BlockMlp as far as a.hidden: all that backward reads, where activations are computed again.
void BlockMlpHidden(const Model& model, int layer, const LayerActivations& a);

// All of them: y from x.
void BlockForward(const Model& model, int layer, const PreparedBatch& batch,
                  const BlockPlace& place, const LayerActivations& a);

// ---- backward ----

// Where the gradients of one layer's weights are added: f32, shaped as LayerWeights.
struct LayerGradients {
  float* attention_norm = nullptr;
  Tensor qkv;
  Tensor out;
  float* mlp_norm = nullptr;
  Tensor gate_up;
  Tensor down;
};

// What a block's backward computes on; one set for all layers.
struct BackwardActivations {
  // [rows, D] f32: the gradient of the residual stream, d loss / d y before and d loss / d x after.
  Tensor stream;
  Tensor norm_out;   // [rows, D]: gradient of attention_in and of mlp_in
  Tensor qkv;        // [rows, (H + 2G) d] f32; the live blocks' `gradient` points here
  Tensor attention;  // [rows, H d]
  Tensor gate_up;    // [rows, 2M]
  Tensor hidden;     // [rows, M]
};

// BlockForward's parts in reverse order; `a` holds what forward left, views of the rows it had.
// Between BlockAttentionBackward and BlockQkvBackward, g.qkv holds the gradients of rotated queries
// and keys and of values: what flows back through kept keys and values (Device::ScatterKept) is
// added there.
void BlockMlpBackward(const Model& model, int layer, const LayerActivations& a,
                      const LayerGradients& w, const BackwardActivations& g);
// Adds to the `gradient` of the plan's blocks. Keys and values of g.qkv, and whatever other memory
// the blocks' gradients are, have been zeroed by the caller; g.qkv's queries are overwritten.
void BlockAttentionBackward(const Model& model, int layer, const PreparedBatch& batch,
                            const BlockPlace& place, const LayerActivations& a,
                            const LayerGradients& w, const BackwardActivations& g);
// Turns g.qkv back, then through W_qkv and the norm.
void BlockQkvBackward(const Model& model, int layer, const PreparedBatch& batch,
                      const LayerActivations& a, const LayerGradients& w,
                      const BackwardActivations& g);

// One set of activations for up to `max_rows` rows, used by every layer in turn, as inference does
// it.
class ActivationBuffers {
 public:
  static absl::StatusOr<ActivationBuffers> Create(const Model& model, int max_rows);
  // Views of the first `rows` rows.
  LayerActivations View(int rows) const;
  int max_rows() const { return max_rows_; }

 private:
  ActivationBuffers() = default;
  int max_rows_ = 0;
  LayerActivations full_;
  std::vector<Buffer> storage_;
};

}  // namespace memory3
