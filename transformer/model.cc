#include "transformer/model.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "transformer/bf16.h"

namespace memory3 {
namespace {

// splitmix64: good enough to draw initial weights from, and addressable by index.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// FNV-1a: the same on every platform, unlike std::hash.
uint64_t NameHash(std::string_view name) {
  uint64_t h = 0xcbf29ce484222325;
  for (char c : name) h = (h ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  return h;
}

// Reads tensors of a source into host memory that is used again, and puts them on the device.
class Loader {
 public:
  Loader(Device* device, const TensorSource& source, WeightFormat format,
         std::vector<Buffer>* storage)
      : device_(device), source_(source), format_(format), storage_(storage) {}

  struct Part {
    std::string name;
    int64_t rows;
  };

  // One Weight of the parts' rows, one below the other.
  absl::StatusOr<std::unique_ptr<Weight>> ReadWeight(const std::vector<Part>& parts, int64_t in) {
    int64_t out = 0;
    for (const Part& part : parts) out += part.rows;
    host_.resize(out * in);
    int64_t at = 0;
    for (const Part& part : parts) {
      absl::Status status =
          source_.Read(part.name, part.rows, in, std::span(host_).subspan(at, part.rows * in));
      if (!status.ok()) return status;
      at += part.rows * in;
    }
    return device_->PrepareWeight(host_, out, in, format_);
  }

  // Row-major in device memory, f32 or bf16.
  absl::StatusOr<Tensor> ReadTensor(const std::string& name, int64_t rows, int64_t cols,
                                    DType dtype) {
    host_.resize(rows * cols);
    absl::Status status = source_.Read(name, rows, cols, host_);
    if (!status.ok()) return status;
    const void* bytes = host_.data();
    std::vector<uint16_t> rounded;
    if (dtype == DType::kBF16) {
      rounded.resize(host_.size());
      std::transform(host_.begin(), host_.end(), rounded.begin(), FloatToBf16);
      bytes = rounded.data();
    }
    absl::StatusOr<Buffer> buffer = device_->Allocate(host_.size() * SizeOf(dtype));
    if (!buffer.ok()) return buffer.status();
    device_->Upload(buffer->data(), bytes, host_.size() * SizeOf(dtype));
    status = device_->Synchronize();  // the host's copy is about to be used again
    if (!status.ok()) return status;
    Tensor tensor{buffer->data(), dtype, rows, cols, cols};
    storage_->push_back(*std::move(buffer));
    return tensor;
  }

  absl::StatusOr<const float*> ReadVector(const std::string& name, int64_t size) {
    absl::StatusOr<Tensor> tensor = ReadTensor(name, size, 1, DType::kF32);
    if (!tensor.ok()) return tensor.status();
    return tensor->as<float>();
  }

 private:
  Device* device_;
  const TensorSource& source_;
  WeightFormat format_;
  std::vector<Buffer>* storage_;
  std::vector<float> host_;
};

template <typename T>
absl::Status Assign(T& to, absl::StatusOr<T> from) {
  if (!from.ok()) return from.status();
  to = *std::move(from);
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckModelShape(const ModelConfig& c) {
  const std::pair<const char*, int> positive[] = {
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.layers},
      {"num_attention_heads", c.heads},
      {"num_key_value_heads", c.kv_heads},
      {"head_dim", c.head_dim},
      {"max_position_embeddings", c.max_position_embeddings}};
  for (const auto& [name, value] : positive) {
    if (value <= 0)
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ", must be positive"));
  }
  if (c.heads % c.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("num_attention_heads (", c.heads,
                                                   ") is not a multiple of num_key_value_heads (",
                                                   c.kv_heads, ")"));
  }
  if (c.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("head_dim is ", c.head_dim, ", must be even"));
  }
  return absl::OkStatus();
}

