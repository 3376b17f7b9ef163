#include "embedder/unicode.h"

#include <algorithm>
#include <array>
#include <iterator>

namespace memory3 {
namespace {

struct ClassRange {
  char32_t first, last;
  uint8_t char_class;
};
struct LowerPair {
  char32_t from, to;
};
struct FoldEntry {
  char32_t from, first, second;  // second: 0 where there is none
};
#include "embedder/unicode_tables.inc"

constexpr char32_t kPlane =
    0x10000;  // the tables below cover the basic plane; the rest is searched

CharClass SearchClass(char32_t c) {
  const auto* r = std::upper_bound(std::begin(kClasses), std::end(kClasses), c,
                                   [](char32_t v, const ClassRange& e) { return v < e.first; });
  if (r == std::begin(kClasses)) return CharClass::kOther;
  --r;
  return c <= r->last ? static_cast<CharClass>(r->char_class) : CharClass::kControl;
}

CharClass AsciiClass(char32_t c) {
  if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
    return CharClass::kWord;
  }
  if (c == ' ' || (c >= '\t' && c <= '\r')) return CharClass::kSpace;
  if (c < 0x20 || c == 0x7F) return CharClass::kControl;
  // BERT counts every other ASCII sign as punctuation, "$" and "^" too; words need no finer sense.
  return CharClass::kPunctuation;
}

char32_t SearchLower(char32_t c) {
  const auto* p = std::lower_bound(std::begin(kLower), std::end(kLower), c,
                                   [](const LowerPair& e, char32_t v) { return e.from < v; });
  return p != std::end(kLower) && p->from == c ? p->to : c;
}

// Expanded once, so that text outside ASCII costs a load and not a search.
struct Tables {
  std::array<uint8_t, kPlane> classes;
  std::array<uint16_t, kPlane> lower;
  Tables() {
    for (char32_t c = 0; c < kPlane; ++c) {
      classes[c] = static_cast<uint8_t>(c < 0x80 ? AsciiClass(c) : SearchClass(c));
      char32_t l = c;
      if (c >= 'A' && c <= 'Z') l = c + 32;
      if (c >= 0x80) l = SearchLower(c);
      lower[c] = static_cast<uint16_t>(l < kPlane ? l : c);
    }
  }
};

const Tables& GetTables() {
  static const Tables* const tables = new Tables;
  return *tables;
}

}  // namespace

char32_t DecodeUtf8(std::string_view text, size_t* pos) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(*pos);
  if (lead < 0x80) {
    ++*pos;
    return lead;
  }
  int length = 0;
  char32_t c = 0, least = 0;
  if ((lead & 0xE0) == 0xC0) {
    length = 2, c = lead & 0x1F, least = 0x80;
  } else if ((lead & 0xF0) == 0xE0) {
    length = 3, c = lead & 0x0F, least = 0x800;
  } else if ((lead & 0xF8) == 0xF0) {
    length = 4, c = lead & 0x07, least = 0x10000;
  }
  if (length == 0 || text.size() - *pos < static_cast<size_t>(length)) {
    ++*pos;
    return kReplacementChar;
  }
  for (int i = 1; i < length; ++i) {
    const uint8_t next = byte(*pos + i);
    if ((next & 0xC0) != 0x80) {
      ++*pos;
      return kReplacementChar;
    }
    c = (c << 6) | (next & 0x3F);
  }
  if (c < least || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) {
    ++*pos;
    return kReplacementChar;
  }
  *pos += length;
  return c;
}

void AppendUtf8(char32_t c, std::string* out) {
  if (c < 0x80) {
    out->push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out->push_back(static_cast<char>(0xC0 | (c >> 6)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else if (c < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | (c >> 12)));
    out->push_back(static_cast<char>(0x80 | ((c >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | (c >> 18)));
    out->push_back(static_cast<char>(0x80 | ((c >> 12) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | ((c >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3F)));
  }
}

CharClass ClassOf(char32_t c) {
  return c < kPlane ? static_cast<CharClass>(GetTables().classes[c]) : SearchClass(c);
}

char32_t ToLower(char32_t c) { return c < kPlane ? GetTables().lower[c] : SearchLower(c); }

int FoldAccents(char32_t c, char32_t out[3]) {
  if (c < 0x80) {
    out[0] = c >= 'A' && c <= 'Z' ? c + 32 : c;
    return 1;
  }
  if (ClassOf(c) == CharClass::kMark) return 0;
  if (c >= 0xAC00 && c <= 0xD7A3) {  // a Hangul syllable: its two or three jamo
    const char32_t s = c - 0xAC00;
    out[0] = 0x1100 + s / 588;
    out[1] = 0x1161 + s % 588 / 28;
    out[2] = 0x11A7 + s % 28;
    return s % 28 == 0 ? 2 : 3;
  }
  const auto* e = std::lower_bound(std::begin(kFold), std::end(kFold), c,
                                   [](const FoldEntry& f, char32_t v) { return f.from < v; });
  if (e != std::end(kFold) && e->from == c) {
    out[0] = e->first;
    out[1] = e->second;
    return e->second == 0 ? 1 : 2;
  }
  out[0] = ToLower(c);
  return 1;
}

bool IsIdeograph(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) ||
         (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B73F) ||
         (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B820 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

}  // namespace memory3
