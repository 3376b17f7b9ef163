#include "transformer/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "memory/little_endian.h"
#include "nlohmann/json.hpp"
#include "transformer/atomic_file.h"
#include "transformer/bf16.h"
#include "transformer/f16.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using nlohmann::json;

// As the reference implementation.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxDimensions = 8;

// Bits of an element; 0: no such type.
int BitsOf(std::string_view dtype) {
  static constexpr std::pair<std::string_view, int> kTypes[] = {
      {"BOOL", 8}, {"U8", 8},   {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
      {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16},   {"I32", 32},    {"U32", 32},
      {"F32", 32}, {"C64", 64}, {"F64", 64}, {"I64", 64},    {"U64", 64}};
  for (const auto& [name, bits] : kTypes) {
    if (name == dtype) return bits;
  }
  return 0;
}

bool ToUnsigned(const json& value, uint64_t* out) {
  if (!value.is_number_unsigned()) return false;
  *out = value.get<uint64_t>();
  return true;
}

std::string Printable(std::string_view name) {
  const std::string text =
      json(std::string(name)).dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 200 ? text : text.substr(0, 200) + "...";
}

class HeaderReader {
 public:
  HeaderReader(std::string_view file, std::string_view source) : file_(file), source_(source) {}

  absl::StatusOr<SafetensorsHeader> Read() {
    if (file_.size() < 8) return Damaged("shorter than the 8 bytes of the header's length");
    const auto length = LoadLittleEndian<uint64_t>(file_.data());
    if (length > kMaxHeaderBytes) {
      return Invalid(absl::StrCat("header length ", length, " is above ", kMaxHeaderBytes));
    }
    if (length > file_.size() - 8) {
      return Damaged(absl::StrCat("header length ", length, ", the file has ", file_.size(),
                                  " bytes: truncated"));
    }
    auto object = ParseJson(file_.substr(8, length), source_ + ": header");
    if (!object.ok()) return object.status();
    if (!object->is_object()) return Invalid("header is no JSON object");
    header_.data_begin = 8 + length;
    for (const auto& [name, value] : object->items()) {
      const absl::Status status =
          name == "__metadata__" ? ReadMetadata(value) : ReadEntry(name, value);
      if (!status.ok()) return status;
    }
    if (auto status = CheckLayout(); !status.ok()) return status;
    return std::move(header_);
  }

 private:
  absl::Status Invalid(std::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(source_, ": ", std::string(what)));
  }
  absl::Status Damaged(std::string_view what) const {
    return absl::DataLossError(absl::StrCat(source_, ": ", std::string(what)));
  }
  absl::Status BadEntry(const std::string& name, const char* field, const std::string& what) const {
    return Invalid(absl::StrCat("tensor ", Printable(name), ": ", field, ": ", what));
  }

  absl::Status ReadMetadata(const json& value) {
    if (!value.is_object()) return Invalid("__metadata__ is no object");
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string())
        return Invalid(absl::StrCat("__metadata__ ", Printable(key), " is no string"));
      header_.metadata.emplace(key, text.get<std::string>());
    }
    return absl::OkStatus();
  }

  absl::Status ReadEntry(const std::string& name, const json& value) {
    if (!value.is_object()) return Invalid(absl::StrCat("tensor ", Printable(name), ": no object"));
    SafetensorsEntry entry;
    int bits = 0;
    uint64_t elements = 1;
    for (const auto& [key, field] : value.items()) {
      if (key == "dtype") {
        if (!field.is_string()) return BadEntry(name, "dtype", "no string");
        entry.dtype = field.get<std::string>();
        bits = BitsOf(entry.dtype);
        if (bits == 0) return BadEntry(name, "dtype", Printable(entry.dtype) + " is unknown");
      } else if (key == "shape") {
        if (!field.is_array() || field.size() > kMaxDimensions) {
          return BadEntry(name, "shape",
                          absl::StrCat("no list of at most ", kMaxDimensions, " numbers"));
        }
        for (const json& d : field) {
          uint64_t dimension = 0;
          if (!ToUnsigned(d, &dimension)) return BadEntry(name, "shape", "no list of numbers >= 0");
          // Whatever fits a file fits 2^60, and sizes in bytes stay below 2^64.
          constexpr uint64_t kMax = uint64_t{1} << 57;
          if (dimension > kMax || (dimension != 0 && elements > kMax / dimension)) {
            return BadEntry(name, "shape", "too large");
          }
          elements *= dimension;
          entry.shape.push_back(static_cast<int64_t>(dimension));
        }
      } else if (key == "data_offsets") {
        if (!field.is_array() || field.size() != 2 || !ToUnsigned(field[0], &entry.begin) ||
            !ToUnsigned(field[1], &entry.end)) {
          return BadEntry(name, "data_offsets", "no pair of numbers >= 0");
        }
      } else {
        return Invalid(
            absl::StrCat("tensor ", Printable(name), ": unknown field ", Printable(key)));
      }
    }
    for (const char* field : {"dtype", "shape", "data_offsets"}) {
      if (!value.contains(field)) return BadEntry(name, field, "missing");
    }
    if (entry.begin > entry.end) return BadEntry(name, "data_offsets", "end before begin");
    const uint64_t size = elements * (bits / 8);
    if (entry.end - entry.begin != size) {
      return BadEntry(name, "data_offsets",
                      absl::StrCat(entry.end - entry.begin, " bytes, ", entry.dtype, " [",
                                   absl::StrJoin(entry.shape, ", "), "] takes ", size));
    }
    header_.tensors.emplace(name, std::move(entry));
    return absl::OkStatus();
  }

  // Tensors fill the data from its first to its last byte, one after the other.
  absl::Status CheckLayout() const {
    std::vector<std::pair<const std::string*, const SafetensorsEntry*>> order;
    for (const auto& [name, entry] : header_.tensors) order.emplace_back(&name, &entry);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
    });
    const uint64_t data = file_.size() - header_.data_begin;
    uint64_t at = 0;
    for (const auto& [name, entry] : order) {
      if (entry->begin != at) {
        return BadEntry(
            *name, "data_offsets",
            absl::StrCat("begin ", entry->begin,
                         entry->begin < at ? " overlaps the tensor before it, which ends at "
                                           : " leaves a gap after ",
                         at));
      }
      if (entry->end > data) {
        return Damaged(absl::StrCat("tensor ", Printable(*name), ": data_offsets: end ", entry->end,
                                    ", the file holds ", data, " bytes of data: truncated"));
      }
      at = entry->end;
    }
    if (at != data) {
      return Damaged(absl::StrCat(data - at, " bytes past the last tensor"));
    }
    return absl::OkStatus();
  }

  const std::string_view file_;
  const std::string source_;
  SafetensorsHeader header_;
};

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view file,
                                                         std::string_view source) {
  return HeaderReader(file, source).Read();
}

