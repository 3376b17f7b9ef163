// The decoder: a model with a paged KV cache, the prefix, and a pool of explicit memories, over
// which it runs any mixture of prefill slices and decode steps of any sequences in one pass.
//
// A context is `<s>` and the tokens after it; context index 0 is `<s>`, which the caller feeds like
// any token. Positions (explicit-memory.md, Layout; p = prefix length, R = reference_tokens):
//   plain:   context index i at position i, no prefix;
//   memory:  prefix at 0 … p-1, every memory's reference at p … p+R-1, context index i at p + R +
//   i.
// At a memory layer a row attends, under one softmax, to [prefix | memories it reads | context up
// to itself], at other layers to [prefix | context].
//
// Thread-safety: one thread (the engine's), sequences included. Exception: MemoryPool::Load.
// Ownership: the Decoder owns cache, pool and activations and shares model and prefix. Sequences
// must not outlive it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/block.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/kv_cache.h"
#include "transformer/memory_pool.h"
#include "transformer/model.h"
#include "transformer/prefix_kv.h"

namespace memory3 {

// Chosen once per sequence, never by what a retrieval finds.
enum class Layout : uint8_t { kPlain, kMemory };

struct DecoderOptions {
  // Geometry of memories. Default: the config's explicit_memory; without one (and without
  // DenseMode's here) there is only the plain layout.
  std::optional<ExplicitMemoryConfig> memory = std::nullopt;
  int max_rows = 512;  // tokens of one Forward
  int max_logit_rows =
      512;             // rows of one Forward that may ask for logits; at most max_rows are used
  int kv_pages = 256;  // of kKvPageTokens tokens
  int memory_slots = 64;
  DType kv_dtype = DType::kF32;      // f32 or bf16; prefix and context
  DType memory_dtype = DType::kF32;  // f32 or bf16
};

// One context: its layout and the pages its keys and values are in.
class Sequence {
 public:
  Layout layout() const { return layout_; }
  // Tokens fed so far, `<s>` included.
  int length() const { return length_; }
  // Page i holds context indices 16i … 16i+15. A full page never changes again, so it may be handed
  // to another sequence that begins with the same tokens and has read the same memories.
  const std::vector<KvPage>& pages() const { return pages_; }

 private:
  friend class Decoder;
  Layout layout_ = Layout::kPlain;
  int length_ = 0;
  std::vector<KvPage> pages_;
};

// A run of a slice's tokens and the pool's slots that they read. The order of the slots changes
// nothing, nor does which memory is in which slot: not a bit (MemoryPool::order).
struct MemoryRead {
  int tokens = 0;
  std::vector<int> slots;
};

// The next tokens of one sequence.
struct Slice {
  Sequence* sequence = nullptr;
  std::span<const int32_t> tokens;
  // Runs that add up to tokens.size(); empty: no memories.
  std::span<const MemoryRead> reads = {};
  // Logits are wanted for the slice's last `logit_rows` tokens.
  int logit_rows = 0;
};

class Decoder {
 public:
  // INVALID_ARGUMENT names the option or field; RESOURCE_EXHAUSTED: the device is full.
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(std::shared_ptr<const Model> model,
                                                         const DecoderOptions& options);
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  const Model& model() const { return *model_; }
  const std::shared_ptr<const Model>& shared_model() const { return model_; }
  const ModelConfig& config() const { return model_->config(); }
  const DecoderOptions& options() const { return options_; }
  // Null: only the plain layout.
  const ExplicitMemoryConfig* memory() const {
    return options_.memory ? &*options_.memory : nullptr;
  }
  const std::shared_ptr<const PrefixKv>& prefix() const { return prefix_; }
  KvCache& cache() { return *cache_; }
  MemoryPool& pool() { return *pool_; }  // only with memory()

  // Longest context, `<s>` included: max_position_embeddings, less p + R in the memory layout.
  int max_context(Layout layout) const;
  // RoPE position of a context index.
  int Position(Layout layout, int context_index) const;

  // An empty context. INVALID_ARGUMENT: memory layout without a geometry.
  absl::StatusOr<Sequence> Start(Layout layout) const;
  // A context whose first pages are already computed, all of them full.
  absl::StatusOr<Sequence> Start(Layout layout, std::vector<KvPage> full_pages) const;
  // Pages that feeding `tokens` more tokens takes from the cache.
  static int PagesNeeded(const Sequence& sequence, int tokens);

  // Feeds the slices, at most one per sequence, and computes the logits asked for, in the order of
  // slices and tokens. Either all slices are fed or, on error, none:
  //   INVALID_ARGUMENT     empty slice, id out of vocabulary, reads that do not add up, a slot
  //   twice
  //                        in a run, memories in the plain layout, more than max_rows rows
  //   OUT_OF_RANGE         a context would outgrow max_context
  //   FAILED_PRECONDITION  a slot that holds no memory
  //   RESOURCE_EXHAUSTED   not enough free KV pages (PagesNeeded tells before)
  absl::Status Forward(std::span<const Slice> slices);

  // Of the last Forward. [logit rows, vocab_size] f32 on the device.
  Tensor logits() const { return logits_.Rows(0, logit_rows_); }
  // The same on the host; waits for the device.
  absl::Status DownloadLogits(std::vector<float>* out) const;
  // Greedy choice per logit row, ties to the lower id; computed on the device.
  absl::StatusOr<std::vector<int32_t>> ArgMax();

 private:
  Decoder() = default;

  absl::Status CheckSlice(const Slice& slice) const;
  BatchInput MakeBatch(std::span<const Slice> slices) const;
  void RunModel(const PreparedBatch& batch, const LayerActivations& a, const Tensor& logit_in,
                const Tensor& logit_norm, const Tensor& logits);

  std::shared_ptr<const Model> model_;
  DecoderOptions options_;
  std::shared_ptr<const PrefixKv> prefix_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<MemoryPool> pool_;
  std::optional<ActivationBuffers> activations_;
  std::vector<std::vector<int>> source_layers_;  // by layer: index within prefix, memories, context
  std::vector<Buffer> storage_;
  Tensor logit_in_, logit_norm_, logits_;  // [max_logit_rows, …]
  Buffer argmax_;
  uint64_t graph_keys_ = 0;  // first of this decoder's own keys for Device::Run
  int logit_rows_ = 0;
};

}  // namespace memory3
