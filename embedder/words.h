// Text → normalised words, the terms of lexical retrieval.
//
// A word is a run of letters, digits and marks; it is lower-cased and loses its accents ("Dvořák" →
// "dvorak"), an apostrophe inside it ("don't" → "dont") and a final "'s". Ideographs and kana are a
// word each. ASCII words of more than three letters lose a plural -s (Harman's "S" stemmer, 1991:
// -ies → -y, and -s unless -ss, -us or -is). Bytes that are not UTF-8 separate words.
//
// Thread-safety: a WordSplitter belongs to one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace memory3 {

class WordSplitter {
 public:
  // Replaces the words held by those of `text`, in order.
  void Split(std::string_view text);
  size_t size() const { return ends_.size(); }
  // Valid until the next Split.
  std::string_view word(size_t i) const {
    const uint32_t begin = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(buffer_).substr(begin, ends_[i] - begin);
  }

 private:
  void EndWord(bool ascii);

  std::string buffer_;          // the words, one after the other
  std::vector<uint32_t> ends_;  // where each ends in buffer_
};

}  // namespace memory3
