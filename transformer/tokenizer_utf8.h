// UTF-8, one code point at a time, with every way of being wrong told apart.
#pragma once

#include <cstdint>
#include <string_view>

namespace memory3 {

struct Utf8Char {
  enum class Kind : uint8_t {
    kValid,
    kBroken,     // `length` bytes that no continuation makes valid (Unicode's maximal subpart)
    kTruncated,  // the text ends inside what may become a character
  } kind = Kind::kBroken;
  char32_t code_point = 0xfffd;
  int length = 1;  // bytes
};

// The first character of `text`, which is not empty.
Utf8Char NextUtf8(std::string_view text);

inline constexpr std::string_view kReplacementCharacter = "\xef\xbf\xbd";

}  // namespace memory3
