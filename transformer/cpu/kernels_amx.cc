// Products of bf16 and int8 weights with AMX: tiles of 16 rows by 64 bytes. Compiled for it;
// entered only behind the check.
//
// A tile of activations is 16 rows by a step of k (32 bf16, 64 int8), one of weights that step by
// 16 columns, as panels have it: 16 lines of 4 bytes a column. A row's sums come out of the same
// instructions in the same order, whatever rows are beside it and however k is cut into chunks,
// which are whole steps. (For bf16 an instruction adds a step's even and its odd products first,
// so bits differ from avx512_bf16's; int8's sums are exact.)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

#include "transformer/cpu/simd.inc"

constexpr int kPanel = CpuKernels::kPanel;
constexpr int64_t kLine = kPanel * 4;               // bytes of a panel for 2 bf16, 4 int8 of k
constexpr int64_t kTileRows = 16, kTileBytes = 64;  // of a row
constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kStepBytes = kTileRows * kLine;  // of a panel for a step
constexpr int64_t kAhead = 2 * kStepBytes;         // prefetched, where a panel is read once
// Steps that all rows go through before the next: 16 KiB of weights for half a panel's columns,
// in the first-level cache beside the rows' activations.
constexpr int64_t kChunk = 8;

// Registers 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
// Sums 0 and 1 (and 2 and 3 if `wide`) and activations 4 have `top` rows, the rest `bottom`.
void Shape(int64_t top, int64_t bottom, bool wide) {
  TileShapes shapes;
  const int64_t rows[8] = {top, top,    wide ? top : bottom, wide ? top : bottom,
                           top, bottom, kTileRows,           kTileRows};
  for (int t = 0; t < 8; ++t) {
    shapes.rows[t] = static_cast<uint8_t>(rows[t]);
    shapes.row_bytes[t] = rows[t] > 0 ? kTileBytes : 0;
  }
  _tile_loadconfig(&shapes);
}

// What differs between the formats: the instruction, and what becomes of the sums.
struct Bf16Product {
  float* y;
  int64_t y_stride;
  PanelMode mode;

#define DOT(sum, x, w) _tile_dpbf16ps(sum, x, w)
#include "transformer/cpu/amx_steps.inc"
#undef DOT

  bool starts_from_y() const { return mode == PanelMode::kContinue; }
  void Finish(const void* sums, int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = static_cast<const float*>(sums) + r * kPanel;
      float* to = y + (row + r) * y_stride;
      for (int c = 0; c < kPanel; c += kLanes) {
        const Vec sum = Load(from + c);
        Store(to + c, mode == PanelMode::kAdd ? Add(Load(to + c), sum) : sum);
      }
    }
  }
};

// Activations are stored 128 too high (quantize_row), and 128 * Σ w is taken off the exact sum.
struct Int8Product {
  const float* x_scale;
  const float* w_scale;
  const int32_t* w_sum;
  float* y;
  int64_t y_stride;
  PanelMode mode;

#define DOT(sum, x, w) _tile_dpbusd(sum, x, w)
#include "transformer/cpu/amx_steps.inc"
#undef DOT

  bool starts_from_y() const { return false; }
  void Finish(const void* sums, int64_t row, int64_t rows) const {
    for (int c = 0; c < kPanel; c += kLanes) {
      const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(w_sum + c), 7);
      const Vec scale = Load(w_scale + c);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* from = static_cast<const int32_t*>(sums) + r * kPanel + c;
        const Vec value = Mul(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(from), shift)),
                              Mul(Set(x_scale[row + r]), scale));
        float* to = y + (row + r) * y_stride + c;
        Store(to, mode == PanelMode::kStore ? value : Add(Load(to), value));
      }
    }
  }
};

// The last part of k, shorter than a step, filled up with zeros.
struct Rest {
  alignas(64) char panel[kStepBytes];
  alignas(64) char x[2 * kTileRows * kTileBytes];

  void TakePanel(const char* from, int64_t lines) {
    memcpy(panel, from, lines * kLine);
    memset(panel + lines * kLine, 0, (kTileRows - lines) * kLine);
  }
  void TakeRows(const char* from, int64_t stride, int64_t rows, int64_t bytes) {
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(x + r * kTileBytes, from + r * stride, bytes);
      memset(x + r * kTileBytes + bytes, 0, kTileBytes - bytes);
    }
  }
};

