// An explicit memory: the attention keys and values of one reference, thinned to a few tokens per
// KV head (explicit-memory.md). Plain values; no I/O, no model.
#pragma once

#include <cstdint>
#include <vector>

namespace memory3 {

// The tensor [layers, 2 (K, V), kv_heads, tokens, head_dim].
struct MemoryShape {
  int layers = 0;  // memory layers, not all layers
  int kv_heads = 0;
  int tokens = 0;  // kept per head: min(tokens_kept, reference length), one number for all heads
  int head_dim = 0;

  int64_t vectors() const { return int64_t{2} * layers * kv_heads * tokens; }
  int64_t values() const { return vectors() * head_dim; }
  bool operator==(const MemoryShape&) const = default;
};

struct ExplicitMemory {
  MemoryShape shape;
  int reference_tokens = 0;   // length of the reference it was written from, >= shape.tokens
  std::vector<float> values;  // shape.values(); keys after RoPE
};

}  // namespace memory3
