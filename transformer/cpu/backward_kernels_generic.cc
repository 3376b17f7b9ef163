// For any x86-64: compiled without instruction set flags.
namespace memory3 {
namespace {
constexpr int kLanes = 4;
constexpr int kProductRows = 4;
}  // namespace
}  // namespace memory3

#include "transformer/cpu/backward_kernels.inc"

namespace memory3 {
const BackwardKernels& GenericBackwardKernels() { return kKernels; }
}  // namespace memory3
