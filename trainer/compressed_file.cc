#include "trainer/compressed_file.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr size_t kInputBytes = size_t{1} << 17;
constexpr int kMaxWindowLog = 27;

class PlainFile : public CompressedFile {
 public:
  PlainFile(std::string path, std::FILE* file, int64_t total)
      : CompressedFile(std::move(path), file, total) {}
  absl::StatusOr<size_t> Read(std::span<char> out) override { return ReadRaw(out); }
};

class GzipFile : public CompressedFile {
 public:
  GzipFile(std::string path, std::FILE* file, int64_t total)
      : CompressedFile(std::move(path), file, total), input_(kInputBytes) {
    // 15: the largest window; + 16: gzip framing.
    ready_ = inflateInit2(&stream_, 15 + 16) == Z_OK;
  }
  ~GzipFile() override {
    if (ready_) inflateEnd(&stream_);
  }

  absl::StatusOr<size_t> Read(std::span<char> out) override {
    if (!ready_) return absl::ResourceExhaustedError("zlib: no memory");
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(std::min<size_t>(out.size(), 1u << 30));
    const uInt wanted = stream_.avail_out;
    while (stream_.avail_out > 0) {
      if (stream_.avail_in == 0) {
        absl::StatusOr<size_t> read = ReadRaw(input_);
        if (!read.ok()) return read.status();
        if (*read == 0) {
          if (inside_member_ || !any_member_) {
            return absl::DataLossError(absl::StrCat(path(), ": the gzip data is cut off"));
          }
          break;
        }
        stream_.next_in = reinterpret_cast<Bytef*>(input_.data());
        stream_.avail_in = static_cast<uInt>(*read);
      }
      if (!inside_member_) {
        if (any_member_) inflateReset(&stream_);
        inside_member_ = any_member_ = true;
      }
      const int result = inflate(&stream_, Z_NO_FLUSH);
      if (result == Z_STREAM_END) {
        inside_member_ = false;
      } else if (result != Z_OK && result != Z_BUF_ERROR) {
        return absl::DataLossError(absl::StrCat(path(), ": damaged gzip data",
                                                stream_.msg == nullptr ? "" : ": ",
                                                stream_.msg == nullptr ? "" : stream_.msg));
      }
    }
    return wanted - stream_.avail_out;
  }

 private:
  std::vector<char> input_;
  z_stream stream_{};
  bool ready_ = false, inside_member_ = false, any_member_ = false;
};

class ZstdFile : public CompressedFile {
 public:
  ZstdFile(std::string path, std::FILE* file, int64_t total)
      : CompressedFile(std::move(path), file, total), input_(kInputBytes) {
    ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, kMaxWindowLog);
  }

  absl::StatusOr<size_t> Read(std::span<char> out) override {
    ZSTD_outBuffer output{out.data(), out.size(), 0};
    while (output.pos < output.size) {
      if (in_.pos == in_.size && !may_hold_more_) {
        absl::StatusOr<size_t> read = ReadRaw(input_);
        if (!read.ok()) return read.status();
        if (*read == 0) {
          if (inside_frame_ || !any_frame_) {
            return absl::DataLossError(absl::StrCat(path(), ": the zstd data is cut off"));
          }
          break;
        }
        in_ = {input_.data(), *read, 0};
      }
      any_frame_ = true;
      const size_t result = ZSTD_decompressStream(context_.get(), &output, &in_);
      if (ZSTD_isError(result)) {
        return absl::DataLossError(
            absl::StrCat(path(), ": damaged zstd data: ", ZSTD_getErrorName(result)));
      }
      inside_frame_ = result != 0;
      // A full output may mean that the decoder still holds bytes for the next call.
      may_hold_more_ = inside_frame_ && output.pos == output.size;
    }
    return output.pos;
  }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* c) const { ZSTD_freeDCtx(c); }
  };
  std::vector<char> input_;
  std::unique_ptr<ZSTD_DCtx, Free> context_{ZSTD_createDCtx()};
  ZSTD_inBuffer in_{nullptr, 0, 0};
  bool inside_frame_ = false, any_frame_ = false, may_hold_more_ = false;
};

}  // namespace

absl::StatusOr<size_t> CompressedFile::ReadRaw(std::span<char> out) {
  const size_t read = std::fread(out.data(), 1, out.size(), file_.get());
  if (read < out.size() && std::ferror(file_.get())) {
    return absl::UnavailableError(absl::StrCat(path_, ": ", std::strerror(errno)));
  }
  consumed_ += static_cast<int64_t>(read);
  return read;
}

absl::StatusOr<std::unique_ptr<CompressedFile>> CompressedFile::Open(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a directory"));
  }
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) {
    const int code = errno;
    return absl::ErrnoToStatus(code, absl::StrCat(path, ": cannot be opened"));
  }
  const auto size = std::filesystem::file_size(path, error);
  const int64_t total = error ? 0 : static_cast<int64_t>(size);
  if (absl::EndsWith(path, ".gz")) return std::make_unique<GzipFile>(path, file, total);
  if (absl::EndsWith(path, ".zst")) return std::make_unique<ZstdFile>(path, file, total);
  return std::make_unique<PlainFile>(path, file, total);
}

}  // namespace memory3
