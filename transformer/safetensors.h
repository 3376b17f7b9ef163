// safetensors files: u64 length of a JSON header, the header ({"name": {"dtype", "shape",
// "data_offsets": [begin, end]}, …, "__metadata__": {…}}), then the tensors' bytes, little endian
// and without a gap (https://github.com/huggingface/safetensors, "Format").
//
// A reader maps the file; what it hands out are views that live as long as it does. The whole
// header is checked on opening: lengths, offsets, overlaps, gaps, duplicate names; nothing is
// trusted. Errors name file, tensor and field.
//
// Thread-safety: const methods from any thread. The file must not be truncated while it is mapped.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/tensor.h"

namespace memory3 {

struct SafetensorsEntry {
  std::string dtype;  // as in the file: "F32", "BF16", "F16", "I64", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes, from the end of the header

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

struct SafetensorsHeader {
  std::map<std::string, SafetensorsEntry, std::less<>> tensors;
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;  // offset of the tensors' bytes in the file
};

// `file`: the whole file's bytes. INVALID_ARGUMENT for a header that is none or contradicts itself,
// DATA_LOSS for a file shorter or longer than its header says; both name `source`.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view file,
                                                         std::string_view source);

class SafetensorsFile {
 public:
  // NOT_FOUND, UNAVAILABLE, and ParseSafetensorsHeader's.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const SafetensorsHeader& header() const { return header_; }
  // The tensor's bytes in the map; unaligned.
  std::string_view Bytes(const SafetensorsEntry& entry) const;
  // As f32. INVALID_ARGUMENT unless the type is F32, BF16 or F16 and out has its number of
  // elements; NOT_FOUND.
  absl::Status ReadFloats(std::string_view name, std::span<float> out) const;
  // Tells the kernel that the tensor's pages need not stay resident.
  void Forget(const SafetensorsEntry& entry) const;

 private:
  SafetensorsFile(std::string path, void* map, size_t bytes);

  const std::string path_;
  void* map_;
  const size_t bytes_;
  SafetensorsHeader header_;
};

struct SafetensorsOutput {
  std::string name;
  std::vector<int64_t> shape;
  // Fills its elements; called once, in the order of the file.
  std::function<absl::Status(std::span<float>)> fill;
};

// Writes one file, atomically (atomic_file.h), all tensors as `dtype` (kF32, or kBF16 rounded to
// nearest even), in the given order. Memory: the header and the largest tensor. INVALID_ARGUMENT
// for a duplicate name; errors of `fill` and of AtomicFile.
absl::Status WriteSafetensors(const std::string& path, std::span<const SafetensorsOutput> tensors,
                              DType dtype);

}  // namespace memory3
