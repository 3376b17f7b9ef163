#include "transformer/tokenizer_pretokenize.h"

#include <algorithm>
#include <iterator>

#include "transformer/tokenizer_utf8.h"

namespace memory3 {
namespace {

struct CodePointRange {
  char32_t first, last;
};
#include "transformer/tokenizer_unicode_tables.inc"

template <size_t N>
bool Contains(const CodePointRange (&ranges)[N], char32_t c) {
  const auto* it =
      std::upper_bound(std::begin(ranges), std::end(ranges), c,
                       [](char32_t v, const CodePointRange& r) { return v < r.first; });
  return it != std::begin(ranges) && c <= std::prev(it)->last;
}

enum class Class : uint8_t { kLetter, kNumber, kSpace, kOther };

Class ClassOf(char32_t c) {
  if (c < 0x80) {
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return Class::kLetter;
    if (c >= '0' && c <= '9') return Class::kNumber;
    return c == ' ' || (c >= 9 && c <= 13) ? Class::kSpace : Class::kOther;
  }
  if (Contains(kLetterRanges, c)) return Class::kLetter;
  if (Contains(kNumberRanges, c)) return Class::kNumber;
  return Contains(kSpaceRanges, c) ? Class::kSpace : Class::kOther;
}

// The text as characters, and matchers at a character's index. Each returns the end of the match,
// or its begin where there is none.
class Characters {
 public:
  explicit Characters(std::string_view text) : text_(text) {
    chars_.reserve(text.size() + 1);
    for (size_t at = 0; at < text.size();) {
      const Utf8Char c = NextUtf8(text.substr(at));
      const bool valid = c.kind == Utf8Char::Kind::kValid;
      chars_.push_back(
          {c.code_point, static_cast<uint32_t>(at), valid ? ClassOf(c.code_point) : Class::kOther});
      at += c.length;
    }
  }

  size_t size() const { return chars_.size(); }
  std::string_view Text(size_t begin, size_t end) const {
    const size_t from = chars_[begin].offset;
    return text_.substr(from, (end < size() ? chars_[end].offset : text_.size()) - from);
  }
  bool Is(size_t i, Class c) const { return i < size() && chars_[i].type == c; }
  bool Is(size_t i, char32_t c) const { return i < size() && chars_[i].code_point == c; }
  bool IsNewline(size_t i) const { return Is(i, U'\r') || Is(i, U'\n'); }
  size_t Run(size_t i, Class c, size_t most = SIZE_MAX) const {
    const size_t begin = i;
    while (Is(i, c) && i - begin < most) ++i;
    return i;
  }

  // 's|'t|'re|'ve|'m|'ll|'d
  size_t Contraction(size_t i, bool ignore_case) const {
    if (!Is(i, U'\'')) return i;
    const char32_t a = Folded(i + 1, ignore_case), b = Folded(i + 2, ignore_case);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 3;
    return i;
  }
  //  ?c+
  size_t WithSpace(size_t i, Class c) const {
    const size_t begin = Is(i, U' ') ? i + 1 : i;
    const size_t end = Run(begin, c);
    return end == begin ? i : end;
  }
  // \s+(?!\S)|\s+
  size_t Spaces(size_t i) const {
    const size_t end = Run(i, Class::kSpace);
    // The last space of several goes to the word behind it.
    return end < size() && end - i > 1 ? end - 1 : end;
  }

 private:
  struct Character {
    char32_t code_point;
    uint32_t offset;
    Class type;
  };
  char32_t Folded(size_t i, bool ignore_case) const {
    if (i >= size()) return 0;
    const char32_t c = chars_[i].code_point;
    if (!ignore_case) return c;
    if (c >= 'A' && c <= 'Z') return c + ('a' - 'A');
    return c == 0x17f ? U's' : c;  // ſ folds to s
  }

  const std::string_view text_;
  std::vector<Character> chars_;
};

size_t MatchGpt2(const Characters& t, size_t i) {
  if (const size_t end = t.Contraction(i, /*ignore_case=*/false); end != i) return end;
  for (const Class c : {Class::kLetter, Class::kNumber, Class::kOther}) {
    if (const size_t end = t.WithSpace(i, c); end != i) return end;
  }
  return t.Spaces(i);
}

size_t MatchLlama3(const Characters& t, size_t i, size_t digits) {
  if (const size_t end = t.Contraction(i, /*ignore_case=*/true); end != i) return end;
  // [^\r\n\p{L}\p{N}]?\p{L}+
  const bool lead = !t.IsNewline(i) && !t.Is(i, Class::kLetter) && !t.Is(i, Class::kNumber);
  const size_t letters = lead ? i + 1 : i;
  if (const size_t end = t.Run(letters, Class::kLetter); end != letters) return end;
  // \p{N}{1,3}
  if (const size_t end = t.Run(i, Class::kNumber, digits); end != i) return end;
  //  ?[^\s\p{L}\p{N}]+[\r\n]*
  if (size_t end = t.WithSpace(i, Class::kOther); end != i) {
    while (t.IsNewline(end)) ++end;
    return end;
  }
  // \s*[\r\n]+: to the last line end of the run.
  size_t newline = t.Run(i, Class::kSpace);
  while (newline > i && !t.IsNewline(newline - 1)) --newline;
  return newline != i ? newline : t.Spaces(i);
}

size_t MatchDigits(const Characters& t, size_t i, size_t most) {
  if (const size_t end = t.Run(i, Class::kNumber, most); end != i) return end;
  while (i < t.size() && !t.Is(i, Class::kNumber)) ++i;
  return i;
}

}  // namespace

std::optional<SplitPattern> PatternOfRegex(std::string_view regex) {
  if (regex == R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)") {
    return SplitPattern::kGpt2;
  }
  if (regex ==
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)") {
    return SplitPattern::kLlama3;
  }
  if (regex ==
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)") {
    return SplitPattern::kQwen2;
  }
  return std::nullopt;
}

void SplitWords(SplitPattern pattern, std::string_view text, std::vector<std::string_view>* words) {
  const Characters t(text);
  for (size_t i = 0; i < t.size();) {
    size_t end = i;
    switch (pattern) {
      case SplitPattern::kGpt2:
        end = MatchGpt2(t, i);
        break;
      case SplitPattern::kLlama3:
        end = MatchLlama3(t, i, 3);
        break;
      case SplitPattern::kQwen2:
        end = MatchLlama3(t, i, 1);
        break;
      case SplitPattern::kDigits:
        end = MatchDigits(t, i, 1);
        break;
      case SplitPattern::kContiguousDigits:
        end = MatchDigits(t, i, SIZE_MAX);
        break;
    }
    words->push_back(t.Text(i, end));
    i = end;
  }
}

}  // namespace memory3
