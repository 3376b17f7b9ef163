// A block has 16 outputs; its eight warps share the sum over the inputs between them and add up in
// order at the end, so an output's sum does not depend on the number of rows. Weights go from
// device memory straight into the registers that the tensor cores multiply: a lane loads 16
// consecutive bytes of a weight row, which stand for two fragments' columns. The order of columns
// inside a product is free as long as the activations use the same one.

#include "transformer/cuda/common.cuh"
#include "transformer/cuda/matmul_rows.h"
#include "transformer/cuda/mma.cuh"

namespace memory3 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kOutputs = 16;
// Bytes of a weight row in one step: four lanes of 16. A warp loads kUnroll steps before it
// multiplies, so that enough reads are on their way.
constexpr int kStepBytes = 64;
constexpr int kUnroll = 4;

struct Bf16Product {
  using Sum = float;
  static __device__ __forceinline__ void MultiplyAdd(Sum (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
    memory3::MultiplyAdd(c, a, b0, b1);
  }
};
struct Int8Product {
  using Sum = int32_t;
  static __device__ __forceinline__ void MultiplyAdd(Sum (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// kRowTiles: groups of eight rows of x.
template <typename Product, int kRowTiles>
__global__ __launch_bounds__(kThreads) void RowsProductKernel(RowsProduct p) {
  using Sum = typename Product::Sum;
  __shared__ Sum sums[kWarps][kOutputs][8 * kRowTiles + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_output = int64_t{blockIdx.x} * kOutputs;
  const int rows = static_cast<int>(p.y.rows);
  const char* w = static_cast<const char*>(p.w);
  const char* x = static_cast<const char*>(p.x);
  const bool has0 = first_output + g < p.y.cols, has1 = first_output + g + 8 < p.y.cols;
  const char* w0 = w + (first_output + g) * p.w_stride;
  const char* w1 = w0 + 8 * p.w_stride;
  const uint4 zero = make_uint4(0, 0, 0, 0);

  Sum c[kRowTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) c[i][j] = 0;
  }
  for (int64_t k = warp * kStepBytes * kUnroll; k < p.row_bytes;
       k += kWarps * kStepBytes * kUnroll) {
    uint4 a0[kUnroll], a1[kUnroll], b[kUnroll][kRowTiles];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = k + u * kStepBytes + t * 16;
      const bool inside = at < p.row_bytes;
      a0[u] = inside && has0 ? __ldcs(reinterpret_cast<const uint4*>(w0 + at)) : zero;
      a1[u] = inside && has1 ? __ldcs(reinterpret_cast<const uint4*>(w1 + at)) : zero;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = i * 8 + g;
        b[u][i] = inside && row < rows ? *reinterpret_cast<const uint4*>(x + row * p.x_stride + at)
                                       : zero;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t low[4] = {a0[u].x, a1[u].x, a0[u].y, a1[u].y};
      const uint32_t high[4] = {a0[u].z, a1[u].z, a0[u].w, a1[u].w};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Product::MultiplyAdd(c[i], low, b[u][i].x, b[u][i].y);
        Product::MultiplyAdd(c[i], high, b[u][i].z, b[u][i].w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    sums[warp][g][i * 8 + 2 * t] = c[i][0];
    sums[warp][g][i * 8 + 2 * t + 1] = c[i][1];
    sums[warp][g + 8][i * 8 + 2 * t] = c[i][2];
    sums[warp][g + 8][i * 8 + 2 * t + 1] = c[i][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kOutputs * rows; i += kThreads) {
    const int row = i / kOutputs, output = i % kOutputs;
    if (first_output + output >= p.y.cols) continue;
    Sum total = 0;
    for (int s = 0; s < kWarps; ++s) total += sums[s][output][row];
    float value = static_cast<float>(total);
    if (p.w_scale != nullptr) value = value * p.x_scale[row] * p.w_scale[first_output + output];
    const int64_t at = row * p.y.stride + first_output + output;
    if (p.accumulate) value += LoadOne(p.y.data, p.y.dtype, at);
    StoreOne(p.y.data, p.y.dtype, at, value);
  }
}

// One block a row.
constexpr int kQuantizeThreads = 256;
__global__ __launch_bounds__(kQuantizeThreads) void QuantizeRowsKernel(int8_t* codes,
                                                                       int64_t stride,
                                                                       float* scales, Tensor x) {
  const int64_t row = blockIdx.x;
  float most = 0;
  for (int64_t c = threadIdx.x; c < x.cols; c += kQuantizeThreads) {
    most = fmaxf(most, fabsf(LoadOne(x.data, x.dtype, row * x.stride + c)));
  }
  most = BlockMax<kQuantizeThreads>(most);
  const float factor = most > 0 ? 127.0f / most : 0.0f;
  for (int64_t c = threadIdx.x; c < stride; c += kQuantizeThreads) {
    const float value = c < x.cols ? LoadOne(x.data, x.dtype, row * x.stride + c) : 0.0f;
    codes[row * stride + c] = static_cast<int8_t>(__float2int_rn(value * factor));
  }
  if (threadIdx.x == 0) scales[row] = most / 127.0f;
}

__global__ void ScaleSumsKernel(Tensor y, const int32_t* sums, const float* x_scale,
                                const float* w_scale, bool accumulate) {
  const int64_t row = blockIdx.x, c = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (c >= y.cols) return;
  const int64_t at = row * y.stride + c;
  float value = static_cast<float>(sums[row * y.cols + c]) * x_scale[row] * w_scale[c];
  if (accumulate) value += LoadOne(y.data, y.dtype, at);
  StoreOne(y.data, y.dtype, at, value);
}

template <typename Product>
void Launch(const RowsProduct& product, cudaStream_t stream) {
  const unsigned blocks = CeilDivide(product.y.cols, kOutputs);
  if (product.y.rows <= 8) {
    RowsProductKernel<Product, 1><<<blocks, kThreads, 0, stream>>>(product);
  } else {
    RowsProductKernel<Product, 2><<<blocks, kThreads, 0, stream>>>(product);
  }
}

}  // namespace

cudaError_t LaunchRowsProduct(const RowsProduct& product, cudaStream_t stream) {
  if (product.y.rows == 0) return cudaSuccess;
  if (product.y.rows > kMaxProductRows) return cudaErrorInvalidValue;
  if (product.w_scale != nullptr) {
    Launch<Int8Product>(product, stream);
  } else {
    Launch<Bf16Product>(product, stream);
  }
  return cudaGetLastError();
}

cudaError_t LaunchQuantizeRows(int8_t* codes, int64_t stride, float* scales, Tensor x,
                               cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  QuantizeRowsKernel<<<x.rows, kQuantizeThreads, 0, stream>>>(codes, stride, scales, x);
  return cudaGetLastError();
}

cudaError_t LaunchScaleSums(Tensor y, const int32_t* sums, const float* x_scale,
                            const float* w_scale, bool accumulate, cudaStream_t stream) {
  if (y.rows == 0) return cudaSuccess;
  const dim3 grid(y.rows, CeilDivide(y.cols, 256));
  ScaleSumsKernel<<<grid, 256, 0, stream>>>(y, sums, x_scale, w_scale, accumulate);
  return cudaGetLastError();
}

}  // namespace memory3
