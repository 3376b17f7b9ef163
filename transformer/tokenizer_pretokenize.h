// How byte-level BPE cuts text into words before merging: the regular expressions of GPT-2, Llama 3
// and Qwen 2, written out by hand over Unicode categories (tables made by
// tests/goldens/unicode_tables.py). Bytes that are no UTF-8 count as characters that are neither
// letter, number nor space.
//
// Thread-safety: functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace memory3 {

enum class SplitPattern : uint8_t {
  kGpt2,
  kLlama3,
  kQwen2,             // kLlama3 with single digits
  kDigits,            // every number character by itself, the rest left together
  kContiguousDigits,  // runs of number characters by themselves
};

// The pattern a tokenizer.json spells as this regular expression; none where it is not known.
std::optional<SplitPattern> PatternOfRegex(std::string_view regex);

// Cuts `text` into words, in order, none empty, all of it. Appends to `words`.
void SplitWords(SplitPattern pattern, std::string_view text, std::vector<std::string_view>* words);

}  // namespace memory3
