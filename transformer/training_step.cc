#include "transformer/training_step.h"

#include <algorithm>
#include <utility>

#include "transformer/check.h"

namespace memory3 {
namespace {

// Logits are computed for so many rows at a time that they take about this much memory.
constexpr int64_t kLogitBytes = int64_t{256} << 20;

// Lays tensors out one behind the other. Without memory it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  Tensor Matrix(int64_t rows, int64_t cols, DType dtype) {
    return {Take(rows * cols * SizeOf(dtype)), dtype, rows, cols, cols};
  }
  float* Floats(int64_t n) { return static_cast<float*>(Take(n * SizeOf(DType::kF32))); }
  size_t bytes() const { return bytes_; }

 private:
  void* Take(size_t bytes) {
    void* at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    return at;
  }
  char* base_;
  size_t bytes_ = 0;
};

absl::Status Reserve(Device* device, Buffer* buffer, size_t bytes) {
  if (buffer->bytes() >= bytes) return absl::OkStatus();
  *buffer = Buffer();  // room for the larger one
  absl::StatusOr<Buffer> larger = device->Allocate(bytes);
  if (!larger.ok()) return larger.status();
  *buffer = *std::move(larger);
  return absl::OkStatus();
}

// Calls carve(Carver&) to count, reserves, and calls it again on the memory.
template <typename Carve>
absl::Status Lay(Device* device, Buffer* buffer, const Carve& carve) {
  Carver count(nullptr);
  carve(count);
  if (absl::Status status = Reserve(device, buffer, count.bytes()); !status.ok()) return status;
  Carver place(buffer->data());
  carve(place);
  return absl::OkStatus();
}

void CarveActivations(Carver& carver, const ModelConfig& c, int64_t rows, DType dtype,
                      LayerActivations* a) {
  a->attention_in = carver.Matrix(rows, c.hidden_size, dtype);
  a->attention_inv_rms = carver.Floats(rows);
  a->qkv = carver.Matrix(rows, int64_t{c.heads + 2 * c.kv_heads} * c.head_dim, dtype);
  a->attention = carver.Matrix(rows, int64_t{c.heads} * c.head_dim, dtype);
  a->lse = carver.Floats(rows * c.heads);
  a->x_mid = carver.Matrix(rows, c.hidden_size, DType::kF32);
  a->mlp_in = carver.Matrix(rows, c.hidden_size, dtype);
  a->mlp_inv_rms = carver.Floats(rows);
  a->gate_up = carver.Matrix(rows, int64_t{2} * c.intermediate_size, dtype);
  a->hidden = carver.Matrix(rows, c.intermediate_size, dtype);
}

void CarveBackward(Carver& carver, const ModelConfig& c, int64_t rows, DType dtype,
                   BackwardActivations* g) {
  g->stream = carver.Matrix(rows, c.hidden_size, DType::kF32);
  g->norm_out = carver.Matrix(rows, c.hidden_size, dtype);
  g->qkv = carver.Matrix(rows, int64_t{c.heads + 2 * c.kv_heads} * c.head_dim, DType::kF32);
  g->attention = carver.Matrix(rows, int64_t{c.heads} * c.head_dim, dtype);
  g->gate_up = carver.Matrix(rows, int64_t{2} * c.intermediate_size, dtype);
  g->hidden = carver.Matrix(rows, c.intermediate_size, dtype);
}

LayerActivations FirstRows(LayerActivations a, int rows) {
  for (Tensor* t : {&a.x, &a.attention_in, &a.qkv, &a.attention, &a.x_mid, &a.mlp_in, &a.gate_up,
                    &a.hidden, &a.y}) {
    *t = t->Rows(0, rows);
  }
  return a;
}

BackwardActivations FirstRows(BackwardActivations g, int rows) {
  for (Tensor* t : {&g.stream, &g.norm_out, &g.qkv, &g.attention, &g.gate_up, &g.hidden}) {
    *t = t->Rows(0, rows);
  }
  return g;
}

void ZeroMatrix(Device* device, const Tensor& t) {
  device->Zero(t.data, t.rows * t.cols * SizeOf(t.dtype));
}

}  // namespace

TrainingStep::TrainingStep(const Parameters* parameters)
    : parameters_(parameters), model_(&parameters->model()), device_(&parameters->device()) {}

