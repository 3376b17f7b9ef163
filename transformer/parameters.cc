#include "transformer/parameters.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "transformer/bf16.h"
#include "transformer/check.h"
#include "transformer/checkpoint.h"

namespace memory3 {
namespace {

constexpr float kInitialDeviation = 0.02f;

std::vector<Parameter> ListParameters(const ModelConfig& c) {
  const int64_t q = int64_t{c.heads} * c.head_dim, kv = int64_t{c.kv_heads} * c.head_dim;
  std::vector<Parameter> list;
  const auto matrix = [&](std::string name, int64_t rows, int64_t cols) {
    list.push_back({std::move(name), 0, rows, cols, true});
  };
  const auto norm = [&](std::string name) {
    list.push_back({std::move(name), 0, c.hidden_size, 1, false});
  };
  matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    matrix(layer + "self_attn.q_proj.weight", q, c.hidden_size);
    matrix(layer + "self_attn.k_proj.weight", kv, c.hidden_size);
    matrix(layer + "self_attn.v_proj.weight", kv, c.hidden_size);
    matrix(layer + "self_attn.o_proj.weight", c.hidden_size, q);
    matrix(layer + "mlp.gate_proj.weight", c.intermediate_size, c.hidden_size);
    matrix(layer + "mlp.up_proj.weight", c.intermediate_size, c.hidden_size);
    matrix(layer + "mlp.down_proj.weight", c.hidden_size, c.intermediate_size);
  }
  if (!c.tie_word_embeddings) matrix("lm_head.weight", c.vocab_size, c.hidden_size);
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    norm(layer + "input_layernorm.weight");
    norm(layer + "post_attention_layernorm.weight");
  }
  norm("model.norm.weight");
  int64_t offset = 0;
  for (Parameter& p : list) {
    p.offset = offset;
    offset += p.size();
  }
  return list;
}

}  // namespace

InitialParameters::InitialParameters(uint64_t seed, int layers)
    : matrices_(seed, kInitialDeviation),
      residual_(seed, kInitialDeviation / std::sqrt(2.0f * static_cast<float>(layers))) {}

absl::Status InitialParameters::Read(std::string_view name, int64_t rows, int64_t cols,
                                     std::span<float> out) const {
  const absl::string_view n(name.data(), name.size());
  if (absl::EndsWith(n, "norm.weight")) {
    std::fill(out.begin(), out.end(), 1.0f);
    return absl::OkStatus();
  }
  const bool residual = absl::EndsWith(n, "o_proj.weight") || absl::EndsWith(n, "down_proj.weight");
  return (residual ? residual_ : matrices_).Read(name, rows, cols, out);
}

absl::StatusOr<std::unique_ptr<Parameters>> Parameters::Create(Device* device, ModelConfig config) {
  if (absl::Status status = CheckModelShape(config); !status.ok()) return status;
  std::unique_ptr<Parameters> p(new Parameters);
  p->device_ = device;
  p->config_ = std::move(config);
  p->list_ = ListParameters(p->config_);
  for (const Parameter& parameter : p->list_) {
    p->size_ += parameter.size();
    if (parameter.decay) p->decayed_ += parameter.size();
  }
  absl::StatusOr<Buffer> values = device->Allocate(p->size_ * sizeof(float));
  if (!values.ok()) return values.status();
  p->values_ = *std::move(values);
  if (device->activation_dtype() == DType::kBF16) {
    absl::StatusOr<Buffer> shadow = device->Allocate(p->size_ * sizeof(uint16_t));
    if (!shadow.ok()) return shadow.status();
    p->shadow_ = *std::move(shadow);
  }

  const ModelConfig& c = p->config_;
  const int64_t qkv = int64_t{c.heads + 2 * c.kv_heads} * c.head_dim;
  const auto weight = [&](std::string_view first, int64_t rows) {
    const Tensor view = p->View(p->values(), first, rows);
    return device->TrainableWeight(view, p->ShadowAt(view.as<float>() - p->values()));
  };
  ModelWeights w;
  w.embedding = p->View(p->values(), "model.embed_tokens.weight", c.vocab_size);
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    LayerWeights& lw = w.layers.emplace_back();
    lw.attention_norm =
        p->View(p->values(), layer + "input_layernorm.weight", c.hidden_size).as<float>();
    lw.qkv = weight(layer + "self_attn.q_proj.weight", qkv);
    lw.out = weight(layer + "self_attn.o_proj.weight", c.hidden_size);
    lw.mlp_norm =
        p->View(p->values(), layer + "post_attention_layernorm.weight", c.hidden_size).as<float>();
    lw.gate_up = weight(layer + "mlp.gate_proj.weight", int64_t{2} * c.intermediate_size);
    lw.down = weight(layer + "mlp.down_proj.weight", c.hidden_size);
  }
  w.final_norm = p->View(p->values(), "model.norm.weight", c.hidden_size).as<float>();
  w.lm_head =
      weight(c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight", c.vocab_size);
  p->model_ = std::make_unique<Model>(device, c, std::move(w));
  return p;
}

