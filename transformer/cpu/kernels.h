// The inner loops of the CPU device, one table for each instruction set.
//
// Each table lives in a file of its own (kernels_*.cc) that is compiled for its instruction set and
// entered only behind the check in cpu_device.cc. Those files include nothing whose inline
// functions another file could share: the linker keeps one copy of such a function, and it might be
// the one an older CPU cannot run.
//
// Products take weights in panels of kPanel output columns. A panel is read front to back, so a
// product with few rows runs at the speed of memory; lanes lie over the columns, so every output is
// one sum in ascending order of k, whatever the number of rows.
//
// Thread-safety: pure functions on the caller's buffers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace memory3 {

// What a product does with the sum it made.
enum class PanelMode : int {
  kStore,     // y = sum
  kAdd,       // y = y + sum
  kContinue,  // the sum starts from y
};

struct CpuKernels {
  static constexpr int kPanel = 64;

  // y[r][c] = Σ_k x[r * x_stride + k] * panel[k * 64 + c], r < rows, c < 64. Strides in elements.
  // `sums`: room for rows * 64 numbers of 4 bytes, where sums wait while a long panel is taken in
  // pieces; null: it is taken in one, which is right for short ones.
  void (*panel_f32)(const float* x, int64_t x_stride, const float* panel, int64_t k, int64_t rows,
                    float* y, int64_t y_stride, PanelMode mode, void* sums);

  // Rows that panel_bf16 and panel_int8 take together: blocks of a multiple waste nothing.
  int block_rows;

  // Weights in pairs: panel[k / 2][64][2], bf16. x rows come from round_bf16 and are
  // bf16_activation_bytes an element, x_stride bytes apart; k is even. `sums` as for panel_f32, but
  // never null.
  void (*panel_bf16)(const void* x, int64_t x_stride, const uint16_t* panel, int64_t k,
                     int64_t rows, float* y, int64_t y_stride, PanelMode mode, void* sums);
  int bf16_activation_bytes;
  // n activations in the form panel_bf16 reads, zeros up to n_padded.
  void (*round_bf16)(void* to, const float* x, int64_t n, int64_t n_padded);

  // Weights in quads: panel[k / 4][64][4], int8; y = (Σ_k q[k] w[k]) * x_scale * w_scale, the sum
  // exact in int32. x rows come from quantize_row, x_stride bytes apart; k is a multiple of 4.
  // w_sum[c] = Σ_k w[k][c].
  void (*panel_int8)(const uint8_t* x, int64_t x_stride, const float* x_scale, const int8_t* panel,
                     const float* w_scale, const int32_t* w_sum, int64_t k, int64_t rows, float* y,
                     int64_t y_stride, PanelMode mode, void* sums);
  // x ≈ q * result, q in [-127, 127], stored in the form panel_int8 reads; zero up to n_padded.
  float (*quantize_row)(uint8_t* to, const float* x, int64_t n, int64_t n_padded);

  // y = x * inv_rms * gain, inv_rms = 1/sqrt(mean(x²) + eps), which is returned.
  float (*rms_norm)(float* y, const float* x, const float* gain, float eps, int64_t n);
  // y = gate / (1 + exp(-gate)) * up.
  void (*silu_mul)(float* y, const float* gate, const float* up, int64_t n);
  // Turns the pairs (x[i], x[i + half]) by the angle whose cosine and sine are given; sign -1:
  // back.
  void (*rotate)(float* x, const float* cosine, const float* sine, float sign, int64_t half);
  // x[j] = exp((x[j] - max) * scale); returns the sum, in an order that depends on j alone.
  // -inf becomes 0. If every x is -inf: all 0, sum 0, max -inf.
  float (*softmax_numerators)(float* x, int64_t n, float scale, float* max);
  // y[i] = x[i] * factor
  void (*scale)(float* y, const float* x, float factor, int64_t n);
  // y[i] += x[i] * factor
  void (*add_scaled)(float* y, const float* x, float factor, int64_t n);
  // The first index of the largest value; 0 where there is none (NaN only).
  int64_t (*arg_max)(const float* x, int64_t n);
  // panel[d * 64 + first + t] = keys[t * stride + d], t < tokens, d < head_dim: keys as columns.
  void (*pack_columns)(float* panel, int first, const float* keys, int64_t stride, int tokens,
                       int head_dim);
  void (*f32_from_bf16)(float* to, const uint16_t* from, int64_t n);
  void (*bf16_from_f32)(uint16_t* to, const float* from, int64_t n);  // round to nearest even
};

const CpuKernels& GenericKernels();
#if defined(__x86_64__)
const CpuKernels& Avx2Kernels();        // AVX2, FMA
const CpuKernels& Avx512Kernels();      // AVX-512 F, BW, DQ, VL
const CpuKernels& Avx512VnniKernels();  // and VNNI
const CpuKernels& Avx512Bf16Kernels();  // and BF16
const CpuKernels& AmxKernels();         // and AMX with BF16 and INT8
#endif

}  // namespace memory3
