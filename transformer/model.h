// The weights of one model on one device, and where they come from.
//
// Thread-safety: immutable once made; any thread may read, the device's thread computes with it.
// Ownership: a Model owns its weights' device memory (training: it borrows the parameter buffer).
// The device must outlive it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/tensor.h"
#include "transformer/tensor_source.h"

namespace memory3 {

// One block. D = hidden_size, H = heads, G = kv_heads, d = head_dim, M = intermediate_size.
struct LayerWeights {
  const float* attention_norm = nullptr;  // [D], device memory
  std::unique_ptr<Weight> qkv;            // [(H + 2G) d, D]: q_proj, k_proj, v_proj
  std::unique_ptr<Weight> out;            // [D, H d]: o_proj
  const float* mlp_norm = nullptr;        // [D], device memory
  std::unique_ptr<Weight> gate_up;        // [2M, D]: gate_proj, up_proj
  std::unique_ptr<Weight> down;           // [D, M]
};

struct ModelWeights {
  Tensor embedding;  // [vocab, D], bf16 unless the weights are f32
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;  // [D], device memory
  std::unique_ptr<Weight> lm_head;    // [vocab, D], also where it is tied to the embedding
};

class Model {
 public:
  // `format`: of the linear maps, lm_head included. Reads the model tensor by tensor, so that host
  // memory beyond the source holds one fused tensor at a time. Errors: INVALID_ARGUMENT for a
  // geometry no attention can have (names the field), those of TensorSource::Read,
  // RESOURCE_EXHAUSTED where the device is full.
  static absl::StatusOr<std::shared_ptr<const Model>> Load(Device* device,
                                                           const ModelConfig& config,
                                                           const TensorSource& source,
                                                           WeightFormat format);

  // Of weights made elsewhere (training: views of one flat parameter buffer). `storage`: device
  // memory the model shall own; memory it does not own must outlive it.
  Model(Device* device, ModelConfig config, ModelWeights weights, std::vector<Buffer> storage = {});

  Device& device() const { return *device_; }
  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }
  const LayerWeights& layer(int i) const { return weights_.layers[i]; }
  // [head_dim / 2], see RopeInverseFrequencies.
  std::span<const float> inv_freq() const { return inv_freq_; }
  AttentionShape attention_shape() const;
  // Bytes that a forward pass of one row reads of weights.
  int64_t bytes_per_row() const;

 private:
  Device* device_;
  ModelConfig config_;
  std::vector<Buffer> storage_;
  ModelWeights weights_;
  std::vector<float> inv_freq_;
};

// INVALID_ARGUMENT naming the field where the shape cannot be computed with.
absl::Status CheckModelShape(const ModelConfig& config);
// The same for a geometry of memories on that model: layers within it, nothing empty, prefix and
// references before max_position_embeddings.
absl::Status CheckExplicitMemory(const ModelConfig& config, const ExplicitMemoryConfig& memory);

// Gaussian weights (standard deviation 0.02 for matrices unless given, norms around 1), the same
// for a name and seed whatever is read in which order. For tests, benchmarks and a fresh model.
class RandomWeights : public TensorSource {
 public:
  explicit RandomWeights(uint64_t seed, float deviation = 0.02f)
      : seed_(seed), deviation_(deviation) {}
  absl::Status Read(std::string_view name, int64_t rows, int64_t cols,
                    std::span<float> out) const override;

 private:
  uint64_t seed_;
  float deviation_;
};

}  // namespace memory3
