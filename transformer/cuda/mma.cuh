// The tensor cores' 16×8×16 product of bf16 and the loads that feed it from shared memory.
//
// Fragments, for lane = 4 g + t: A (16×16, row-major) a0 (row g, columns 2t, 2t+1), a1 (row g+8),
// a2 (row g, columns 2t+8, 2t+9), a3 (row g+8, the same). B (16×8) b0 (rows 2t, 2t+1, column g),
// b1 (rows 2t+8, 2t+9). C (16×8) c0, c1 (row g, columns 2t, 2t+1), c2, c3 (row g+8).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace memory3 {

__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// A matrix of bf16 in shared memory whose rows are kPitch elements apart. kPitch is an odd multiple
// of 8, so that the eight rows of a load lie in different banks.
//
// A fragment: rows row … row+15, columns column … column+15.
template <int kPitch>
__device__ __forceinline__ void LoadA(uint32_t (&a)[4], const __nv_bfloat16* m, int row,
                                      int column) {
  const int lane = threadIdx.x % 32;
  LoadMatrices(a, m + (row + lane % 16) * kPitch + column + lane / 16 * 8);
}

// Two B fragments of the transposed matrix, B[k][n] = m[row + n][column + k]: b[0], b[1] for
// n 0 … 7, b[2], b[3] for n 8 … 15.
template <int kPitch>
__device__ __forceinline__ void LoadBTransposed(uint32_t (&b)[4], const __nv_bfloat16* m, int row,
                                                int column) {
  const int lane = threadIdx.x % 32;
  LoadMatrices(b, m + (row + lane % 8 + lane / 16 * 8) * kPitch + column + lane / 8 % 2 * 8);
}

// Two B fragments, B[k][n] = m[row + k][column + n]: b[0], b[1] for n 0 … 7, b[2], b[3] for
// n 8 … 15.
template <int kPitch>
__device__ __forceinline__ void LoadB(uint32_t (&b)[4], const __nv_bfloat16* m, int row,
                                      int column) {
  const int lane = threadIdx.x % 32;
  LoadMatricesTransposed(b, m + (row + lane % 16) * kPitch + column + lane / 16 * 8);
}

}  // namespace memory3
