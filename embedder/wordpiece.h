// BERT's tokenizer: clean, lower-case, split at white space and punctuation, then the longest piece
// of the vocabulary first (Devlin et al. 2019; the rules are Hugging Face tokenizers'
// BertNormalizer, BertPreTokenizer and WordPiece).
//
// Thread-safety: as TextTokenizer.
#pragma once

#include "absl/container/flat_hash_map.h"
#include "embedder/text_tokenizer.h"

namespace memory3 {

struct WordPieceOptions {
  bool clean_text = true;
  bool ideographs_alone = true;  // handle_chinese_chars
  bool lower_case = true;
  bool strip_accents = true;  // only together with lower_case
  std::string unknown = "[UNK]", begin = "[CLS]", end = "[SEP]";
  std::string continuing_prefix = "##";
  size_t max_word_chars = 100;  // a longer word is unknown
};

class WordPieceTokenizer : public TextTokenizer {
 public:
  // INVALID_ARGUMENT names `source` and the special token that the vocabulary lacks.
  static absl::StatusOr<std::unique_ptr<WordPieceTokenizer>> Create(
      absl::flat_hash_map<std::string, int32_t> vocabulary, WordPieceOptions options,
      const std::string& source);

  void Encode(std::string_view text, size_t max_tokens, std::vector<int32_t>* ids) const override;
  int32_t begin_id() const override { return begin_id_; }
  int32_t end_id() const override { return end_id_; }
  int32_t max_id() const override { return max_id_; }

 private:
  WordPieceTokenizer() = default;
  void EncodeWord(const std::u32string& word, std::vector<int32_t>* ids) const;

  absl::flat_hash_map<std::string, int32_t> vocabulary_;
  WordPieceOptions options_;
  int32_t unknown_id_ = 0, begin_id_ = 0, end_id_ = 0, max_id_ = 0;
  size_t longest_piece_ = 0;  // in code points
};

}  // namespace memory3
