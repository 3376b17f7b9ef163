#include "transformer/device.h"

namespace memory3 {

void Buffer::Free() {
  if (data_ != nullptr) device_->Free(data_);
  device_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace memory3
