// Any bytes as a GenerateRequest: parsed, or told what is wrong, and a field is named exactly where
// Protobuf refuses its text.
#include <cstdlib>

#include "inference_server/wire_message.h"
#include "memory3/v1/inference.pb.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  memory3::v1::GenerateRequest request;
  const bool parsed = memory3::ParseMessage(bytes, &request).ok();
  if (parsed && memory3::FindBrokenText(bytes, *request.GetDescriptor())) std::abort();
  return 0;
}