absl::Status CheckExplicitMemory(const ModelConfig& c, const ExplicitMemoryConfig& m) {
  auto error = [](auto&&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("explicit_memory.", parts...));
  };
  if (m.memory_layers.empty()) return error("memory_layers is empty");
  for (size_t i = 0; i < m.memory_layers.size(); ++i) {
    const int layer = m.memory_layers[i];
    if (layer < 0 || layer >= c.layers || (i > 0 && layer <= m.memory_layers[i - 1])) {
      return error("memory_layers: ", layer, " is out of range or order, layers: ", c.layers);
    }
  }
  if (m.tokens_kept < 1) return error("tokens_kept is ", m.tokens_kept);
  if (m.reference_tokens < 1) return error("reference_tokens is ", m.reference_tokens);
  if (m.chunk_tokens < 1) return error("chunk_tokens is ", m.chunk_tokens);
  if (m.prefix_token_ids.empty()) return error("prefix_token_ids is empty");
  const int64_t before_context = int64_t{m.reference_tokens} + m.prefix_token_ids.size();
  if (before_context >= c.max_position_embeddings) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_position_embeddings is ", c.max_position_embeddings,
                     ", prefix and references alone take ", before_context));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const Model>> Model::Load(Device* device, const ModelConfig& c,
                                                         const TensorSource& source,
                                                         WeightFormat format) {
  if (absl::Status status = CheckModelShape(c); !status.ok()) return status;
  std::vector<Buffer> storage;
  Loader loader(device, source, format, &storage);
  const int64_t q_size = int64_t{c.heads} * c.head_dim, kv_size = int64_t{c.kv_heads} * c.head_dim;

  ModelWeights w;
  absl::Status status;
  // Rounded weights leave no use for an exact table.
  const DType table = format == WeightFormat::kF32 ? DType::kF32 : DType::kBF16;
  status.Update(Assign(w.embedding, loader.ReadTensor("model.embed_tokens.weight", c.vocab_size,
                                                      c.hidden_size, table)));
  if (!status.ok()) return status;
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    const std::string attention = layer + "self_attn.", mlp = layer + "mlp.";
    LayerWeights& lw = w.layers.emplace_back();
    status.Update(Assign(lw.attention_norm,
                         loader.ReadVector(layer + "input_layernorm.weight", c.hidden_size)));
    status.Update(Assign(lw.qkv, loader.ReadWeight({{attention + "q_proj.weight", q_size},
                                                    {attention + "k_proj.weight", kv_size},
                                                    {attention + "v_proj.weight", kv_size}},
                                                   c.hidden_size)));
    status.Update(
        Assign(lw.out, loader.ReadWeight({{attention + "o_proj.weight", c.hidden_size}}, q_size)));
    status.Update(Assign(
        lw.mlp_norm, loader.ReadVector(layer + "post_attention_layernorm.weight", c.hidden_size)));
    status.Update(
        Assign(lw.gate_up, loader.ReadWeight({{mlp + "gate_proj.weight", c.intermediate_size},
                                              {mlp + "up_proj.weight", c.intermediate_size}},
                                             c.hidden_size)));
    status.Update(Assign(lw.down, loader.ReadWeight({{mlp + "down_proj.weight", c.hidden_size}},
                                                    c.intermediate_size)));
    if (!status.ok()) return status;
  }
  status.Update(Assign(w.final_norm, loader.ReadVector("model.norm.weight", c.hidden_size)));
  const char* head = c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  status.Update(Assign(w.lm_head, loader.ReadWeight({{head, c.vocab_size}}, c.hidden_size)));
  if (!status.ok()) return status;
  return std::make_shared<const Model>(device, c, std::move(w), std::move(storage));
}

Model::Model(Device* device, ModelConfig config, ModelWeights weights, std::vector<Buffer> storage)
    : device_(device),
      config_(std::move(config)),
      storage_(std::move(storage)),
      weights_(std::move(weights)),
      inv_freq_(RopeInverseFrequencies(config_)) {}

AttentionShape Model::attention_shape() const {
  return {config_.heads, config_.kv_heads, config_.head_dim,
          1.0f / std::sqrt(static_cast<float>(config_.head_dim))};
}

int64_t Model::bytes_per_row() const {
  int64_t bytes = weights_.lm_head->bytes();
  for (const LayerWeights& w : weights_.layers) {
    bytes += w.qkv->bytes() + w.out->bytes() + w.gate_up->bytes() + w.down->bytes();
  }
  return bytes;
}

absl::Status RandomWeights::Read(std::string_view name, int64_t rows, int64_t cols,
                                 std::span<float> out) const {
  if (static_cast<int64_t>(out.size()) != rows * cols) {
    return absl::InvalidArgumentError(absl::StrCat("random weights: ", std::string(name), " wants ",
                                                   rows, " x ", cols, " values, not ", out.size()));
  }
  const bool norm = absl::StrContains(std::string(name), "norm");
  const uint64_t stream = Mix(seed_ ^ NameHash(name));
  for (size_t i = 0; i < out.size(); ++i) {
    const uint64_t bits = Mix(stream + i);
    // Box-Muller; the first uniform lies in (0, 1].
    const double u = (static_cast<double>(bits >> 32) + 1) * 0x1p-32;
    const double v = static_cast<double>(bits & 0xffffffff) * 0x1p-32;
    const double normal = std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
    out[i] = norm ? static_cast<float>(1 + 0.1 * normal) : static_cast<float>(deviation_ * normal);
  }
  return absl::OkStatus();
}

}  // namespace memory3
