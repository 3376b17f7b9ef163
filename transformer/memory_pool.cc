#include "transformer/memory_pool.h"

#include <algorithm>
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

absl::Status MemoryPool::Load(int slot, const ExplicitMemory& memory) {
  if (slot < 0 || slot >= slots_) {
    return absl::InvalidArgumentError(absl::StrCat("memory pool: slot ", slot, " of ", slots_));
  }
  const MemoryShape& m = memory.shape;
  MemoryShape widest = m;
  widest.tokens = shape_.tokens;
  if (widest != shape_ || m.tokens < 1 || m.tokens > shape_.tokens ||
      static_cast<int64_t>(memory.values.size()) != m.values()) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory pool: a memory of shape ", ToString(m), " and ", memory.values.size(),
                     " values does not fit slots of shape ", ToString(shape_)));
  }
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

void MemoryPool::Unload(int slot) { tokens_[slot].store(0, std::memory_order_release); }

}  // namespace memory3
