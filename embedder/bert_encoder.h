// The encoder of BERT (Devlin et al. 2019) and XLM-RoBERTa (Conneau et al. 2020), forward only,
// f32:
//   x = LayerNorm(word[id] + position[offset + i] + type[0])
//   per layer: x = LayerNorm(x + O·attention(Q·x, K·x, V·x));  x = LayerNorm(x + W2·gelu(W1·x))
// with biases everywhere, gelu(x) = x·Φ(x) exact, scores scaled by 1/√head_dim, no mask: the texts
// of a batch lie one after the other without padding, and each attends to itself.
//
// Thread-safety: const methods from any thread; each call uses up to `threads` OpenMP threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "embedder/bert_config.h"
#include "memory/hash.h"

namespace memory3 {

class BertEncoder {
 public:
  // Reads directory/model.safetensors (f32, bf16 or f16). Errors name the file and the tensor.
  static absl::StatusOr<std::unique_ptr<BertEncoder>> Load(const std::string& directory,
                                                           const BertConfig& config);

  // ids: the tokens of all sequences, one after the other; lengths: of each, 1..config.max_tokens.
  // out [sequences, hidden_size]: pooled and brought to L2 norm 1.
  absl::Status Encode(std::span<const int32_t> ids, std::span<const int> lengths, int threads,
                      std::span<float> out) const;

  // Over every tensor that is read, as f32.
  const Hash256& digest() const { return digest_; }

 private:
  struct Linear {
    std::vector<float> weight;  // [out, in]
    std::vector<float> bias;    // [out]
  };
  struct Norm {
    std::vector<float> weight, bias;  // [hidden]
  };
  struct Layer {
    Linear qkv;  // [3·hidden, hidden]: query, key, value
    Linear output;
    Norm attention_norm;
    Linear up, down;
    Norm norm;
  };
  class Loader;

  explicit BertEncoder(const BertConfig& config) : config_(config) {}

  BertConfig config_;
  std::vector<float> words_;  // [vocab, hidden]
  std::vector<float>
      positions_;  // [max_tokens, hidden], from the first one used, with type[0] added
  Norm embedding_norm_;
  std::vector<Layer> layers_;
  Hash256 digest_;
};

}  // namespace memory3
