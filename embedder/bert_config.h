// What a BERT or XLM-RoBERTa model directory says of itself: config.json, and
// sentence-transformers' files where they are there (modules.json, 1_Pooling/config.json,
// sentence_bert_config.json, config_sentence_transformers.json). Whatever would change the vectors
// and is not represented here is refused by file and field.
//
// Thread-safety: plain values.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace memory3 {

struct BertConfig {
  enum class Pooling { kMean, kCls };

  std::string model_type;  // "bert" or "xlm-roberta"
  int vocab_size = 0;
  int hidden_size = 0;
  int layers = 0;
  int heads = 0;
  int intermediate_size = 0;
  int positions = 0;        // rows of the table: max_position_embeddings
  int position_offset = 0;  // of the first token: 0, in XLM-RoBERTa pad_token_id + 1
  int token_types = 2;
  float layer_norm_eps = 1e-12f;
  Pooling pooling = Pooling::kMean;  // without 1_Pooling: sentence-transformers' default
  int max_tokens = 0;                // longest input with its two special tokens

  int head_dim() const { return hidden_size / heads; }
};

// INVALID_ARGUMENT names file and field; NOT_FOUND: no config.json.
absl::StatusOr<BertConfig> LoadBertConfig(const std::string& directory);

}  // namespace memory3
