#include "memory/selection.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {

absl::StatusOr<std::vector<int32_t>> SelectTokens(std::span<const float> weights, int kv_heads,
                                                  int tokens, int keep) {
  if (kv_heads < 1 || tokens < 1 || keep < 1) {
    return absl::InvalidArgumentError(absl::StrCat("selection: kv_heads ", kv_heads, ", tokens ",
                                                   tokens, ", keep ", keep,
                                                   "; each must be at least 1"));
  }
  if (weights.size() != static_cast<size_t>(kv_heads) * tokens) {
    return absl::InvalidArgumentError(absl::StrCat("selection: ", weights.size(), " weights for ",
                                                   kv_heads, " heads of ", tokens, " tokens"));
  }
  const int kept = std::min(keep, tokens);
  std::vector<int32_t> selected;
  selected.reserve(static_cast<size_t>(kv_heads) * kept);
  std::vector<int32_t> order(tokens);
  for (int h = 0; h < kv_heads; ++h) {
    const float* w = weights.data() + static_cast<size_t>(h) * tokens;
    for (int j = 0; j < tokens; ++j) {
      if (std::isnan(w[j])) {
        return absl::InvalidArgumentError(
            absl::StrCat("selection: the weight of KV head ", h, ", token ", j, " is NaN"));
      }
    }
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + (kept - 1), order.end(),
                     [w](int32_t a, int32_t b) { return w[a] != w[b] ? w[a] > w[b] : a < b; });
    std::sort(order.begin(), order.begin() + kept);
    selected.insert(selected.end(), order.begin(), order.begin() + kept);
  }
  return selected;
}

std::vector<double> AttentionReceived(std::span<const float> q, std::span<const float> k,
                                      int query_heads, int kv_heads, int tokens, int head_dim) {
  assert(q.size() == static_cast<size_t>(query_heads) * tokens * head_dim);
  assert(k.size() == static_cast<size_t>(kv_heads) * tokens * head_dim);
  const int group = query_heads / kv_heads;
  std::vector<double> received(static_cast<size_t>(kv_heads) * tokens, 0.0);
  std::vector<double> row(tokens);
  for (int g = 0; g < query_heads; ++g) {
    const int h = g / group;
    for (int i = 0; i < tokens; ++i) {
      const float* query = q.data() + (static_cast<size_t>(g) * tokens + i) * head_dim;
      for (int j = 0; j < tokens; ++j) {
        const float* key = k.data() + (static_cast<size_t>(h) * tokens + j) * head_dim;
        double dot = 0;
        for (int c = 0; c < head_dim; ++c) dot += static_cast<double>(query[c]) * key[c];
        row[j] = dot / std::sqrt(static_cast<double>(head_dim));
      }
      const double largest = *std::max_element(row.begin(), row.end());
      double sum = 0;
      for (double& x : row) sum += x = std::exp(x - largest);
      for (int j = 0; j < tokens; ++j)
        received[static_cast<size_t>(h) * tokens + j] += row[j] / sum;
    }
  }
  return received;
}

}  // namespace memory3
