// cuBLASLt, found at run time: a binary with the CUDA device in it starts where the library is not.
//
// Products are described in row-major terms. One algorithm is chosen by the library's heuristic for
// each class of shapes (rows up to the next power of two) and kept; none of them adds atomically,
// so a call repeated gives the same bits.
//
// Thread-safety: one thread (the device's).
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/tensor.h"

namespace memory3 {

// d[m, n] (+)= a b: a is [m, k], or stored as [k, m] where a_transposed; b is [k, n], or stored as
// [n, k] where b_transposed. Strides in elements. a and b have one type: bf16 or f32 (true f32, no
// TF32) with d f32 or bf16 as below, or int8 with d int32.
struct MatrixProduct {
  cudaDataType_t input = CUDA_R_16BF;
  cudaDataType_t output = CUDA_R_32F;
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  int64_t a_stride = 0;
  bool a_transposed = false;
  const void* b = nullptr;
  int64_t b_stride = 0;
  bool b_transposed = false;
  void* d = nullptr;
  int64_t d_stride = 0;
  bool accumulate = false;
};

struct CublasLtFunctions;

class CublasLt {
 public:
  // FAILED_PRECONDITION: the library is not there (says where it was looked for). `workspace`:
  // device memory that outlives this.
  static absl::StatusOr<std::unique_ptr<CublasLt>> Open(void* workspace, size_t workspace_bytes);
  ~CublasLt();

  // INTERNAL with the library's status, UNIMPLEMENTED where it has no algorithm for the shape.
  absl::Status Multiply(const MatrixProduct& product, cudaStream_t stream);
  // The library's version, e.g. 130100.
  size_t version() const;

 private:
  CublasLt() = default;

  using Key = std::array<int64_t, 13>;
  struct Descriptors;

  std::unique_ptr<CublasLtFunctions> f_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms_;  // by exact shape, and by class
};

}  // namespace memory3
