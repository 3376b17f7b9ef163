// MakeCudaDevice of a build without CUDA.

#include "absl/status/status.h"
#include "transformer/device.h"

namespace memory3 {

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions&) {
  return absl::FailedPreconditionError("cuda: this program was built without CUDA");
}

}  // namespace memory3
