// Which tokens of a reference its memory keeps, given the attention each receives
// (explicit-memory.md, Writing a memory, 2 and 3; the paper, section 3.3). The device computes the
// weights beside the keys (transformer/device.h); this is the choice, and the weights' definition
// in its plainest form for tests to hold devices against.
//
// Thread-safety: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace memory3 {

// weights: [kv_heads, tokens]. Returns [kv_heads, min(keep, tokens)]: per KV head the indices of
// the `keep` largest weights, ties to the lower index, ascending. INVALID_ARGUMENT names NaN or a
// wrong size; an empty reference (tokens == 0) is one.
absl::StatusOr<std::vector<int32_t>> SelectTokens(std::span<const float> weights, int kv_heads,
                                                  int tokens, int keep);

// w[h, j] = sum over the query heads g of KV head h and the rows i of
// softmax_j(q[g, i] . k[h, j] / sqrt(head_dim)), without causal mask. q: [query_heads, tokens,
// head_dim], k: [kv_heads, tokens, head_dim], both before RoPE; query heads of one KV head stand
// together. Returns [kv_heads, tokens]. In double, unblocked: a definition, not a fast path.
std::vector<double> AttentionReceived(std::span<const float> q, std::span<const float> k,
                                      int query_heads, int kv_heads, int tokens, int head_dim);

}  // namespace memory3
