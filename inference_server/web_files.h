// The page at / and what it loads, from inference_server/web/, as bytes of the binary: the source
// is made by the build (cmake/EmbedFiles.cmake).
#pragma once

#include <span>
#include <string_view>

namespace memory3 {

struct WebFile {
  const char* path;  // "/"
  const char* type;  // Content-Type
  std::string_view content;
};

std::span<const WebFile> WebFiles();

}  // namespace memory3