absl::StatusOr<TrainingResult> TrainingStep::Run(const TrainingBatch& batch, float* gradient) {
  absl::StatusOr<TrainingLayout> layout = TrainingLayout::Create(model_->config(), batch);
  if (!layout.ok()) return layout.status();
  Pass pass{.layout = *std::move(layout)};
  pass.backward = gradient != nullptr;
  pass.recompute = batch.recompute_activations || !pass.backward;
  pass.through_writing = pass.backward && batch.gradient_through_writing;
  if (!pass.layout.references().empty()) {
    pass.last_reference_layer = model_->config().explicit_memory->memory_layers.back();
  }
  TrainingResult result;
  result.tokens = static_cast<int64_t>(pass.layout.targets().size());
  result.sequence_loss.resize(batch.sequences.size());
  if (result.tokens == 0) return result;

  if (absl::Status status = Allocate(pass); !status.ok()) return status;
  Prepare(pass);
  const ModelGradients gradients =
      pass.backward ? parameters_->GradientViews(gradient) : ModelGradients{};
  Forward(pass);
  Head(pass, gradients);
  if (pass.backward) Backward(pass, gradients);

  std::vector<float> losses(result.tokens);
  absl::Status status =
      device_->Download(losses.data(), losses_.data(), losses.size() * sizeof(float));
  if (!status.ok()) return status;
  for (int64_t i = 0; i < result.tokens; ++i) {
    result.sequence_loss[pass.layout.sequence_of_target()[i]] += losses[i];
  }
  for (const double loss : result.sequence_loss) result.loss += loss;
  return result;
}

absl::Status TrainingStep::Allocate(const Pass& pass) {
  const ModelConfig& c = model_->config();
  const DType dtype = device_->activation_dtype();
  const int64_t rows = pass.layout.rows();
  const int64_t references = pass.layout.references().size();
  const int64_t targets = pass.layout.targets().size();
  absl::Status status;

  // The residual stream between the blocks: all of it for backward, else entering and leaving.
  activations_.assign(c.layers, LayerActivations{});
  status.Update(Lay(device_, &stream_, [&](Carver& carver) {
    std::vector<Tensor> streams(pass.backward ? c.layers + 1 : 2);
    for (Tensor& t : streams) t = carver.Matrix(rows, c.hidden_size, DType::kF32);
    for (int layer = 0; layer < c.layers; ++layer) {
      activations_[layer].x = streams[layer % streams.size()];
      activations_[layer].y = streams[(layer + 1) % streams.size()];
    }
  }));
  layers_.resize(std::max<size_t>(layers_.size(), pass.recompute ? 1 : c.layers));
  for (int layer = 0; layer < c.layers; ++layer) {
    status.Update(Lay(device_, &layers_[pass.recompute ? 0 : layer], [&](Carver& carver) {
      CarveActivations(carver, c, rows, dtype, &activations_[layer]);
    }));
  }
  if (references > 0) {
    const int64_t layers = c.explicit_memory->memory_layers.size();
    const int64_t vectors = references * c.kv_heads * pass.layout.tokens_kept();
    const int64_t bytes = 2 * vectors * c.head_dim * sizeof(float);
    status.Update(Reserve(device_, &memories_, layers * bytes));
    status.Update(Reserve(device_, &memory_gradient_, pass.through_writing ? bytes : 0));
    status.Update(Reserve(device_, &kept_, layers * vectors * sizeof(int32_t)));
    status.Update(Reserve(device_, &scores_, rows * c.kv_heads * sizeof(float)));
  }
  status.Update(Lay(device_, &head_, [&](Carver& carver) {
    head_x_ = carver.Matrix(targets, c.hidden_size, DType::kF32);
    head_in_ = carver.Matrix(targets, c.hidden_size, dtype);
    head_inv_rms_ = carver.Floats(targets);
    head_din_ = carver.Matrix(pass.backward ? targets : 0, c.hidden_size, dtype);
    head_dx_ = carver.Matrix(pass.backward ? targets : 0, c.hidden_size, DType::kF32);
  }));
  const int64_t row_bytes = int64_t{c.vocab_size} * sizeof(float);
  logit_rows_at_once_ = std::clamp<int64_t>(kLogitBytes / row_bytes, 1, targets);
  status.Update(Reserve(device_, &logits_, logit_rows_at_once_ * row_bytes));
  status.Update(Reserve(device_, &losses_, targets * sizeof(float)));
  if (pass.backward) {
    status.Update(Lay(device_, &backward_,
                      [&](Carver& carver) { CarveBackward(carver, c, rows, dtype, &gradients_); }));
  }
  return status;
}