// y = x * panel for `lines` (of 4 bytes a column) of k. `between`: [rows, kPanel] of 4 bytes.
template <typename Product>
void Run(const Product& product, const char* x, int64_t x_stride, const char* panel, int64_t lines,
         int64_t rows, void* between) {
  const int64_t steps = lines / kTileRows, rest_lines = lines % kTileRows;
  Rest rest;
  if (rest_lines > 0) rest.TakePanel(panel + steps * kStepBytes, rest_lines);
  char* const sums = static_cast<char*>(between);
  if (product.starts_from_y()) {
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(sums + r * kLine, product.y + r * product.y_stride, kLine);
    }
  }

  if (rows <= kTileRows) {  // all columns at once: the panel is read front to back
    Shape(rows, 0, true);
    if (product.starts_from_y()) {
      _tile_loadd(0, sums, kLine);
      _tile_loadd(1, sums + kTileBytes, kLine);
      _tile_loadd(2, sums + 2 * kTileBytes, kLine);
      _tile_loadd(3, sums + 3 * kTileBytes, kLine);
    }
    Product::WideSteps(x, x_stride, panel, steps);
    if (rest_lines > 0) {
      rest.TakeRows(x + steps * kTileBytes, x_stride, rows, 4 * rest_lines);
      Product::WideSteps(rest.x, kTileBytes, rest.panel, 1);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + kTileBytes, kLine);
    _tile_stored(2, sums + 2 * kTileBytes, kLine);
    _tile_stored(3, sums + 3 * kTileBytes, kLine);
    _tile_release();
    product.Finish(sums, 0, rows);
    return;
  }

  int64_t shaped = 0;
  for (int64_t begin = 0; begin == 0 || begin < steps; begin += kChunk) {
    const int64_t n = steps - begin < kChunk ? steps - begin : kChunk;
    const bool last = begin + n == steps;
    // The next chunk follows in memory, the next panel's first after the panel's last.
    const char* ahead = panel + (begin + n) * kStepBytes;
    const int64_t ahead_each = n * kStepBytes / (2 * ((rows + kBlockRows - 1) / kBlockRows));
    for (int64_t column = 0; column < 2; ++column) {
      for (int64_t row = 0; row < rows; row += kBlockRows) {
        // A last block of 17 to 31 rows has its second tile lower.
        const int64_t block = rows - row < kBlockRows ? rows - row : kBlockRows;
        if (block != shaped) {
          Shape(block < kTileRows ? block : kTileRows, block < kTileRows ? 0 : block - kTileRows,
                false);
          shaped = block;
        }
        const bool two = block > kTileRows;
        char* const top = sums + row * kLine + column * 2 * kTileBytes;
        char* const bottom = top + kTileRows * kLine;
        if (begin == 0 && !product.starts_from_y()) {
          _tile_zero(0);
          _tile_zero(1);
          if (two) {
            _tile_zero(2);
            _tile_zero(3);
          }
        } else {
          _tile_loadd(0, top, kLine);
          _tile_loadd(1, top + kTileBytes, kLine);
          if (two) {
            _tile_loadd(2, bottom, kLine);
            _tile_loadd(3, bottom + kTileBytes, kLine);
          }
        }
        for (int64_t at = 0; at < ahead_each; at += 64) __builtin_prefetch(ahead + at, 0, 2);
        ahead += ahead_each;
        const char* from = x + row * x_stride + begin * kTileBytes;
        const char* weights = panel + begin * kStepBytes + column * 2 * kTileBytes;
        if (two) {
          Product::template Steps<2>(from, x_stride, weights, n);
        } else {
          Product::template Steps<1>(from, x_stride, weights, n);
        }
        if (last && rest_lines > 0) {
          rest.TakeRows(from + n * kTileBytes, x_stride, block, 4 * rest_lines);
          const char* rest_weights = rest.panel + column * 2 * kTileBytes;
          if (two) {
            Product::template Steps<2>(rest.x, kTileBytes, rest_weights, 1);
          } else {
            Product::template Steps<1>(rest.x, kTileBytes, rest_weights, 1);
          }
        }
        _tile_stored(0, top, kLine);
        _tile_stored(1, top + kTileBytes, kLine);
        if (two) {
          _tile_stored(2, bottom, kLine);
          _tile_stored(3, bottom + kTileBytes, kLine);
        }
        if (last && column == 1) product.Finish(sums + row * kLine, row, block);
      }
    }
  }
  _tile_release();
}

void PanelBf16(const void* x, int64_t x_stride, const uint16_t* panel, int64_t k, int64_t rows,
               float* y, int64_t y_stride, PanelMode mode, void* sums) {
  Run(Bf16Product{y, y_stride, mode}, static_cast<const char*>(x), x_stride,
      reinterpret_cast<const char*>(panel), k / 2, rows, sums);
}

void PanelInt8(const uint8_t* x, int64_t x_stride, const float* x_scale, const int8_t* panel,
               const float* w_scale, const int32_t* w_sum, int64_t k, int64_t rows, float* y,
               int64_t y_stride, PanelMode mode, void* sums) {
  Run(Int8Product{x_scale, w_scale, w_sum, y, y_stride, mode}, reinterpret_cast<const char*>(x),
      x_stride, reinterpret_cast<const char*>(panel), k / 4, rows, sums);
}

}  // namespace

const CpuKernels& AmxKernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k = Avx512Bf16Kernels();
    k.block_rows = kBlockRows;
    k.panel_bf16 = PanelBf16;
    k.panel_int8 = PanelInt8;
    return k;
  }();
  return kernels;
}

}  // namespace memory3
