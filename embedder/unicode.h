// The little of Unicode that splitting text into words needs: UTF-8 decoding that survives
// anything, character classes, lower-casing, accent stripping. Tables: unicode_tables.inc, made by
// unicode_tables.py from Python's unicodedata.
//
// Thread-safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace memory3 {

enum class CharClass : uint8_t {
  kWord = 0,         // letters, numbers, spacing marks
  kPunctuation = 1,  // P*
  kSpace = 2,        // Zs, and ASCII's white space
  kControl = 3,      // C*: control, format, private, unassigned
  kMark = 4,         // Mn: accents that stand alone
  kOther = 5,        // symbols, modifiers, line separators
};

inline constexpr char32_t kReplacementChar = 0xFFFD;

// Decodes the code point at text[*pos] and moves *pos past it. A byte that starts no valid UTF-8
// sequence gives kReplacementChar and moves by one. Requires *pos < text.size().
char32_t DecodeUtf8(std::string_view text, size_t* pos);
void AppendUtf8(char32_t c, std::string* out);

CharClass ClassOf(char32_t c);
// Simple lower-casing (one code point to one).
char32_t ToLower(char32_t c);
// Canonical decomposition without nonspacing marks, lower-cased: "É" → "e". Writes at most 3 code
// points to `out` and returns their number; 0 for a nonspacing mark.
int FoldAccents(char32_t c, char32_t out[3]);
// Ideographs, as BERT's tokenizer counts them: each is a word of its own.
bool IsIdeograph(char32_t c);

}  // namespace memory3
