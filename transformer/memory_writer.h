// Writes explicit memories: references in, the keys and values worth keeping out
// (explicit-memory.md, Writing a memory).
//
// A reference is encoded alone behind the prefix `<s>Reference:`, its token j at position p + j,
// causally, through the layers up to the last memory layer; that one computes keys, values and
// scores only. Token j of a KV head scores
//   w_j = Σ_i Σ_{h in group} softmax_j(q_{i,h} · k_j / √d),
// neither masked nor rotated, i and j over the reference's own tokens; the tokens_kept largest
// stay, keys as they are after RoPE. Where the geometry keeps whole references (tokens_kept >=
// reference_tokens, dense mode) nothing is scored.
//
// Thread-safety: the device's thread. Shares model and prefix, owns its activations.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/explicit_memory.h"
#include "transformer/block.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/model.h"
#include "transformer/prefix_kv.h"

namespace memory3 {

struct MemoryWriterOptions {
  // Default: the config's explicit_memory. Overridden for dense mode and for experiments with other
  // layers or numbers of kept tokens.
  std::optional<ExplicitMemoryConfig> memory = std::nullopt;
  int max_rows = 2048;  // tokens encoded at once; at least reference_tokens
};

class MemoryWriter {
 public:
  // `prefix`: of this model and the geometry's prefix_token_ids; null: computed here.
  // FAILED_PRECONDITION: no geometry. INVALID_ARGUMENT names the option. RESOURCE_EXHAUSTED: the
  // device is full.
  static absl::StatusOr<std::unique_ptr<MemoryWriter>> Create(
      std::shared_ptr<const Model> model, const MemoryWriterOptions& options,
      std::shared_ptr<const PrefixKv> prefix = nullptr);

  const ExplicitMemoryConfig& memory() const { return memory_; }
  const Model& model() const { return *model_; }

  // references[r]: token ids without `<s>`, 1 … reference_tokens of them. Result r has
  // min(tokens_kept, length) tokens per KV head, in the reference's order, and does not depend on
  // the references written with it. INVALID_ARGUMENT names the reference: empty, too long, id out
  // of the vocabulary. Nothing is written then.
  absl::StatusOr<std::vector<ExplicitMemory>> Write(
      std::span<const std::vector<int32_t>> references);

 private:
  MemoryWriter() = default;

  absl::Status Check(std::span<const std::vector<int32_t>> references) const;
  absl::Status WriteBatch(std::span<const std::vector<int32_t>> references,
                          std::vector<ExplicitMemory>* out);
  BatchInput MakeBatch(std::span<const std::vector<int32_t>> references,
                       const LayerActivations& a) const;

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const PrefixKv> prefix_;
  ExplicitMemoryConfig memory_;
  int max_rows_ = 0;
  int max_references_ = 0;  // of one batch
  int keep_ = 0;            // width of a kept run, min(tokens_kept, reference_tokens)
  std::optional<ActivationBuffers> activations_;
  Buffer scores_;  // [max_rows, kv_heads] f32
  Buffer kept_;    // [max_references, kv_heads, keep] int32
  Buffer values_;  // [memory layers, max_references, 2, kv_heads, keep, head_dim] f32
  std::vector<float> host_;
};

}  // namespace memory3