absl::Status Parameters::Load(const TensorSource& source) {
  std::vector<float> host;
  std::vector<uint16_t> rounded;
  for (const Parameter& p : list_) {
    host.resize(p.size());
    if (absl::Status status = source.Read(p.name, p.rows, p.cols, host); !status.ok()) {
      return status;
    }
    device_->Upload(values() + p.offset, host.data(), host.size() * sizeof(float));
    if (shadow_) {
      rounded.resize(host.size());
      std::transform(host.begin(), host.end(), rounded.begin(), FloatToBf16);
      device_->Upload(ShadowAt(p.offset), rounded.data(), rounded.size() * sizeof(uint16_t));
    }
    // The host's buffers are about to be used again.
    if (absl::Status status = device_->Synchronize(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Parameters::Download(const Parameter& parameter, std::span<float> out) const {
  CHECK(out.size() == parameter.size());
  return device_->Download(out.data(), values() + parameter.offset, out.size() * sizeof(float));
}

absl::Status Parameters::Save(const std::string& directory, DType dtype,
                              const std::string& tokenizer_directory) const {
  return SaveModelDirectory(
      directory, config_, dtype,
      [this](const ModelTensor& tensor, std::span<float> out) {
        return Download(Named(tensor.name), out);
      },
      tokenizer_directory);
}

absl::StatusOr<Buffer> Parameters::AllocateLike() const {
  return device_->Allocate(size_ * sizeof(float));
}

ModelGradients Parameters::GradientViews(float* flat) const {
  const ModelConfig& c = config_;
  const int64_t qkv = int64_t{c.heads + 2 * c.kv_heads} * c.head_dim;
  ModelGradients g;
  g.embedding = View(flat, "model.embed_tokens.weight", c.vocab_size);
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    LayerGradients& lg = g.layers.emplace_back();
    lg.attention_norm = View(flat, layer + "input_layernorm.weight", c.hidden_size).as<float>();
    lg.qkv = View(flat, layer + "self_attn.q_proj.weight", qkv);
    lg.out = View(flat, layer + "self_attn.o_proj.weight", c.hidden_size);
    lg.mlp_norm = View(flat, layer + "post_attention_layernorm.weight", c.hidden_size).as<float>();
    lg.gate_up = View(flat, layer + "mlp.gate_proj.weight", int64_t{2} * c.intermediate_size);
    lg.down = View(flat, layer + "mlp.down_proj.weight", c.hidden_size);
  }
  g.final_norm = View(flat, "model.norm.weight", c.hidden_size).as<float>();
  g.lm_head = c.tie_word_embeddings ? g.embedding : View(flat, "lm_head.weight", c.vocab_size);
  return g;
}

void Parameters::AdamWStep(const float* gradient, float* m, float* v, const AdamW& options,
                           float gradient_scale) {
  device_->AdamWStep(values(), ShadowAt(0), gradient, m, v, decayed_, options, gradient_scale);
  AdamW without_decay = options;
  without_decay.weight_decay = 0;
  // The bf16 copy of the norms is never read, but keeping it whole costs nothing.
  device_->AdamWStep(values() + decayed_, ShadowAt(decayed_), gradient + decayed_, m + decayed_,
                     v + decayed_, size_ - decayed_, without_decay, gradient_scale);
}

const Parameter& Parameters::Named(std::string_view name) const {
  const auto p =
      std::find_if(list_.begin(), list_.end(), [&](const Parameter& q) { return q.name == name; });
  CHECK(p != list_.end());
  return *p;
}

// `rows` rows from parameter `first` on, over its neighbours of the same width.
Tensor Parameters::View(float* flat, std::string_view first, int64_t rows) const {
  const Parameter& p = Named(first);
  return {flat + p.offset, DType::kF32, rows, p.cols, p.cols};
}

void* Parameters::ShadowAt(int64_t offset) const {
  return shadow_ ? shadow_.as<uint16_t>() + offset : nullptr;
}

}  // namespace memory3
