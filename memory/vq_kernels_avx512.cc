// The kernels for AVX-512F: 64-byte registers, 32 of them.
#include "memory/vq_kernels.h"

namespace memory3::vq {
namespace {
constexpr int kLanes = 16;
constexpr int kVectors = 8;
constexpr int kSplit = 1;
}  // namespace
}  // namespace memory3::vq

#include "memory/vq_kernels.inc"

namespace memory3::vq {
extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {"avx512", Nearest, Product};
}  // namespace memory3::vq
