#include "transformer/memory_pool.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "memory/hash.h"
#include "transformer/bf16.h"

namespace memory3 {
namespace {

std::string ToString(const MemoryShape& s) {
  return absl::StrCat("[", s.layers, " layers, 2, ", s.kv_heads, " KV heads, ", s.tokens,
                      " tokens, ", s.head_dim, "]");
}

}  // namespace

absl::StatusOr<std::unique_ptr<MemoryPool>> MemoryPool::Create(Device* device,
                                                               const ModelConfig& config,
                                                               const ExplicitMemoryConfig& memory,
                                                               DType dtype, int slots) {
  if (slots < 0) return absl::InvalidArgumentError(absl::StrCat("memory pool: slots is ", slots));
  if (dtype != DType::kF32 && dtype != DType::kBF16) {
    return absl::InvalidArgumentError("memory pool: the type must be f32 or bf16");
  }
  std::unique_ptr<MemoryPool> pool(new MemoryPool);
  pool->device_ = device;
  pool->slots_ = slots;
  pool->shape_ = {static_cast<int>(memory.memory_layers.size()), config.kv_heads,
                  std::min(memory.tokens_kept, memory.reference_tokens), config.head_dim};
  KvSource& s = pool->source_;
  s.dtype = dtype;
  s.token_stride = config.head_dim;
  s.head_stride = s.token_stride * pool->shape_.tokens;
  s.value_offset = s.head_stride * config.kv_heads;
  s.layer_stride = s.value_offset * 2;
  pool->slot_bytes_ = pool->shape_.values() * SizeOf(dtype);
  if (slots > 0) {
    absl::StatusOr<Buffer> storage = device->Allocate(size_t(slots) * pool->slot_bytes_);
    if (!storage.ok()) return storage.status();
    pool->storage_ = *std::move(storage);
  }
  pool->tokens_ = std::make_unique<std::atomic<int>[]>(slots);
  pool->order_ = std::make_unique<std::atomic<uint32_t>[]>(slots);
  return pool;
}

absl::Status MemoryPool::CheckFits(int slot, const MemoryShape& shape, size_t size, int64_t wanted,
                                   const char* what) const {
  if (slot < 0 || slot >= slots_) {
    return absl::InvalidArgumentError(absl::StrCat("memory pool: slot ", slot, " of ", slots_));
  }
  MemoryShape widest = shape;
  widest.tokens = shape_.tokens;
  if (widest != shape_ || shape.tokens < 1 || shape.tokens > shape_.tokens ||
      static_cast<int64_t>(size) != wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory pool: a memory of shape ", ToString(shape), " and ", size, " ", what,
                     " does not fit slots of shape ", ToString(shape_)));
  }
  return absl::OkStatus();
}

absl::Status MemoryPool::Load(int slot, const ExplicitMemory& memory) {
  const MemoryShape& m = memory.shape;
  if (absl::Status status = CheckFits(slot, m, memory.values.size(), m.values(), "values");
      !status.ok())
    return status;
  Unload(slot);
  // Spread the heads' runs of tokens to the slot's strides; nothing to do where the memory fills
  // it.
  std::vector<float> spread;
  const float* values = memory.values.data();
  if (m.tokens != shape_.tokens) {
    spread.resize(shape_.values());
    const int64_t from = int64_t{m.tokens} * m.head_dim, to = source_.head_stride;
    for (int64_t run = 0; run < int64_t{2} * m.layers * m.kv_heads; ++run) {
      std::copy_n(values + run * from, from, spread.data() + run * to);
    }
    values = spread.data();
  }
  absl::Status status;
  if (source_.dtype == DType::kBF16) {
    std::vector<uint16_t> rounded(shape_.values());
    for (size_t i = 0; i < rounded.size(); ++i) rounded[i] = FloatToBf16(values[i]);
    status = device_->UploadAside(data(slot), rounded.data(), slot_bytes_);
  } else {
    status = device_->UploadAside(data(slot), values, slot_bytes_);
  }
  if (!status.ok()) return status;
  order_[slot].store(Crc32c({reinterpret_cast<const char*>(memory.values.data()),
                             memory.values.size() * sizeof(float)}),
                     std::memory_order_release);
  tokens_[slot].store(m.tokens, std::memory_order_release);
  return absl::OkStatus();
}

absl::Status MemoryPool::LoadEncoded(int slot, const MemoryShape& shape,
                                     std::span<const uint8_t> codes, const Codec& codec) {
  if (absl::Status status = CheckFits(slot, shape, codes.size(),
                                      shape.vectors() * codec.bytes_per_vector(), "bytes of codes");
      !status.ok())
    return status;
  if (codec.head_dim() != shape_.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("memory pool: the codec's head_dim is ",
                                                   codec.head_dim(), ", the slots' is ",
                                                   shape_.head_dim));
  }
  if (!device_->DecodesVectors(codec.id())) {
    ExplicitMemory memory;
    memory.shape = shape;
    memory.reference_tokens = shape.tokens;
    memory.values.resize(shape.values());
    absl::Status status = codec.Decode(codes, memory.values);
    return status.ok() ? Load(slot, memory) : status;
  }
  absl::StatusOr<std::shared_ptr<VectorDecoder>> decoder = DecoderFor(codec);
  if (!decoder.ok()) return decoder.status();
  Unload(slot);
  const VectorRuns runs{data(slot), source_.dtype, shape.tokens, source_.head_stride};
  if (absl::Status status = (*decoder)->DecodeAside(runs, codes); !status.ok()) return status;
  order_[slot].store(Crc32c({reinterpret_cast<const char*>(codes.data()), codes.size()}),
                     std::memory_order_release);
  tokens_[slot].store(shape.tokens, std::memory_order_release);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<VectorDecoder>> MemoryPool::DecoderFor(const Codec& codec) {
  const std::lock_guard lock(mutex_);
  auto found = std::find_if(decoders_.begin(), decoders_.end(), [&](const KeptDecoder& kept) {
    return kept.codebook == codec.codebook_hash();
  });
  if (found == decoders_.end()) {
    absl::StatusOr<std::unique_ptr<VectorDecoder>> made = device_->MakeVectorDecoder(codec);
    if (!made.ok()) return made.status();
    if (decoders_.size() == kMostDecoders) decoders_.pop_back();
    decoders_.push_back({codec.codebook_hash(), *std::move(made)});
    found = std::prev(decoders_.end());
  }
  std::rotate(decoders_.begin(), found, std::next(found));
  return decoders_.front().decoder;
}

void MemoryPool::Unload(int slot) { tokens_[slot].store(0, std::memory_order_release); }

}  // namespace memory3
