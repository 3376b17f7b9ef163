#include "embedder/words.h"

#include <array>

#include "embedder/unicode.h"

namespace memory3 {
namespace {

// Lower-cased letter or digit; 0 for any other ASCII character.
constexpr std::array<char, 128> kAsciiWord = [] {
  std::array<char, 128> t{};
  for (char c = '0'; c <= '9'; ++c) t[c] = c;
  for (char c = 'a'; c <= 'z'; ++c) t[c] = c;
  for (char c = 'A'; c <= 'Z'; ++c) t[c] = static_cast<char>(c + 32);
  return t;
}();

bool IsKana(char32_t c) { return c >= 0x3041 && c <= 0x30FF; }
bool IsApostrophe(char32_t c) { return c == '\'' || c == 0x2019 || c == 0x02BC; }

}  // namespace

void WordSplitter::EndWord(bool ascii) {
  const uint32_t begin = ends_.empty() ? 0 : ends_.back();
  const size_t length = buffer_.size() - begin;
  if (length == 0) return;
  if (ascii && length > 3 && buffer_.back() == 's') {
    const char before = buffer_[buffer_.size() - 2];
    if (length > 4 && before == 'e' && buffer_[buffer_.size() - 3] == 'i') {
      buffer_.resize(buffer_.size() - 3);
      buffer_.push_back('y');
    } else if (before != 's' && before != 'u' && before != 'i') {
      buffer_.pop_back();
    }
  }
  ends_.push_back(static_cast<uint32_t>(buffer_.size()));
}

void WordSplitter::Split(std::string_view text) {
  buffer_.clear();
  ends_.clear();
  // Positions are 32 bits; nobody embeds four gigabytes, and the first ones say what it is about.
  text = text.substr(0, size_t{1} << 30);
  bool ascii = true;
  const auto end_word = [&] {
    EndWord(ascii);
    ascii = true;
  };
  const auto in_word = [&] { return buffer_.size() > (ends_.empty() ? 0 : ends_.back()); };
  for (size_t pos = 0; pos < text.size();) {
    const auto byte = static_cast<uint8_t>(text[pos]);
    if (byte < 0x80 && byte != '\'') {
      ++pos;
      if (const char c = kAsciiWord[byte]; c != 0) {
        buffer_.push_back(c);
      } else {
        end_word();
      }
      continue;
    }
    const char32_t c = DecodeUtf8(text, &pos);
    if (IsApostrophe(c)) {
      // Inside a word it is dropped, and "'s" with it where the word ends there.
      if (!in_word()) continue;
      size_t after = pos;
      const char32_t next = after < text.size() ? DecodeUtf8(text, &after) : ' ';
      if (ClassOf(next) != CharClass::kWord) {
        end_word();
      } else if (next == 's' || next == 'S') {
        size_t beyond = after;
        const char32_t third = beyond < text.size() ? DecodeUtf8(text, &beyond) : ' ';
        if (ClassOf(third) != CharClass::kWord) {
          end_word();
          pos = after;
        }
      }
      continue;
    }
    if (IsIdeograph(c) || IsKana(c)) {
      end_word();
      AppendUtf8(c, &buffer_);
      ascii = false;
      end_word();
      continue;
    }
    switch (ClassOf(c)) {
      case CharClass::kWord: {
        char32_t folded[3];
        const int n = FoldAccents(c, folded);
        for (int i = 0; i < n; ++i) {
          if (folded[i] == 0x3C2) folded[i] = 0x3C3;  // final sigma
          if (folded[i] == 0xDF) {                    // ß
            buffer_.append("ss");
            continue;
          }
          if (folded[i] >= 0x80) ascii = false;
          AppendUtf8(folded[i], &buffer_);
        }
        break;
      }
      case CharClass::kMark:  // an accent that stands after its letter
        break;
      case CharClass::kControl:
        if (c == 0xAD || c == 0x200C || c == 0x200D) break;  // soft hyphen, joiners: inside a word
        [[fallthrough]];
      default:
        end_word();
    }
  }
  end_word();
}

}  // namespace memory3
