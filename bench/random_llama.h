// TinyLlama-1.1B's geometry, and random weights for it, for benchmarks.
#pragma once

#include <algorithm>
#include <functional>
#include <random>
#include <span>
#include <string_view>
#include <vector>

#include "transformer/config.h"
#include "transformer/tensor_source.h"

namespace memory3 {

// 11 memory layers, 8 tokens kept of 128.
inline ModelConfig TinyLlama() {
  ModelConfig c;
  c.vocab_size = 32000;
  c.hidden_size = 2048;
  c.intermediate_size = 5632;
  c.layers = 22;
  c.heads = 32;
  c.kv_heads = 4;
  c.head_dim = 64;
  c.rms_norm_eps = 1e-5f;
  c.bos_token_id = 1;
  ExplicitMemoryConfig memory;
  for (int layer = 0; layer < c.layers / 2; ++layer) memory.memory_layers.push_back(layer);
  memory.prefix_token_ids = {1, 12105, 29901};
  c.explicit_memory = memory;
  return c;
}

// Gaussian numbers from a table, read from another place for each tensor: a billion are there in
// seconds.
class TableWeights : public TensorSource {
 public:
  TableWeights() : table_(1 << 20) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    for (float& x : table_) x = normal(rng);
  }
  absl::Status Read(std::string_view name, int64_t, int64_t, std::span<float> out) const override {
    if (name.find("norm") != std::string_view::npos) {
      std::fill(out.begin(), out.end(), 1.0f);
      return absl::OkStatus();
    }
    size_t at = std::hash<std::string_view>()(name) % table_.size();
    for (float& x : out) {
      x = table_[at];
      // Rows of one length would repeat the table's period; a step of its own breaks that.
      if (++at == table_.size()) at = (out.size() - (&x - out.data())) % 977;
    }
    return absl::OkStatus();
  }

 private:
  std::vector<float> table_;
};

}  // namespace memory3
