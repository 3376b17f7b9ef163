// Compiled with -mavx512f and what goes with it (transformer/CMakeLists.txt).
namespace memory3 {
namespace {
constexpr int kLanes = 16;
constexpr int kProductRows = 8;
}  // namespace
}  // namespace memory3

#include "transformer/cpu/backward_kernels.inc"

namespace memory3 {
const BackwardKernels& Avx512BackwardKernels() { return kKernels; }
}  // namespace memory3
