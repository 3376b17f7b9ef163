#include "embedder/wordpiece.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "embedder/unicode.h"

namespace memory3 {
namespace {

// Unicode's White_Space, less what cleaning removes as a control character.
bool IsSpace(char32_t c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == 0x2028 || c == 0x2029 ||
         (c >= 0x80 && ClassOf(c) == CharClass::kSpace);
}

// Vertical tab and form feed are white space elsewhere, and controls here.
bool IsControl(char32_t c) {
  return c < 0x80 ? (c < 0x20 && c != '\t' && c != '\n' && c != '\r') || c == 0x7F
                  : ClassOf(c) == CharClass::kControl;
}

size_t CodePoints(std::string_view piece) {
  return std::count_if(piece.begin(), piece.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

}  // namespace

absl::StatusOr<std::unique_ptr<WordPieceTokenizer>> WordPieceTokenizer::Create(
    absl::flat_hash_map<std::string, int32_t> vocabulary, WordPieceOptions options,
    const std::string& source) {
  std::unique_ptr<WordPieceTokenizer> t(new WordPieceTokenizer);
  for (const auto& [token, id] :
       {std::pair{&options.unknown, &t->unknown_id_}, std::pair{&options.begin, &t->begin_id_},
        std::pair{&options.end, &t->end_id_}}) {
    const auto it = vocabulary.find(*token);
    if (it == vocabulary.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(source, ": the vocabulary has no special token \"", *token, "\""));
    }
    *id = it->second;
  }
  for (const auto& [piece, id] : vocabulary) {
    t->longest_piece_ = std::max(t->longest_piece_, CodePoints(piece));
    t->max_id_ = std::max(t->max_id_, id);
  }
  t->vocabulary_ = std::move(vocabulary);
  t->options_ = std::move(options);
  return t;
}

void WordPieceTokenizer::EncodeWord(const std::u32string& word, std::vector<int32_t>* ids) const {
  if (word.size() > options_.max_word_chars) {
    ids->push_back(unknown_id_);
    return;
  }
  const size_t first = ids->size();
  std::string piece;
  std::vector<size_t> ends;  // of each code point, in `piece`
  for (size_t begin = 0; begin < word.size();) {
    const size_t most = std::min(word.size() - begin, longest_piece_);
    piece = begin == 0 ? "" : options_.continuing_prefix;
    ends.clear();
    for (size_t i = 0; i < most; ++i) {
      AppendUtf8(word[begin + i], &piece);
      ends.push_back(piece.size());
    }
    size_t length = most;
    for (; length > 0; --length) {
      piece.resize(ends[length - 1]);
      const auto it = vocabulary_.find(piece);
      if (it == vocabulary_.end()) continue;
      ids->push_back(it->second);
      break;
    }
    if (length == 0) {  // no piece fits: the whole word is unknown
      ids->resize(first);
      ids->push_back(unknown_id_);
      return;
    }
    begin += length;
  }
}

void WordPieceTokenizer::Encode(std::string_view text, size_t max_tokens,
                                std::vector<int32_t>* ids) const {
  const size_t limit = ids->size() + max_tokens;
  std::u32string word;
  const auto end_word = [&] {
    if (!word.empty()) EncodeWord(word, ids);
    word.clear();
  };
  for (size_t pos = 0; pos < text.size() && ids->size() < limit;) {
    const char32_t c = DecodeUtf8(text, &pos);
    if (options_.clean_text && (c == 0 || c == kReplacementChar || IsControl(c))) continue;
    if (IsSpace(c)) {
      end_word();
      continue;
    }
    const bool alone = options_.ideographs_alone && IsIdeograph(c);
    if (alone) end_word();
    char32_t folded[3] = {c, 0, 0};
    int n = 1;
    if (options_.strip_accents) {
      n = FoldAccents(c, folded);
    } else if (options_.lower_case) {
      folded[0] = ToLower(c);
    }
    for (int i = 0; i < n; ++i) {
      if (ClassOf(folded[i]) == CharClass::kPunctuation) {
        end_word();
        word.push_back(folded[i]);
        end_word();
      } else {
        word.push_back(folded[i]);
        // A word of any length costs no more than one that is just too long.
        if (word.size() > options_.max_word_chars + 1) word.pop_back();
      }
    }
    if (alone) end_word();
  }
  end_word();
  if (ids->size() > limit) ids->resize(limit);
}

}  // namespace memory3
