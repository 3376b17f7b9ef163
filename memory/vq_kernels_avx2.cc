// The kernels for AVX2 with FMA: 32-byte registers, 16 of them.
#include "memory/vq_kernels.h"

namespace memory3::vq {
namespace {
constexpr int kLanes = 8;
constexpr int kVectors = 6;
constexpr int kSplit = 3;
}  // namespace
}  // namespace memory3::vq

#include "memory/vq_kernels.inc"

namespace memory3::vq {
extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {"avx2", Nearest, Product};
}  // namespace memory3::vq