void TrainingStep::Prepare(const Pass& pass) {
  const ModelConfig& c = model_->config();
  with_references_.assign(c.layers, nullptr);
  without_references_.assign(c.layers, nullptr);
  for (int layer = 0; layer < c.layers; ++layer) {
    TrainingLayout::Addresses at;
    at.qkv = activations_[layer].qkv;
    at.qkv_gradient = pass.backward ? gradients_.qkv.as<float>() : nullptr;
    if (const int index = MemoryIndex(pass, layer); index >= 0) {
      at.memory = Memory(pass, index);
      at.memory_gradient = pass.through_writing ? memory_gradient_.as<float>() : nullptr;
    }
    if (layer <= pass.last_reference_layer) {
      with_references_[layer] =
          device_->Prepare(pass.layout.MakeInput(c, at, /*with_references=*/true), 2 * layer);
    }
    if (layer >= pass.last_reference_layer || !pass.through_writing) {
      without_references_[layer] =
          device_->Prepare(pass.layout.MakeInput(c, at, /*with_references=*/false), 2 * layer + 1);
    }
  }
}

void TrainingStep::Forward(const Pass& pass) {
  const ModelConfig& c = model_->config();
  const std::vector<ReferenceRows>& references = pass.layout.references();
  const int all = pass.layout.rows(), sequences = pass.layout.rows_without_references();
  const int keep = pass.layout.tokens_kept();
  for (int layer = 0; layer < c.layers; ++layer) {
    const bool writes = layer <= pass.last_reference_layer;
    const PreparedBatch* batch = writes ? with_references_[layer] : without_references_[layer];
    const LayerActivations a = Activations(layer, writes ? all : sequences);
    if (layer == 0) device_->Embed(a.x, *batch, model_->weights().embedding);
    BlockQkv(*model_, layer, a);
    const int index = MemoryIndex(pass, layer);
    if (index >= 0) {
      const Tensor scores{scores_.data(), DType::kF32, all, c.kv_heads, c.kv_heads};
      if (keep == c.explicit_memory->reference_tokens) {
        // Everything is kept: equal scores, no need to compute them.
        ZeroMatrix(device_, scores);
      } else {
        device_->AttentionReceived(scores, QueryOf(c, a.qkv), KeyOf(c, a.qkv), references,
                                   model_->attention_shape());
      }
      device_->SelectKept(Kept(pass, index), scores, references, keep);
    }
    BlockRope(*model_, *batch, a);
    if (index >= 0) {
      device_->GatherKept(Memory(pass, index), Kept(pass, index), KeyOf(c, a.qkv),
                          ValueOf(c, a.qkv), static_cast<int>(references.size()), keep, c.kv_heads,
                          c.head_dim);
    }
    // The last memory layer needs of the references nothing but keys, values and scores.
    const bool drop = layer >= pass.last_reference_layer;
    const LayerActivations rest = Activations(layer, drop ? sequences : all);
    const int source_layer[] = {0, index >= 0 ? 0 : -1};
    BlockAttention(*model_, layer, drop ? *without_references_[layer] : *batch,
                   {.source_layer = source_layer}, rest);
    BlockMlp(*model_, layer, rest);
  }
}

void TrainingStep::Head(const Pass& pass, const ModelGradients& gradients) {
  const ModelConfig& c = model_->config();
  const ModelWeights& weights = model_->weights();
  const PreparedBatch& batch = *without_references_.back();
  const Tensor y = Activations(c.layers - 1, pass.layout.rows_without_references()).y;
  device_->GatherRows(head_x_, y, batch);
  device_->RmsNorm(head_in_, head_x_, weights.final_norm, c.rms_norm_eps, head_inv_rms_);
  const std::span<const int32_t> targets = pass.layout.targets();
  const int64_t n = targets.size();
  for (int64_t row = 0; row < n; row += logit_rows_at_once_) {
    const int64_t count = std::min(logit_rows_at_once_, n - row);
    const Tensor logits{logits_.data(), DType::kF32, count, c.vocab_size, c.vocab_size};
    const Tensor x = head_in_.Rows(row, count);
    device_->MatMul(logits, x, *weights.lm_head, /*accumulate=*/false);
    device_->CrossEntropy(losses_.as<float>() + row, logits, targets.subspan(row, count),
                          /*loss_scale=*/1);
    if (!pass.backward) continue;
    device_->MatMulBackwardInput(head_din_.Rows(row, count), logits, *weights.lm_head,
                                 /*accumulate=*/false);
    device_->MatMulBackwardWeight(gradients.lm_head, logits, x);
  }
  if (!pass.backward) return;
  ZeroMatrix(device_, head_dx_);
  device_->RmsNormBackward(head_dx_, gradients.final_norm, head_din_, head_x_, weights.final_norm,
                           head_inv_rms_);
  ZeroMatrix(device_, gradients_.stream);  // also the references' rows, which nothing else sets
  device_->ScatterRows(gradients_.stream.Rows(0, y.rows), head_dx_, batch);
}

