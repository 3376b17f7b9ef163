// Any bytes as config.json: an error, or a configuration that writes and reads back as itself.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "transformer/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config =
      memory3::ParseModelConfig({reinterpret_cast<const char*>(data), size}, "fuzz");
  if (!config.ok()) return 0;
  const auto again = memory3::ParseModelConfig(memory3::ModelConfigToJson(*config), "again");
  if (!again.ok()) std::abort();
  if (memory3::ModelConfigToJson(*again) != memory3::ModelConfigToJson(*config)) std::abort();
  if (config->head_dim <= 128) memory3::RopeInverseFrequencies(*config);
  return 0;
}
