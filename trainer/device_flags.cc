#include "trainer/command.h"

namespace memory3 {

void DeviceFlags::AddTo(CLI::App* flags) {
  flags->add_option("--device", device)
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  flags->add_option("--threads", threads, "Threads of the CPU device; 0: one per core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

absl::StatusOr<std::unique_ptr<Device>> DeviceFlags::Make() const {
  if (device == "cuda") return MakeCudaDevice({});
  return MakeCpuDevice({.threads = threads});
}

}  // namespace memory3