SafetensorsFile::SafetensorsFile(std::string path, void* map, size_t bytes)
    : path_(std::move(path)), map_(map), bytes_(bytes) {}

SafetensorsFile::~SafetensorsFile() {
  if (map_ != nullptr) ::munmap(map_, bytes_);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    const std::string message = absl::StrCat(path, ": ", std::strerror(errno));
    return errno == ENOENT ? absl::NotFoundError(message) : absl::UnavailableError(message);
  }
  struct stat info {};
  void* map = nullptr;
  absl::Status status;
  if (::fstat(fd, &info) != 0) {
    status = absl::UnavailableError(absl::StrCat(path, ": ", std::strerror(errno)));
  } else if (!S_ISREG(info.st_mode)) {
    status = absl::InvalidArgumentError(absl::StrCat(path, ": not a file"));
  } else if (info.st_size > 0) {
    map = ::mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
      map = nullptr;
      status = absl::UnavailableError(absl::StrCat(path, ": mmap: ", std::strerror(errno)));
    }
  }
  ::close(fd);
  if (!status.ok()) return status;
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile(path, map, info.st_size));
  auto header = ParseSafetensorsHeader({static_cast<const char*>(map), file->bytes_}, path);
  if (!header.ok()) return header.status();
  file->header_ = *std::move(header);
  return file;
}

