// Compiled with -mavx2 -mfma (transformer/CMakeLists.txt).
namespace memory3 {
namespace {
constexpr int kLanes = 8;
constexpr int kProductRows = 4;
}  // namespace
}  // namespace memory3

#include "transformer/cpu/backward_kernels.inc"

namespace memory3 {
const BackwardKernels& Avx2BackwardKernels() { return kKernels; }
}  // namespace memory3
