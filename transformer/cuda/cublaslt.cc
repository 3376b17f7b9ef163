#include "transformer/cuda/cublaslt.h"

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace memory3 {

struct CublasLtFunctions {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtMatmul) multiply;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulAlgoCheck) check;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
};

namespace {

constexpr int kMajor = CUBLAS_VER_MAJOR;

// The library stays loaded: unloading it at exit races with the CUDA runtime's own end.
absl::StatusOr<void*> OpenLibrary() {
  const std::string file = absl::StrCat("libcublasLt.so.", kMajor);
  std::vector<std::string> paths = {file};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    const char* root = std::getenv(variable);
    if (root != nullptr) paths.push_back(absl::StrCat(root, "/lib64/", file));
  }
  paths.push_back(absl::StrCat("/usr/local/cuda/lib64/", file));
  for (const std::string& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("cuda: cuBLASLt is not to be found; looked for ", absl::StrJoin(paths, ", ")));
}

absl::Status Error(const char* what, cublasStatus_t status, const MatrixProduct& p) {
  const std::string message =
      absl::StrCat("cuda: ", what, ": cuBLAS status ", static_cast<int>(status), " for a product ",
                   p.m, " x ", p.n, " x ", p.k);
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? absl::UnimplementedError(message)
                                               : absl::InternalError(message);
}

// Largest power of two, up to 256, that divides the address.
int64_t Alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return int64_t{1} << std::countr_zero(address);
}

int64_t RowClass(int64_t rows) { return std::bit_ceil(static_cast<uint64_t>(rows)); }

}  // namespace