std::string_view SafetensorsFile::Bytes(const SafetensorsEntry& entry) const {
  return {static_cast<const char*>(map_) + header_.data_begin + entry.begin,
          static_cast<size_t>(entry.end - entry.begin)};
}

absl::Status SafetensorsFile::ReadFloats(std::string_view name, std::span<float> out) const {
  const auto it = header_.tensors.find(name);
  if (it == header_.tensors.end()) {
    return absl::NotFoundError(absl::StrCat(path_, ": no tensor ", Printable(name)));
  }
  const SafetensorsEntry& entry = it->second;
  if (entry.elements() != static_cast<int64_t>(out.size())) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": tensor ", Printable(name), ": shape [",
                                                   absl::StrJoin(entry.shape, ", "), "], ",
                                                   out.size(), " elements wanted"));
  }
  const char* from = Bytes(entry).data();
  if (entry.dtype == "F32") {
    if (!out.empty()) std::memcpy(out.data(), from, out.size_bytes());
  } else if (entry.dtype == "BF16") {
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = Bf16ToFloat(LoadLittleEndian<uint16_t>(from + 2 * i));
    }
  } else if (entry.dtype == "F16") {
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = F16ToFloat(LoadLittleEndian<uint16_t>(from + 2 * i));
    }
  } else {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": tensor ", Printable(name), ": dtype ",
                                                   entry.dtype,
                                                   "; F32, BF16 and F16 are supported"));
  }
  return absl::OkStatus();
}

void SafetensorsFile::Forget(const SafetensorsEntry& entry) const {
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t begin = (header_.data_begin + entry.begin + page - 1) / page * page;
  const uint64_t end = (header_.data_begin + entry.end) / page * page;
  // A failure costs memory only.
  if (begin < end) (void)::madvise(static_cast<char*>(map_) + begin, end - begin, MADV_DONTNEED);
}

absl::Status WriteSafetensors(const std::string& path, std::span<const SafetensorsOutput> tensors,
                              DType dtype) {
  if (dtype != DType::kF32 && dtype != DType::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": only F32 and BF16 are written"));
  }
  // transformers refuses a file whose metadata lacks the format.
  nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
  uint64_t at = 0;
  for (const SafetensorsOutput& tensor : tensors) {
    uint64_t elements = 1;
    for (int64_t d : tensor.shape) elements *= d;
    const uint64_t bytes = elements * SizeOf(dtype);
    if (header.contains(tensor.name)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", Printable(tensor.name), " given twice"));
    }
    header[tensor.name] = {{"dtype", dtype == DType::kF32 ? "F32" : "BF16"},
                           {"shape", tensor.shape},
                           {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts aligned
  char length[8];
  StoreLittleEndian(length, uint64_t{text.size()});

  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  absl::Status status = (*file)->Append({length, sizeof(length)});
  status.Update((*file)->Append(text));
  std::vector<float> values;
  std::vector<uint16_t> halves;
  for (const SafetensorsOutput& tensor : tensors) {
    if (!status.ok()) return status;
    uint64_t elements = 1;
    for (int64_t d : tensor.shape) elements *= d;
    values.assign(elements, 0);
    if (status = tensor.fill(values); !status.ok()) return status;
    if (dtype == DType::kF32) {
      status = (*file)->Append({reinterpret_cast<const char*>(values.data()), values.size() * 4});
      continue;
    }
    halves.resize(elements);
    std::transform(values.begin(), values.end(), halves.begin(), FloatToBf16);
    status = (*file)->Append({reinterpret_cast<const char*>(halves.data()), halves.size() * 2});
  }
  if (!status.ok()) return status;
  return (*file)->Commit();
}

}  // namespace memory3
