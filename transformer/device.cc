#include "transformer/device.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace memory3 {

absl::StatusOr<std::unique_ptr<VectorDecoder>> Device::MakeVectorDecoder(const Codec& codec) {
  return absl::UnimplementedError(
      absl::StrCat(name(), ": does not decode ", std::string(CodecName(codec.id()))));
}

void Buffer::Free() {
  if (data_ != nullptr) device_->Free(data_);
  device_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace memory3
