// Text → token ids for a BERT-family encoder: WordPiece (BERT) or Unigram through SentencePiece
// (XLM-RoBERTa), read from a model directory.
//
// Thread-safety: immutable after loading; any method from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/hash.h"

namespace memory3 {

class TextTokenizer {
 public:
  virtual ~TextTokenizer() = default;

  // Appends the ids of `text` without special tokens; stops once there are `max_tokens` of them.
  // Any bytes are accepted: what is not UTF-8 reads as U+FFFD. The text is only text: "[SEP]" or
  // "</s>" in it are characters, no special tokens.
  virtual void Encode(std::string_view text, size_t max_tokens,
                      std::vector<int32_t>* ids) const = 0;
  virtual int32_t begin_id() const = 0;  // [CLS] or <s>
  virtual int32_t end_id() const = 0;    // [SEP] or </s>
  virtual int32_t max_id() const = 0;    // the largest id Encode may give
};

struct LoadedTokenizer {
  std::unique_ptr<TextTokenizer> tokenizer;
  Hash256 digest;  // over the files that decide the ids
};

// `model_type`: "bert" reads tokenizer.json (a WordPiece model) or else vocab.txt with
// tokenizer_config.json; "xlm-roberta" reads sentencepiece.bpe.model or else tokenizer.json (a
// Unigram model). INVALID_ARGUMENT names the file and the field; NOT_FOUND lists the files looked
// for.
absl::StatusOr<LoadedTokenizer> LoadTextTokenizer(const std::string& directory,
                                                  const std::string& model_type);

}  // namespace memory3
