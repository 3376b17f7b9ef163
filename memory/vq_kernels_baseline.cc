// The kernels for any CPU of the architecture: 16-byte registers, 16 of them.
#include "memory/vq_kernels.h"

namespace memory3::vq {
namespace {
constexpr int kLanes = 4;
constexpr int kVectors = 4;
constexpr int kSplit = 4;
}  // namespace
}  // namespace memory3::vq

#include "memory/vq_kernels.inc"

namespace memory3::vq {
extern const Kernels kBaselineKernels;
const Kernels kBaselineKernels = {"baseline", Nearest, Product};
}  // namespace memory3::vq
