// References cut from documents: what the memory writer encodes and what questions are answered
// from (explicit-memory.md, Writing a memory). At most `reference_tokens` tokens with the title,
// which every reference begins with, cut at sentence ends; of a sentence that is too long at white
// space, of a word that is too long between characters. The pieces of a document follow each other
// and leave out nothing but white space.
//
// Thread-safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "transformer/tokenizer.h"

namespace memory3 {

struct CutReference {
  size_t begin = 0, end = 0;       // bytes of the document's text
  std::string text;                // title, line feed, text[begin, end); without a title the latter
  std::vector<int32_t> token_ids;  // Encode(text), without `<s>`
};

// Byte offsets after the sentences of `text`, ascending; the last one is text.size(). A sentence
// ends at a line's end, and after . ! ? (closing quotes and brackets included) before white space,
// unless a single letter stands before the full stop or a small letter after it; and after the
// ideographic 。！？.
std::vector<size_t> SentenceEnds(std::string_view text);

// `title` may be empty; one of more than half of reference_tokens is cut. Texts are UTF-8.
// INVALID_ARGUMENT: reference_tokens < 16.
absl::StatusOr<std::vector<CutReference>> CutReferences(std::string_view title,
                                                        std::string_view text,
                                                        const Tokenizer& tokenizer,
                                                        int reference_tokens);

}  // namespace memory3
