#include "transformer/cpu/cpu_device.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transformer/check.h"
#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr std::pair<CpuIsa, std::string_view> kIsaNames[] = {
    {CpuIsa::kGeneric, "generic"},        {CpuIsa::kAvx2, "avx2"},
    {CpuIsa::kAvx512, "avx512"},          {CpuIsa::kAvx512Vnni, "avx512_vnni"},
    {CpuIsa::kAvx512Bf16, "avx512_bf16"}, {CpuIsa::kAmx, "amx"},
};

const CpuKernels& KernelsFor(CpuIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case CpuIsa::kAvx2:
      return Avx2Kernels();
    case CpuIsa::kAvx512:
      return Avx512Kernels();
    case CpuIsa::kAvx512Vnni:
      return Avx512VnniKernels();
    case CpuIsa::kAvx512Bf16:
      return Avx512Bf16Kernels();
    case CpuIsa::kAmx:
      return AmxKernels();
    case CpuIsa::kGeneric:
      break;
  }
#endif
  return GenericKernels();
}

#if defined(__x86_64__)
// Whether the CPU has AMX's tiles with both products, and Linux lets this process use them: their
// registers are so large that it has to be asked first.
bool HasAmx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((~d & (kBf16 | kTile | kInt8)) != 0) return false;
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

std::string_view CpuIsaName(CpuIsa isa) {
  for (const auto& [known, name] : kIsaNames) {
    if (known == isa) return name;
  }
  return "unknown";
}

CpuIsa BestCpuIsa() {
#if defined(__x86_64__)
  // The compiler's check also asks whether the operating system saves the wide registers.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuIsa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return CpuIsa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return CpuIsa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512Vnni;
  static const bool kHasAmx = HasAmx();
  return kHasAmx ? CpuIsa::kAmx : CpuIsa::kAvx512Bf16;
#else
  return CpuIsa::kGeneric;
#endif
}

absl::StatusOr<std::unique_ptr<CpuDevice>> CpuDevice::Make(const CpuDeviceOptions& options) {
  if (options.threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads: ", options.threads, " is negative; 0 means one per core"));
  }
  CpuIsa isa = BestCpuIsa();
  if (!options.instructions.empty()) {
    const auto* found = std::find_if(std::begin(kIsaNames), std::end(kIsaNames), [&](auto& entry) {
      return entry.second == options.instructions;
    });
    if (found == std::end(kIsaNames)) {
      return absl::InvalidArgumentError(
          absl::StrCat("instructions: \"", options.instructions,
                       "\" is none of generic, avx2, avx512, avx512_vnni, avx512_bf16, amx"));
    }
    isa = std::min(isa, found->first);
  }
  const int threads = options.threads > 0
                          ? options.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::unique_ptr<CpuDevice>(new CpuDevice(threads, isa, KernelsFor(isa)));
}

absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice(const CpuDeviceOptions& options) {
  return CpuDevice::Make(options);
}

std::string CpuDevice::name() const {
  return absl::StrCat("cpu (", std::string(CpuIsaName(isa_)), ", ", threads_,
                      threads_ == 1 ? " thread)" : " threads)");
}

absl::StatusOr<Buffer> CpuDevice::Allocate(size_t bytes) {
  if (bytes == 0) return Buffer(this, nullptr, 0);
  // Linux would promise more than there is, and kill the process when it is used.
  const size_t machine = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  if (bytes > machine) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes on a machine with ", machine));
  }
  // Weights are read at the speed of memory: on small pages address translation would slow that.
  const bool large = bytes >= 2 * kHugePage;
  void* data = nullptr;
  if (posix_memalign(&data, large ? kHugePage : 64, bytes) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  }
  if (large) madvise(data, bytes, MADV_HUGEPAGE);
  std::memset(data, 0, bytes);
  return Buffer(this, data, bytes);
}

void CpuDevice::Free(void* data) { std::free(data); }

void* CpuDevice::Scratch(size_t bytes) {
  if (scratch_.bytes() < bytes) {
    scratch_ = Buffer();
    absl::StatusOr<Buffer> buffer = Allocate(std::max(bytes, size_t{1} << 20));
    CHECK(buffer.ok());
    scratch_ = *std::move(buffer);
  }
  return scratch_.data();
}

void CpuDevice::Upload(void* device, const void* host, size_t bytes) {
  if (bytes > 0) std::memcpy(device, host, bytes);
}

absl::Status CpuDevice::Download(void* host, const void* device, size_t bytes) {
  if (bytes > 0) std::memcpy(host, device, bytes);
  return absl::OkStatus();
}

void CpuDevice::Copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memmove(to, from, bytes);
}

void CpuDevice::Zero(void* device, size_t bytes) {
  if (bytes > 0) std::memset(device, 0, bytes);
}

absl::Status CpuDevice::Synchronize() { return absl::OkStatus(); }

absl::Status CpuDevice::UploadAside(void* device, const void* host, size_t bytes) {
  Upload(device, host, bytes);
  return absl::OkStatus();
}

PreparedBatch* CpuDevice::Prepare(const BatchInput& input, int slot) {
  CHECK(slot >= 0);
  const size_t rows = input.token_ids.size();
  CHECK(input.positions.size() == rows || input.positions.empty());
  CHECK(input.destination.size() == rows || input.destination.empty());
  if (slot >= prepared_.size()) prepared_.resize(slot + 1);
  if (prepared_[slot] == nullptr) prepared_[slot] = std::make_unique<CpuPreparedBatch>();
  CpuPreparedBatch& batch = *prepared_[slot];
  batch.input = input;
  batch.rows = static_cast<int>(rows);
  batch.logit_rows = static_cast<int>(input.logit_rows.size());
  return &batch;
}

void CpuDevice::Run(uint64_t, const std::function<void()>& operations) { operations(); }

}  // namespace memory3
