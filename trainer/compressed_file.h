// A file read as a stream of bytes: plain, .gz (zlib, several members too) or .zst (zstd, windows
// up to 2^27 and several frames too), told apart by the name.
//
// Thread-safety: one thread.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace memory3 {

class CompressedFile {
 public:
  virtual ~CompressedFile() = default;

  // NOT_FOUND or PERMISSION_DENIED naming the path.
  static absl::StatusOr<std::unique_ptr<CompressedFile>> Open(const std::string& path);

  // Fills `out` from its start; fewer bytes than out.size() only at the end, where 0 follows.
  // DATA_LOSS: damaged or cut compressed data; UNAVAILABLE: the disk's error. Both name the path.
  virtual absl::StatusOr<size_t> Read(std::span<char> out) = 0;
  // Of the file as it lies on disk, for progress.
  int64_t bytes_consumed() const { return consumed_; }
  int64_t bytes_total() const { return total_; }
  const std::string& path() const { return path_; }

 protected:
  struct Close {
    void operator()(std::FILE* f) const { std::fclose(f); }
  };
  CompressedFile(std::string path, std::FILE* file, int64_t total)
      : path_(std::move(path)), file_(file), total_(total) {}
  // Raw bytes of the file; 0 at its end.
  absl::StatusOr<size_t> ReadRaw(std::span<char> out);

 private:
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
  int64_t total_;
  int64_t consumed_ = 0;
};

}  // namespace memory3