// The library works on column-major matrices, so it computes dᵀ = bᵀ aᵀ: its first matrix is b, its
// second is a, and what is row-major and untransposed here is column-major and untransposed there.
struct CublasLt::Descriptors {
  Descriptors(const CublasLtFunctions& f, const MatrixProduct& p) : f(f) {
    const bool exact = p.input == CUDA_R_8I;
    const cudaDataType_t scale = exact ? CUDA_R_32I : CUDA_R_32F;
    f.desc_create(&product, exact ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F, scale);
    const cublasOperation_t first = p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    f.desc_set(product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    f.desc_set(product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    f.layout_create(&b, p.input, p.b_transposed ? p.k : p.n, p.b_transposed ? p.n : p.k,
                    p.b_stride);
    f.layout_create(&a, p.input, p.a_transposed ? p.m : p.k, p.a_transposed ? p.k : p.m,
                    p.a_stride);
    f.layout_create(&d, p.output, p.n, p.m, p.d_stride);
  }
  ~Descriptors() {
    if (d != nullptr) f.layout_destroy(d);
    if (a != nullptr) f.layout_destroy(a);
    if (b != nullptr) f.layout_destroy(b);
    if (product != nullptr) f.desc_destroy(product);
  }
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;
  bool ok() const { return product != nullptr && a != nullptr && b != nullptr && d != nullptr; }

  const CublasLtFunctions& f;
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
};

absl::StatusOr<std::unique_ptr<CublasLt>> CublasLt::Open(void* workspace, size_t workspace_bytes) {
  absl::StatusOr<void*> library = OpenLibrary();
  if (!library.ok()) return library.status();
  std::unique_ptr<CublasLt> lt(new CublasLt);
  lt->workspace_ = workspace;
  lt->workspace_bytes_ = workspace_bytes;
  lt->f_ = std::make_unique<CublasLtFunctions>();
  CublasLtFunctions& f = *lt->f_;
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(*library, name));
    if (function == nullptr) missing = name;
  };
  find(f.create, "cublasLtCreate");
  find(f.destroy, "cublasLtDestroy");
  find(f.version, "cublasLtGetVersion");
  find(f.multiply, "cublasLtMatmul");
  find(f.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(f.check, "cublasLtMatmulAlgoCheck");
  find(f.desc_create, "cublasLtMatmulDescCreate");
  find(f.desc_destroy, "cublasLtMatmulDescDestroy");
  find(f.desc_set, "cublasLtMatmulDescSetAttribute");
  find(f.layout_create, "cublasLtMatrixLayoutCreate");
  find(f.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(f.preference_create, "cublasLtMatmulPreferenceCreate");
  find(f.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(f.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  if (!missing.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("cuda: cuBLASLt has no ", missing));
  }
  const cublasStatus_t status = f.create(&lt->handle_);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return absl::FailedPreconditionError(
        absl::StrCat("cuda: cublasLtCreate: cuBLAS status ", static_cast<int>(status)));
  }
  return lt;
}

CublasLt::~CublasLt() {
  if (handle_ != nullptr) f_->destroy(handle_);
}

size_t CublasLt::version() const { return f_->version(); }

absl::Status CublasLt::Multiply(const MatrixProduct& p, cudaStream_t stream) {
  const Descriptors descriptors(*f_, p);
  if (!descriptors.ok()) return Error("cublasLt descriptors", CUBLAS_STATUS_ALLOC_FAILED, p);

  const auto key = [](const MatrixProduct& q) {
    return Key{q.input,
               q.output,
               q.m,
               q.n,
               q.k,
               q.a_stride,
               q.b_stride,
               q.d_stride,
               q.a_transposed + 2 * q.b_transposed + 4 * q.accumulate,
               Alignment(q.a),
               Alignment(q.b),
               Alignment(q.d),
               0};
  };
  const auto ask = [&](const MatrixProduct& q,
                       const Descriptors& shape) -> absl::StatusOr<cublasLtMatmulAlgo_t> {
    cublasLtMatmulPreference_t preference = nullptr;
    cublasStatus_t status = f_->preference_create(&preference);
    if (status != CUBLAS_STATUS_SUCCESS) return Error("cublasLt preference", status, q);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, auto value) {
      f_->preference_set(preference, name, &value, sizeof value);
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes_));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(Alignment(q.b)));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(Alignment(q.a)));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(Alignment(q.d)));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(Alignment(q.d)));
    cublasLtMatmulHeuristicResult_t result = {};
    int found = 0;
    status = f_->heuristic(handle_, shape.product, shape.b, shape.a, shape.d, shape.d, preference,
                           1, &result, &found);
    f_->preference_destroy(preference);
    if (status == CUBLAS_STATUS_SUCCESS && found == 0) status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (status != CUBLAS_STATUS_SUCCESS) return Error("cublasLt heuristic", status, q);
    return result.algo;
  };

  const Key exact = key(p);
  auto it = algorithms_.find(exact);
  if (it == algorithms_.end()) {
    // The rows of activations are m, but in a weight's gradient, where they are the sum's length.
    MatrixProduct rounded = p;
    int64_t& rows = p.a_transposed ? rounded.k : rounded.m;
    rows = RowClass(rows);
    Key name = key(rounded);
    name.back() = 1;  // of a class
    auto of_class = algorithms_.find(name);
    if (of_class == algorithms_.end()) {
      // Where activations are transposed the class's layout must fit its strides.
      const Descriptors shape(*f_, rounded);
      absl::StatusOr<cublasLtMatmulAlgo_t> algorithm = ask(rounded, shape);
      if (algorithm.ok()) of_class = algorithms_.emplace(name, *algorithm).first;
    }
    cublasLtMatmulHeuristicResult_t checked = {};
    if (of_class != algorithms_.end() &&
        f_->check(handle_, descriptors.product, descriptors.b, descriptors.a, descriptors.d,
                  descriptors.d, &of_class->second, &checked) == CUBLAS_STATUS_SUCCESS &&
        checked.workspaceSize <= workspace_bytes_) {
      it = algorithms_.emplace(exact, of_class->second).first;
    } else {
      absl::StatusOr<cublasLtMatmulAlgo_t> algorithm = ask(p, descriptors);
      if (!algorithm.ok()) return algorithm.status();
      it = algorithms_.emplace(exact, *algorithm).first;
    }
  }

  const float one = 1, beta = p.accumulate ? 1 : 0;
  const int32_t int_one = 1, int_beta = p.accumulate ? 1 : 0;
  const bool integers = p.input == CUDA_R_8I;
  const cublasStatus_t status = f_->multiply(
      handle_, descriptors.product, integers ? static_cast<const void*>(&int_one) : &one, p.b,
      descriptors.b, p.a, descriptors.a, integers ? static_cast<const void*>(&int_beta) : &beta,
      p.d, descriptors.d, p.d, descriptors.d, &it->second, workspace_, workspace_bytes_, stream);
  if (status != CUBLAS_STATUS_SUCCESS) return Error("cublasLtMatmul", status, p);
  return absl::OkStatus();
}

}  // namespace memory3
