// The two products of the vq codec: nearest row (argmin of distances) and x times a matrix. One
// source, vq_kernels.inc, compiled for each instruction set and picked at run time. Sums run over
// the depth in order with fused multiply-adds where the CPU has them, so AVX2 and AVX-512 give the
// same bits.
//
// Plain pointers only: the sources compiled for newer instruction sets must not emit any inline
// function of the standard library, which the linker might then choose for everybody.
#pragma once

#include <cstdint>

namespace memory3::vq {

inline constexpr int kRowBlock = 48;        // rows that stand side by side, the kernels' unit
inline constexpr int kMaxKernelBatch = 64;  // vectors of one call

// Rows of a table [rows, depth], transposed by blocks: values[block][depth][kRowBlock], the last
// block padded with rows of zeros whose half norm is infinite. Does not own.
struct RowBlocks {
  const float* values;
  const float* half_norms;  // [blocks * kRowBlock], |row|²/2
  int64_t rows;
  int64_t blocks;
  int depth;
};

struct Kernels {
  const char* name;
  // nearest[v] = argmin over rows of |row - x[v]|², ties to the lowest; 0 where no distance is a
  // number. x: `n` vectors `stride` apart, n <= kMaxKernelBatch.
  void (*nearest)(const RowBlocks& table, const float* x, int n, int64_t stride, int32_t* nearest);
  // out[v][row] = row . x[v]; out: `n` vectors of table.rows numbers, close together.
  void (*product)(const RowBlocks& table, const float* x, int n, int64_t stride, float* out);
};

// What this CPU runs best, and everything it runs (for tests), best first.
const Kernels& PickKernels();
int AvailableKernels(const Kernels* out[3]);

}  // namespace memory3::vq
