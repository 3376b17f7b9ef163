// Retrieval vectors from a BERT or XLM-RoBERTa directory (MiniLM, BGE, BGE-M3's dense vectors, E5
// without its prompts): tokenizer, encoder, CLS or mean pooling, L2 norm 1. A text longer than the
// model takes is cut.
//
// Thread-safety: as Embedder. One Embed call uses up to options.threads threads.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "embedder/bert_config.h"
#include "embedder/bert_encoder.h"
#include "embedder/embedder.h"
#include "embedder/text_tokenizer.h"

namespace memory3 {

class BertEmbedder : public Embedder {
 public:
  // Errors: INVALID_ARGUMENT names the file and the field or tensor; NOT_FOUND the file.
  static absl::StatusOr<std::unique_ptr<BertEmbedder>> Load(const std::string& directory,
                                                            const EmbedderOptions& options);

  int dimension() const override { return config_.hidden_size; }
  const Hash256& fingerprint() const override { return fingerprint_; }
  absl::Status Embed(std::span<const std::string_view> texts, std::span<float> out) const override;

  const BertConfig& config() const { return config_; }
  // With the special tokens around it, cut to the model's length.
  std::vector<int32_t> Tokenize(std::string_view text) const;

 private:
  BertEmbedder() = default;

  BertConfig config_;
  int threads_ = 1;
  std::unique_ptr<TextTokenizer> tokenizer_;
  std::unique_ptr<BertEncoder> encoder_;
  Hash256 fingerprint_;
};

}  // namespace memory3
