#include "trainer/references.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

// Half for the title, and room for any one character.
constexpr int kLeastReferenceTokens = 16;

bool IsSpace(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }
bool IsLetter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
}
bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// The length of a closing quote or bracket at the start of `text`; 0: there is none.
size_t ClosingMark(std::string_view text) {
  if (text.empty()) return 0;
  if (text[0] == '"' || text[0] == '\'' || text[0] == ')' || text[0] == ']') return 1;
  for (const std::string_view mark : {"”", "’", "»"}) {
    if (text.starts_with(mark)) return mark.size();
  }
  return 0;
}

bool IsIdeographicEnd(std::string_view text) {
  return text.starts_with("。") || text.starts_with("！") || text.starts_with("？");
}

// The full stop at `at` is of an initial: "J. S. Bach".
bool IsInitial(std::string_view text, size_t at) {
  return text[at] == '.' && at >= 1 && IsLetter(text[at - 1]) &&
         (at == 1 || IsSpace(text[at - 2]) || text[at - 2] == '.');
}

class Cutter {
 public:
  Cutter(std::string_view title, std::string_view text, const Tokenizer& tokenizer, int most)
      : text_(text), tokenizer_(tokenizer), most_(most) {
    if (!title.empty()) head_ = absl::StrCat(std::string(ShortTitle(title)), "\n");
  }

  std::vector<CutReference> Run() {
    size_t first = 0;  // of the reference under way
    size_t last = 0;   // end of its last sentence that fits
    const std::vector<size_t> ends = SentenceEnds(text_);
    for (size_t i = 0; i < ends.size();) {
      while (first < ends[i] && IsSpace(text_[first])) ++first;
      if (first >= ends[i]) {
        ++i;
        continue;
      }
      if (Fits(first, ends[i])) {
        last = ends[i++];
      } else if (last > first) {
        Add(first, last);
        first = last;
      } else {
        last = first = AddPartOfSentence(first, ends[i]);
      }
    }
    if (last > first) Add(first, last);
    return std::move(references_);
  }

 private:
  std::string_view ShortTitle(std::string_view title) const {
    while (!title.empty() && static_cast<int>(tokenizer_.Encode(title).size()) > most_ / 2) {
      size_t n = title.size() - 1;
      while (n > 0 && IsContinuation(title[n])) --n;
      title = title.substr(0, n);
    }
    return title;
  }

  std::string Text(size_t begin, size_t end) const {
    while (end > begin && IsSpace(text_[end - 1])) --end;
    return absl::StrCat(head_, std::string(text_.substr(begin, end - begin)));
  }

  // A token stands for at most a few words, so far longer texts need not be encoded.
  bool Fits(size_t begin, size_t end) const {
    return end - begin <= static_cast<size_t>(most_) * 64 &&
           static_cast<int>(tokenizer_.Encode(Text(begin, end)).size()) <= most_;
  }

  void Add(size_t begin, size_t end) {
    while (end > begin && IsSpace(text_[end - 1])) --end;
    CutReference& r = references_.emplace_back();
    r.begin = begin;
    r.end = end;
    r.text = Text(begin, end);
    r.token_ids = tokenizer_.Encode(r.text);
  }

  // Adds as much as fits of a sentence that does not; returns its end.
  size_t AddPartOfSentence(size_t begin, size_t end) {
    // The longest prefix of whole characters; a longer prefix never takes fewer tokens by much, so
    // bisection and then single steps down.
    size_t low = begin + 1, high = end;
    while (IsContinuation(text_[low])) ++low;  // one character always fits
    while (high - low > 1) {
      const size_t middle = low + (high - low) / 2;
      (Fits(begin, middle) ? low : high) = middle;
    }
    size_t cut = low;
    while (IsContinuation(text_[cut]) || !Fits(begin, cut)) --cut;
    size_t word = cut;
    while (word > begin && !IsSpace(text_[word - 1]) && !IsSpace(text_[word])) --word;
    if (word > begin) cut = word;
    Add(begin, cut);
    return cut;
  }

  const std::string_view text_;
  const Tokenizer& tokenizer_;
  const int most_;
  std::string head_;
  std::vector<CutReference> references_;
};

}  // namespace

std::vector<size_t> SentenceEnds(std::string_view text) {
  std::vector<size_t> ends;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') {
      ends.push_back(i + 1);
      continue;
    }
    if (IsIdeographicEnd(text.substr(i))) {
      ends.push_back(i + 3);
      i += 2;
      continue;
    }
    if (c != '.' && c != '!' && c != '?') continue;
    size_t after = i + 1;
    while (const size_t mark = ClosingMark(text.substr(after))) after += mark;
    if (after < text.size() && !IsSpace(text[after])) continue;
    size_t next = after;
    while (next < text.size() && IsSpace(text[next])) ++next;
    const bool small = next < text.size() && text[next] >= 'a' && text[next] <= 'z';
    if (small || IsInitial(text, i)) continue;
    ends.push_back(after);
    i = after - 1;
  }
  if (!text.empty() && (ends.empty() || ends.back() != text.size())) ends.push_back(text.size());
  return ends;
}

absl::StatusOr<std::vector<CutReference>> CutReferences(std::string_view title,
                                                        std::string_view text,
                                                        const Tokenizer& tokenizer,
                                                        int reference_tokens) {
  if (reference_tokens < kLeastReferenceTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("reference_tokens: ", reference_tokens, " is below ", kLeastReferenceTokens));
  }
  return Cutter(title, text, tokenizer, reference_tokens).Run();
}

}  // namespace memory3
