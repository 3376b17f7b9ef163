// Explicit memories on the device: numbered slots of [memory_layers][K, V][kv_heads][tokens_kept]
// [head_dim] that attention reads in place. A memory that two sequences use is loaded once and read
// by both through its slot number; a short reference fills a slot in part.
//
// Which memory is in which slot, and when a slot may be overwritten, is the caller's to know (the
// inference server's memory cache): Load and Unload must not touch a slot that a forward pass in
// progress reads.
//
// Thread-safety: Load, LoadEncoded and Unload from any thread, for different slots at once, beside
// the engine thread's forward passes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/codec.h"
#include "memory/explicit_memory.h"
#include "transformer/config.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

class MemoryPool {
 public:
  // Default tokens per slot: memory.tokens_kept, at most memory.reference_tokens. INVALID_ARGUMENT:
  // slots < 0, another dtype than f32 and bf16. RESOURCE_EXHAUSTED: device full.
  static absl::StatusOr<std::unique_ptr<MemoryPool>> Create(Device* device,
                                                            const ModelConfig& config,
                                                            const ExplicitMemoryConfig& memory,
                                                            DType dtype, int slots);

  // Copies `memory` into `slot` and returns when it is there. INVALID_ARGUMENT: no such slot, or
  // the memory's shape is not the pool's (names both).
  absl::Status Load(int slot, const ExplicitMemory& memory);
  // The same for a memory as its record holds it: `codes` is the payload of a record of this shape.
  // Where the device has a decoder for the codec the codes go there as they are, else the host
  // decodes. Errors of Load, of Codec::Decode and of the device.
  absl::Status LoadEncoded(int slot, const MemoryShape& shape, std::span<const uint8_t> codes,
                           const Codec& codec);
  // Attending to the slot is an error until the next Load.
  void Unload(int slot);

  int slots() const { return slots_; }
  // Tokens per KV head in the slot, 0: nothing is loaded.
  int tokens(int slot) const { return tokens_[slot].load(std::memory_order_acquire); }
  // A number computed from the memory's values, or from its codes where the device decoded them.
  // Attention sums over memories in its order, so that a set of memories gives the same bits
  // whatever ranking or slots it has.
  uint32_t order(int slot) const { return order_[slot].load(std::memory_order_acquire); }
  void* data(int slot) const { return storage_.as<char>() + slot * slot_bytes_; }
  int64_t slot_bytes() const { return slot_bytes_; }
  // The largest memory a slot holds.
  const MemoryShape& slot_shape() const { return shape_; }
  // A block of it starts at data(slot) and has tokens(slot) tokens.
  const KvSource& source() const { return source_; }

 private:
  // Decoders on the device, that of the codebook used last in front. Few: one a codebook, and a
  // model has one codebook as a rule.
  static constexpr size_t kMostDecoders = 4;
  struct KeptDecoder {
    Hash256 codebook;
    std::shared_ptr<VectorDecoder> decoder;
  };

  MemoryPool() = default;
  // INVALID_ARGUMENT: no such slot, or the shape is not the pool's or not that of `size` `what`.
  absl::Status CheckFits(int slot, const MemoryShape& shape, size_t size, int64_t wanted,
                         const char* what) const;
  absl::StatusOr<std::shared_ptr<VectorDecoder>> DecoderFor(const Codec& codec);

  Device* device_ = nullptr;
  std::mutex mutex_;
  std::vector<KeptDecoder> decoders_;  // guarded by mutex_
  Buffer storage_;
  KvSource source_;
  MemoryShape shape_;
  int64_t slot_bytes_ = 0;
  int slots_ = 0;
  std::unique_ptr<std::atomic<int>[]> tokens_;
  std::unique_ptr<std::atomic<uint32_t>[]> order_;
};

}  // namespace memory3
