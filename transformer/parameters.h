// All parameters of a model in training, in one flat f32 device buffer: the optimiser makes two
// passes over it, a checkpoint walks its list, gradients and moments have the same layout.
//
// Order: matrices (with weight decay) first, norms (without) last; q, k, v and gate, up follow each
// other, so that the fused products read them in place.
//
// Thread-safety: the device's thread. Ownership: owns the parameters (and, on a device with bf16
// activations, their bf16 copy); the device must outlive it, and it must outlive its model().
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/block.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/model.h"
#include "transformer/tensor.h"
#include "transformer/tensor_source.h"

namespace memory3 {

struct Parameter {
  std::string name;            // Hugging Face's
  int64_t offset = 0;          // elements, into the flat buffers
  int64_t rows = 0, cols = 0;  // cols == 1: a vector
  bool decay = false;
  int64_t size() const { return rows * cols; }
};

// Gradients as the backward pass adds to them: views of a flat buffer.
struct ModelGradients {
  Tensor embedding;
  std::vector<LayerGradients> layers;
  float* final_norm = nullptr;
  Tensor lm_head;  // the embedding's where tied
};

// The parameters a training run starts from: matrices normal with deviation 0.02, those that write
// to the residual stream (o_proj, down_proj) scaled by 1/sqrt(2 layers) (GPT-2's rule), norms 1. A
// tensor depends on seed and name alone.
class InitialParameters : public TensorSource {
 public:
  InitialParameters(uint64_t seed, int layers);
  absl::Status Read(std::string_view name, int64_t rows, int64_t cols,
                    std::span<float> out) const override;

 private:
  const RandomWeights matrices_, residual_;
};

class Parameters {
 public:
  // All zero. Errors: CheckModelShape's, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<Parameters>> Create(Device* device, ModelConfig config);

  // Errors: those of TensorSource::Read.
  absl::Status Load(const TensorSource& source);
  // Brings one tensor to the host; `out` has parameter.size() elements.
  absl::Status Download(const Parameter& parameter, std::span<float> out) const;
  // Writes a model directory (SaveModelDirectory in checkpoint.h: dtype kF32 or kBF16, tokenizer
  // files copied from `tokenizer_directory`, none where empty).
  absl::Status Save(const std::string& directory, DType dtype,
                    const std::string& tokenizer_directory) const;

  const std::vector<Parameter>& list() const { return list_; }
  int64_t size() const { return size_; }
  // Elements [0, decayed()) have weight decay.
  int64_t decayed() const { return decayed_; }
  float* values() const { return values_.as<float>(); }
  Device& device() const { return *device_; }
  // Computes with the parameters as they are at each moment.
  const Model& model() const { return *model_; }

  // Zeroed f32 device memory of the same layout: for gradients and moments.
  absl::StatusOr<Buffer> AllocateLike() const;
  ModelGradients GradientViews(float* flat) const;

  // One optimiser step (the gradient times gradient_scale) on everything.
  void AdamWStep(const float* gradient, float* m, float* v, const AdamW& options,
                 float gradient_scale);

 private:
  Parameters() = default;
  const Parameter& Named(std::string_view name) const;
  Tensor View(float* flat, std::string_view first, int64_t rows) const;
  void* ShadowAt(int64_t offset) const;

  Device* device_ = nullptr;
  ModelConfig config_;
  std::vector<Parameter> list_;
  int64_t size_ = 0, decayed_ = 0;
  Buffer values_;
  Buffer shadow_;  // bf16, where the device's activations are
  std::unique_ptr<Model> model_;
};

}  // namespace memory3
