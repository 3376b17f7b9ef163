// A file that appears whole or not at all: written under another name in the same directory,
// synced, renamed.
//
// Thread-safety: one thread. A file that was not committed is removed by the destructor; a process
// that dies before leaves `<path>.tmp-<pid>-<n>` behind, never a broken `path`.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace memory3 {

class AtomicFile {
 public:
  // Errors, here and below: PERMISSION_DENIED (also a read-only file system), RESOURCE_EXHAUSTED
  // (disk full), NOT_FOUND (no such directory), else UNAVAILABLE; all name the path.
  static absl::StatusOr<std::unique_ptr<AtomicFile>> Create(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  absl::Status Append(std::string_view data);
  // Syncs, renames to `path` (replacing what stood there) and syncs the directory.
  absl::Status Commit();

 private:
  AtomicFile(std::string path, std::string temporary, int fd);
  absl::Status Error(const char* what) const;

  const std::string path_, temporary_;
  int fd_;
};

// All of it in one call.
absl::Status WriteFileAtomically(const std::string& path, std::string_view data);

}  // namespace memory3
