// The CPU device's optimiser: one pass over memory, each number by one thread.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "transformer/check.h"
#include "transformer/cpu/backward_kernels.h"
#include "transformer/cpu/cpu_device.h"

namespace memory3 {
namespace {

// Elements a thread takes at once. Sums are kept per piece and added in order, so that they do not
// depend on the number of threads.
constexpr int64_t kPiece = int64_t{1} << 16;

int64_t Pieces(int64_t n) { return (n + kPiece - 1) / kPiece; }

}  // namespace

absl::StatusOr<double> CpuDevice::SumOfSquares(const float* x, int64_t n) {
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
  std::vector<double> sums(Pieces(n));
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t piece = 0; piece < Pieces(n); ++piece) {
    const int64_t begin = piece * kPiece;
    sums[piece] = kernels.sum_of_squares(x + begin, std::min(kPiece, n - begin));
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void CpuDevice::AdamWStep(float* parameter, void* shadow, const float* gradient, float* m, float* v,
                          int64_t n, const AdamW& options, float gradient_scale) {
  CHECK(shadow == nullptr);  // activations are f32 here
  CHECK(options.step >= 1);
  const double step = static_cast<double>(options.step);
  const double correction1 = 1 - std::pow(double{options.beta1}, step);
  const double correction2 = 1 - std::pow(double{options.beta2}, step);
  const float decay =
      static_cast<float>(1 - double{options.learning_rate} * double{options.weight_decay});
  const float step_size = static_cast<float>(options.learning_rate / correction1);
  const float root_scale = static_cast<float>(1 / std::sqrt(correction2));
  const BackwardKernels& kernels = BackwardKernelsFor(isa_);
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t piece = 0; piece < Pieces(n); ++piece) {
    const int64_t begin = piece * kPiece;
    kernels.adamw(parameter + begin, gradient + begin, m + begin, v + begin,
                  std::min(kPiece, n - begin), options.beta1, options.beta2, options.epsilon, decay,
                  step_size, root_scale, gradient_scale);
  }
}

}  // namespace memory3
