// The inner loops of the backward pass and of the optimiser, compiled once per instruction set
// (backward_kernels_{generic,avx2,avx512}.cc) and picked at run time.
//
// All pointers are host memory, row-major f32. Every function sums in one fixed order, so the same
// arguments give the same bits. Thread-safety: pure functions.
//
// This header and backward_kernels.inc include nothing of the standard library but <cstdint> and
// <cmath>'s C functions: an inline function compiled for AVX-512 must not become the one that the
// linker keeps for everybody.
#pragma once

#include <cstdint>

namespace memory3 {

struct BackwardKernels {
  // c[m, n] (+)= a b. Element (i, p) of a stands at a[i*a_row + p*a_col], so that a may be
  // transposed; b is [k, n]. m is a multiple of kRowPad, n of kColumnPad.
  void (*product)(int m, int n, int k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                  int64_t ldb, float* c, int64_t ldc, bool accumulate);

  // to[j*ld + i] = from[i*from_stride + j] for i < rows, j < cols.
  void (*transpose)(float* to, int64_t ld, const float* from, int64_t from_stride, int rows,
                    int cols);

  // Attention: from s = q·k and dp = dout·v of one query row to p = exp(scale*s - lse) (in s) and
  // ds = p (dp - delta) scale (in dp); both zero from `visible` on. n is a multiple of kColumnPad.
  void (*softmax_backward)(float* s, float* dp, int n, int visible, float scale, float lse,
                           float delta);

  float (*dot)(const float* a, const float* b, int64_t n);
  // y += x
  void (*add)(float* y, const float* x, int64_t n);
  // y += a x
  void (*add_scaled)(float* y, const float* x, float a, int64_t n);
  double (*sum_of_squares)(const float* x, int64_t n);

  // logits become (softmax(logits) - onehot(target)) * scale; returns -log softmax(logits)[target].
  float (*cross_entropy)(float* logits, int64_t n, int64_t target, float scale);

  // dx += inv_rms (dy*gain - x inv_rms² mean(dy*gain*x))
  void (*rms_norm_backward)(float* dx, const float* dy, const float* x, const float* gain,
                            float inv_rms, int64_t n);
  // dgain += dy * x * inv_rms, one row.
  void (*rms_norm_gain)(float* dgain, const float* dy, const float* x, float inv_rms, int64_t n);

  // gate, up and dy are n wide; the results may stand where gate and up do.
  void (*silu_mul_backward)(float* dgate, float* dup, const float* dy, const float* gate,
                            const float* up, int64_t n);

  // One pass over parameter, gradient and both moments. `decay` = 1 - learning_rate*weight_decay;
  // step_size = learning_rate / (1 - beta1^t); root_scale = 1 / sqrt(1 - beta2^t).
  void (*adamw)(float* parameter, const float* gradient, float* m, float* v, int64_t n, float beta1,
                float beta2, float epsilon, float decay, float step_size, float root_scale,
                float gradient_scale);
};

inline constexpr int kRowPad = 8;
inline constexpr int kColumnPad = 32;

enum class CpuIsa : uint8_t;
const BackwardKernels& BackwardKernelsFor(CpuIsa isa);

const BackwardKernels& GenericBackwardKernels();
const BackwardKernels& Avx2BackwardKernels();
const BackwardKernels& Avx512BackwardKernels();

}  // namespace memory3
