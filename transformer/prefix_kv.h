// Keys and values of the prefix `<s>Reference:`, a constant of the model: computed once and shared
// by every context and every reference that is written (explicit-memory.md, Writing).
//
// Thread-safety: immutable; made on the device's thread.
#pragma once

#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "transformer/device.h"
#include "transformer/model.h"
#include "transformer/tensor.h"

namespace memory3 {

class PrefixKv {
 public:
  // Runs the model over `ids` at positions 0 … p-1. INVALID_ARGUMENT: none, or an id out of the
  // vocabulary. `dtype`: f32 or bf16, of the keys and values kept.
  static absl::StatusOr<std::shared_ptr<const PrefixKv>> Create(const Model& model,
                                                                std::span<const int32_t> ids,
                                                                DType dtype);

  int tokens() const { return tokens_; }
  const KvSource& source() const { return source_; }
  // The prefix as a block every row sees; `source`: the index of source() in the plan.
  KvBlock Block(int source) const {
    return {source, storage_.data(), nullptr, tokens_, KvBlock::kSeenByAll};
  }

 private:
  PrefixKv() = default;

  Buffer storage_;  // [layers][K, V][kv_heads][tokens][head_dim]
  KvSource source_;
  int tokens_ = 0;
};

}  // namespace memory3
