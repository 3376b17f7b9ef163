// Any bytes as a safetensors file: an error, or tensors that lie within it.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "transformer/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto header =
      memory3::ParseSafetensorsHeader({reinterpret_cast<const char*>(data), size}, "fuzz");
  if (!header.ok()) return 0;
  for (const auto& [name, entry] : header->tensors) {
    if (entry.begin > entry.end || header->data_begin + entry.end > size) std::abort();
  }
  return 0;
}