void TrainingStep::Backward(const Pass& pass, const ModelGradients& gradients) {
  const ModelConfig& c = model_->config();
  const int all = pass.layout.rows(), sequences = pass.layout.rows_without_references();
  const int references = static_cast<int>(pass.layout.references().size());
  const int keep = pass.layout.tokens_kept();
  for (int layer = c.layers - 1; layer >= 0; --layer) {
    // Rows that the block's second half and its first (norm, q, k, v) are taken back through.
    const bool second = pass.through_writing && layer < pass.last_reference_layer;
    const bool first = pass.through_writing && layer <= pass.last_reference_layer;
    const PreparedBatch& second_batch =
        second ? *with_references_[layer] : *without_references_[layer];
    const PreparedBatch& first_batch =
        first ? *with_references_[layer] : *without_references_[layer];
    const LayerActivations a2 = Activations(layer, second ? all : sequences);
    const LayerActivations a1 = Activations(layer, first ? all : sequences);
    const BackwardActivations g2 = FirstRows(gradients_, second ? all : sequences);
    const BackwardActivations g1 = FirstRows(gradients_, first ? all : sequences);
    const int index = MemoryIndex(pass, layer);
    const int source_layer[] = {0, index >= 0 ? 0 : -1};
    const BlockPlace place{.source_layer = source_layer};

    if (pass.recompute) {
      BlockQkv(*model_, layer, a1);
      BlockRope(*model_, first_batch, a1);
      BlockAttention(*model_, layer, second_batch, place, a2);
      BlockMlpHidden(*model_, layer, a2);
    }
    BlockMlpBackward(*model_, layer, a2, gradients.layers[layer], g2);
    ZeroMatrix(device_, g1.qkv);
    const bool through = pass.through_writing && index >= 0;
    if (through) {
      device_->Zero(memory_gradient_.data(),
                    2LL * references * c.kv_heads * keep * c.head_dim * sizeof(float));
    }
    BlockAttentionBackward(*model_, layer, second_batch, place, a2, gradients.layers[layer], g2);
    if (through) {
      device_->ScatterKept(KeyOf(c, g1.qkv), ValueOf(c, g1.qkv), memory_gradient_.as<float>(),
                           Kept(pass, index), references, keep, c.kv_heads, c.head_dim);
    }
    BlockQkvBackward(*model_, layer, first_batch, a1, gradients.layers[layer], g1);
    if (layer == 0) device_->EmbedBackward(gradients.embedding, g1.stream, first_batch);
  }
}

int TrainingStep::MemoryIndex(const Pass& pass, int layer) const {
  if (pass.last_reference_layer < 0) return -1;
  const std::vector<int>& layers = model_->config().explicit_memory->memory_layers;
  const auto found = std::find(layers.begin(), layers.end(), layer);
  return found == layers.end() ? -1 : static_cast<int>(found - layers.begin());
}

float* TrainingStep::Memory(const Pass& pass, int index) const {
  const ModelConfig& c = model_->config();
  return memories_.as<float>() + int64_t{2} * index * pass.layout.references().size() * c.kv_heads *
                                     pass.layout.tokens_kept() * c.head_dim;
}

int32_t* TrainingStep::Kept(const Pass& pass, int index) const {
  return kept_.as<int32_t>() + int64_t{index} * pass.layout.references().size() *
                                   model_->config().kv_heads * pass.layout.tokens_kept();
}

LayerActivations TrainingStep::Activations(int layer, int rows) const {
  return FirstRows(activations_[layer], rows);
}

int64_t TrainingStep::bytes() const {
  int64_t bytes = 0;
  for (const Buffer* b : {&stream_, &memories_, &memory_gradient_, &kept_, &scores_, &head_,
                          &logits_, &losses_, &backward_}) {
    bytes += b->bytes();
  }
  for (const Buffer& b : layers_) bytes += b.bytes();
  return bytes;
}

}  // namespace memory3
