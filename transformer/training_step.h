// Forward and backward of one batch, jointly over sequences and the references they read.
//
// At a memory layer the references' tokens are scored (before RoPE), the best kept, and their keys
// and values gathered into that layer's memories, which the sequences' chunks attend to under the
// same softmax as prefix and context. Gradients flow through kept keys and values into the writing
// (the selection has none), and into the prefix.
//
// Thread-safety: the device's thread. Ownership: owns activations, which are allocated when first
// needed and grow only; parameters must outlive it.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/block.h"
#include "transformer/device.h"
#include "transformer/parameters.h"
#include "transformer/tensor.h"
#include "transformer/training_batch.h"

namespace memory3 {

struct TrainingResult {
  double loss = 0;                    // sum over the tokens with a target, nats
  int64_t tokens = 0;                 // tokens with a target
  std::vector<double> sequence_loss;  // [sequences], summing to loss
};

class TrainingStep {
 public:
  explicit TrainingStep(const Parameters* parameters);

  // Adds the gradient of the summed loss to `gradient` (device memory, laid out as the parameters),
  // so that batches accumulate; null: loss only. Repeated, it gives the same bits. Errors:
  // TrainingLayout::Create's, RESOURCE_EXHAUSTED, faults of the device.
  absl::StatusOr<TrainingResult> Run(const TrainingBatch& batch, float* gradient);

  // Bytes of activations held.
  int64_t bytes() const;

 private:
  // What depends on the batch's shape.
  struct Pass {
    TrainingLayout layout;
    bool backward = false;
    bool through_writing = false;
    bool recompute = false;
    // The last layer that references go through; -1: there are none.
    int last_reference_layer = -1;
  };

  absl::Status Allocate(const Pass& pass);
  void Prepare(const Pass& pass);
  void Forward(const Pass& pass);
  // Loss and, in backward, the gradient of the residual stream that leaves the last block.
  void Head(const Pass& pass, const ModelGradients& gradients);
  void Backward(const Pass& pass, const ModelGradients& gradients);

  // Index of a layer's memories, -1: not a memory layer (or nothing to read).
  int MemoryIndex(const Pass& pass, int layer) const;
  float* Memory(const Pass& pass, int index) const;
  int32_t* Kept(const Pass& pass, int index) const;
  LayerActivations Activations(int layer, int rows) const;

  const Parameters* parameters_;
  const Model* model_;
  Device* device_;

  // Grow-only device memory, by what lies in it.
  Buffer stream_, memories_, memory_gradient_, kept_, scores_, head_, logits_, losses_, backward_;
  std::vector<Buffer> layers_;  // one per layer, or one for all where activations are recomputed

  // Views of it for the current batch.
  std::vector<LayerActivations> activations_;
  BackwardActivations gradients_;
  Tensor head_x_, head_in_, head_dx_, head_din_;
  float* head_inv_rms_ = nullptr;
  int64_t logit_rows_at_once_ = 0;
  std::vector<PreparedBatch*> with_references_, without_references_;  // by layer
};

}  // namespace memory3
