// Error messages from parts: absl::StrCat that also takes std::string_view, which Debian's Abseil
// keeps apart from its own string_view.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

namespace memory3 {

inline absl::string_view MessagePart(std::string_view v) { return {v.data(), v.size()}; }
inline absl::string_view MessagePart(const std::string& v) { return v; }
inline absl::string_view MessagePart(const char* v) { return v; }
template <typename T>
const T& MessagePart(const T& v) {
  return v;
}

template <typename... Parts>
std::string Message(const Parts&... parts) {
  return absl::StrCat(MessagePart(parts)...);
}

}  // namespace memory3
