#include "transformer/block.h"

#include <utility>

#include "absl/status/status.h"

namespace memory3 {
namespace {

// to = from, where the two are not the same memory already.
void CopyRows(Device& device, const Tensor& to, const Tensor& from) {
  if (to.data == from.data) return;
  device.Copy(to.data, from.data, from.rows * from.cols * SizeOf(from.dtype));
}

}  // namespace

KvSource LiveKvSource(const ModelConfig& config, const Tensor& qkv) {
  KvSource source;
  source.dtype = qkv.dtype;
  source.layer_stride = 0;
  source.head_stride = config.head_dim;
  source.token_stride = qkv.stride;
  source.value_offset = int64_t{config.kv_heads} * config.head_dim;
  return source;
}

void BlockQkv(const Model& model, int layer, const LayerActivations& a) {
  Device& device = model.device();
  const LayerWeights& w = model.layer(layer);
  device.RmsNorm(a.attention_in, a.x, w.attention_norm, model.config().rms_norm_eps,
                 a.attention_inv_rms);
  device.MatMul(a.qkv, a.attention_in, *w.qkv, /*accumulate=*/false);
}

void BlockRope(const Model& model, const PreparedBatch& batch, const LayerActivations& a) {
  const ModelConfig& c = model.config();
  // Queries and keys are neighbours, so one call turns the heads of both.
  const int turned = c.heads + c.kv_heads;
  model.device().Rope(a.qkv.Cols(0, int64_t{turned} * c.head_dim), batch, model.inv_freq(), turned,
                      c.head_dim,
                      /*inverse=*/false);
}

void BlockAttention(const Model& model, int layer, const PreparedBatch& batch,
                    const BlockPlace& place, const LayerActivations& a) {
  Device& device = model.device();
  const ModelConfig& c = model.config();
  if (place.store_layer >= 0) {
    device.StoreKv(batch, KeyOf(c, a.qkv), ValueOf(c, a.qkv), place.store_layer, c.kv_heads,
                   c.head_dim);
  }
  device.Attention(a.attention, QueryOf(c, a.qkv), batch, place.source_layer,
                   model.attention_shape(), a.lse);
  CopyRows(device, a.x_mid, a.x);
  device.MatMul(a.x_mid, a.attention, *model.layer(layer).out, /*accumulate=*/true);
}

void BlockMlpHidden(const Model& model, int layer, const LayerActivations& a) {
  Device& device = model.device();
  const LayerWeights& w = model.layer(layer);
  device.RmsNorm(a.mlp_in, a.x_mid, w.mlp_norm, model.config().rms_norm_eps, a.mlp_inv_rms);
  device.MatMul(a.gate_up, a.mlp_in, *w.gate_up, /*accumulate=*/false);
  device.SiluMul(a.hidden, a.gate_up);
}

void BlockMlp(const Model& model, int layer, const LayerActivations& a) {
  Device& device = model.device();
  BlockMlpHidden(model, layer, a);
  CopyRows(device, a.y, a.x_mid);
  device.MatMul(a.y, a.hidden, *model.layer(layer).down, /*accumulate=*/true);
}

void BlockForward(const Model& model, int layer, const PreparedBatch& batch,
                  const BlockPlace& place, const LayerActivations& a) {
  BlockQkv(model, layer, a);
  BlockRope(model, batch, a);
  BlockAttention(model, layer, batch, place, a);
  BlockMlp(model, layer, a);
}

void BlockMlpBackward(const Model& model, int layer, const LayerActivations& a,
                      const LayerGradients& w, const BackwardActivations& g) {
  Device& device = model.device();
  const LayerWeights& weights = model.layer(layer);
  device.MatMulBackwardInput(g.hidden, g.stream, *weights.down, /*accumulate=*/false);
  device.MatMulBackwardWeight(w.down, g.stream, a.hidden);
  device.SiluMulBackward(g.gate_up, g.hidden, a.gate_up);
  device.MatMulBackwardInput(g.norm_out, g.gate_up, *weights.gate_up, /*accumulate=*/false);
  device.MatMulBackwardWeight(w.gate_up, g.gate_up, a.mlp_in);
  // The residual path is the stream itself; the norm's path is added to it.
  device.RmsNormBackward(g.stream, w.mlp_norm, g.norm_out, a.x_mid, weights.mlp_norm,
                         a.mlp_inv_rms);
}

void BlockAttentionBackward(const Model& model, int layer, const PreparedBatch& batch,
                            const BlockPlace& place, const LayerActivations& a,
                            const LayerGradients& w, const BackwardActivations& g) {
  Device& device = model.device();
  const ModelConfig& c = model.config();
  device.MatMulBackwardInput(g.attention, g.stream, *model.layer(layer).out,
                             /*accumulate=*/false);
  device.MatMulBackwardWeight(w.out, g.stream, a.attention);
  device.AttentionBackward(QueryOf(c, g.qkv), g.attention, a.attention, QueryOf(c, a.qkv), batch,
                           place.source_layer, model.attention_shape(), a.lse);
}

void BlockQkvBackward(const Model& model, int layer, const PreparedBatch& batch,
                      const LayerActivations& a, const LayerGradients& w,
                      const BackwardActivations& g) {
  Device& device = model.device();
  const ModelConfig& c = model.config();
  const LayerWeights& weights = model.layer(layer);
  const int turned = c.heads + c.kv_heads;
  device.Rope(g.qkv.Cols(0, int64_t{turned} * c.head_dim), batch, model.inv_freq(), turned,
              c.head_dim, /*inverse=*/true);
  device.MatMulBackwardInput(g.norm_out, g.qkv, *weights.qkv, /*accumulate=*/false);
  device.MatMulBackwardWeight(w.qkv, g.qkv, a.attention_in);
  device.RmsNormBackward(g.stream, w.attention_norm, g.norm_out, a.x, weights.attention_norm,
                         a.attention_inv_rms);
}

absl::StatusOr<ActivationBuffers> ActivationBuffers::Create(const Model& model, int max_rows) {
  Device& device = model.device();
  const ModelConfig& c = model.config();
  ActivationBuffers buffers;
  buffers.max_rows_ = max_rows;
  absl::Status status;
  auto allocate = [&](int64_t cols, DType dtype) {
    Tensor t{nullptr, dtype, max_rows, cols, cols};
    if (!status.ok()) return t;
    absl::StatusOr<Buffer> buffer = device.Allocate(size_t(max_rows) * cols * SizeOf(dtype));
    if (!buffer.ok()) {
      status = buffer.status();
      return t;
    }
    t.data = buffer->data();
    buffers.storage_.push_back(*std::move(buffer));
    return t;
  };
  const DType activation = device.activation_dtype();
  LayerActivations& a = buffers.full_;
  a.x = a.x_mid = a.y = allocate(c.hidden_size, DType::kF32);
  a.attention_in = a.mlp_in = allocate(c.hidden_size, activation);
  a.qkv = allocate(int64_t{c.heads + 2 * c.kv_heads} * c.head_dim, activation);
  a.attention = allocate(int64_t{c.heads} * c.head_dim, activation);
  a.gate_up = allocate(int64_t{2} * c.intermediate_size, activation);
  a.hidden = allocate(c.intermediate_size, activation);
  if (!status.ok()) return status;
  return buffers;
}

LayerActivations ActivationBuffers::View(int rows) const {
  LayerActivations a = full_;
  for (Tensor* t : {&a.x, &a.attention_in, &a.qkv, &a.attention, &a.x_mid, &a.mlp_in, &a.gate_up,
                    &a.hidden, &a.y}) {
    *t = t->Rows(0, rows);
  }
  return a;
}

}  // namespace memory3
