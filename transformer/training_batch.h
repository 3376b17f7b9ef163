// What one training step computes on, and how its tokens are laid out in rows.
//
// Rows = [prefix once | sequences | references]; all go through the blocks together, references
// only up to the last memory layer (explicit-memory.md, Training). Positions are the layouts'
// (Reading memories).
//
// Thread-safety: plain values.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

struct TrainingSequence {
  std::vector<int32_t> token_ids;  // with `<s>` first
  std::vector<int32_t> targets;    // [token_ids.size()], -1: no loss at this token
  // Memory layout: for every chunk of chunk_tokens tokens after `<s>`, the references (indices into
  // TrainingBatch::references) that it reads. `<s>` reads chunk 0's. Empty: no chunk reads any.
  std::vector<std::vector<int>> chunk_references;
};

struct TrainingBatch {
  enum class Layout : uint8_t { kPlain, kMemory };
  Layout layout = Layout::kPlain;
  std::vector<TrainingSequence> sequences;
  std::vector<std::vector<int32_t>> references;  // token ids without `<s>`

  // Tokens kept per KV head of a memory. Default (0): the config's tokens_kept; the dense → sparse
  // schedule sets it.
  int tokens_kept = 0;
  // Whether gradients flow through kept keys and values into the writing of the references.
  bool gradient_through_writing = true;
  // Keeps only what enters each block and computes the rest again in backward: the same bits in
  // less memory.
  bool recompute_activations = false;
};

// The rows of a batch and who attends to what, without addresses.
class TrainingLayout {
 public:
  // INVALID_ARGUMENT names the sequence or reference and what is wrong with it;
  // FAILED_PRECONDITION: memory layout for a model without explicit_memory.
  static absl::StatusOr<TrainingLayout> Create(const ModelConfig& config,
                                               const TrainingBatch& batch);

  int rows() const { return static_cast<int>(token_ids_.size()); }
  // The rows of prefix and sequences, which come first.
  int rows_without_references() const { return rows_without_references_; }
  const std::vector<ReferenceRows>& references() const { return references_; }
  int tokens_kept() const { return tokens_kept_; }  // width of a kept run, <= reference_tokens
  // Rows with a target, ascending; the target and the sequence of each.
  const std::vector<int32_t>& logit_rows() const { return logit_rows_; }
  const std::vector<int32_t>& targets() const { return targets_; }
  const std::vector<int32_t>& sequence_of_target() const { return sequence_of_target_; }

  // Sources of the plan, in this order.
  enum Source : int { kLive = 0, kMemory = 1 };

  struct Addresses {
    Tensor qkv;                     // activations of all rows
    float* qkv_gradient = nullptr;  // laid out as qkv; null: no backward
    float* memory = nullptr;        // [reference, 2, kv_heads, tokens_kept, head_dim]
    float* memory_gradient =
        nullptr;  // laid out as memory; null: nothing flows through the writing
  };
  // The first rows (all, or without the references) of a layer.
  BatchInput MakeInput(const ModelConfig& config, const Addresses& at, bool with_references) const;

 private:
  struct Segment {
    AttentionSegment rows;      // without blocks
    std::vector<int> memories;  // indices of references
    int context = 0;            // index into contexts_
  };
  // Rows that attend to each other causally: the prefix, a sequence, a reference.
  struct Context {
    int row = 0;
    int tokens = 0;
    int first = 0;  // context index of the first token
  };

  void AddContext(const std::vector<int32_t>& ids, int first, int position);

  std::vector<int32_t> token_ids_, positions_;
  std::vector<Context> contexts_;  // the prefix first, if there is one
  std::vector<Segment> segments_;  // ascending rows
  std::vector<ReferenceRows> references_;
  std::vector<int32_t> logit_rows_, targets_, sequence_of_target_;
  int prefix_tokens_ = 0;
  int rows_without_references_ = 0;
  int tokens_kept_ = 0;
};

}  // namespace memory3
