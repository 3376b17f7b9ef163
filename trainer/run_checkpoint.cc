#include "trainer/run_checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "memory/hash.h"
#include "memory/little_endian.h"
#include "transformer/atomic_file.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kMagic[] = "m3train";  // 8 bytes with the zero
constexpr uint32_t kVersion = 1;
constexpr uint64_t kLongestAbout = 1 << 20;
constexpr size_t kHeaderBytes = 32;
constexpr size_t kPiece = size_t{1} << 22;  // bytes

// magic 8, version u32, zero u32, about_bytes u64, parameters u64
std::string Header(uint64_t about_bytes, uint64_t parameters) {
  std::string header(kHeaderBytes, '\0');
  std::memcpy(header.data(), kMagic, 8);
  StoreLittleEndian(header.data() + 8, kVersion);
  StoreLittleEndian(header.data() + 16, about_bytes);
  StoreLittleEndian(header.data() + 24, parameters);
  return header;
}

// Reads and checks the file; `use` gets the three arrays' bytes piece by piece.
absl::StatusOr<json> Read(const std::string& path, int64_t expected_parameters,
                          const std::function<void(uint64_t, std::string_view)>& use) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  const auto bad = [&](const char* what) {
    return absl::DataLossError(
        absl::StrCat(path, ": checkpoint: ", what, "; delete it to go on from the one before"));
  };
  std::string header(kHeaderBytes, '\0');
  if (!file.read(header.data(), kHeaderBytes)) return bad("too short");
  if (std::memcmp(header.data(), kMagic, 8) != 0) return bad("wrong magic");
  const uint32_t version = LoadLittleEndian<uint32_t>(header.data() + 8);
  if (version != kVersion) {
    return absl::UnimplementedError(absl::StrCat(path, ": checkpoint of version ", version));
  }
  const uint64_t about_bytes = LoadLittleEndian<uint64_t>(header.data() + 16);
  const uint64_t parameters = LoadLittleEndian<uint64_t>(header.data() + 24);
  std::error_code error;
  const uint64_t size = fs::file_size(path, error);
  if (about_bytes > kLongestAbout || parameters > size / 12 ||
      size != kHeaderBytes + about_bytes + 12 * parameters + 4) {
    return bad("wrong length");
  }
  if (expected_parameters >= 0 && parameters != static_cast<uint64_t>(expected_parameters)) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": has ", parameters, " parameters, the model ", expected_parameters));
  }
  std::string about(about_bytes, '\0');
  file.read(about.data(), static_cast<std::streamsize>(about_bytes));
  uint32_t crc = Crc32c(about, Crc32c(header));
  std::string piece;
  for (uint64_t at = 0; at < 12 * parameters; at += piece.size()) {
    piece.resize(std::min<uint64_t>(kPiece, 12 * parameters - at));
    if (!file.read(piece.data(), static_cast<std::streamsize>(piece.size()))) {
      return bad("cannot be read");
    }
    crc = Crc32c(piece, crc);
    if (use) use(at, piece);
  }
  char stored[4];
  if (!file.read(stored, 4) || LoadLittleEndian<uint32_t>(stored) != crc) return bad("wrong CRC");
  json parsed = json::parse(about, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object()) return bad("its description is no JSON object");
  return parsed;
}

}  // namespace

absl::Status SaveRunCheckpoint(const std::string& path, const json& about,
                               const Parameters& parameters, const Buffer& m, const Buffer& v) {
  absl::StatusOr<std::unique_ptr<AtomicFile>> file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  uint32_t crc = 0;
  const auto append = [&](std::string_view data) {
    crc = Crc32c(data, crc);
    return (*file)->Append(data);
  };
  const std::string text = about.dump();
  absl::Status status = append(Header(text.size(), parameters.size()));
  if (status.ok()) status = append(text);
  std::vector<char> host;
  const size_t bytes = parameters.size() * sizeof(float);
  for (const float* array :
       {static_cast<const float*>(parameters.values()), static_cast<const float*>(m.as<float>()),
        static_cast<const float*>(v.as<float>())}) {
    for (size_t at = 0; status.ok() && at < bytes; at += host.size()) {
      host.resize(std::min(kPiece, bytes - at));
      status = parameters.device().Download(host.data(), reinterpret_cast<const char*>(array) + at,
                                            host.size());
      if (status.ok()) status = append({host.data(), host.size()});
    }
  }
  char end[4];
  StoreLittleEndian(end, crc);
  if (status.ok()) status = (*file)->Append({end, 4});
  return status.ok() ? (*file)->Commit() : status;
}

absl::StatusOr<json> ReadRunCheckpointAbout(const std::string& path) {
  return Read(path, -1, nullptr);
}

absl::Status LoadRunCheckpoint(const std::string& path, Parameters* parameters, Buffer* m,
                               Buffer* v) {
  const uint64_t bytes = parameters->size() * sizeof(float);
  // The parameters go through Load, which refreshes the bf16 copy too.
  std::vector<float> values(parameters->size()), m_host, v_host;
  if (m != nullptr) m_host.resize(values.size());
  if (v != nullptr) v_host.resize(values.size());
  char* const to[] = {reinterpret_cast<char*>(values.data()),
                      reinterpret_cast<char*>(m_host.data()),
                      reinterpret_cast<char*>(v_host.data())};
  const absl::StatusOr<json> about =
      Read(path, parameters->size(), [&](uint64_t at, std::string_view piece) {
        while (!piece.empty()) {  // a piece may lie across two arrays
          char* const array = to[at / bytes];
          const size_t n = std::min<uint64_t>(piece.size(), bytes - at % bytes);
          if (array != nullptr) std::memcpy(array + at % bytes, piece.data(), n);
          piece.remove_prefix(n);
          at += n;
        }
      });
  if (!about.ok()) return about.status();
  class Values : public TensorSource {
   public:
    Values(const Parameters& parameters, const std::vector<float>& values)
        : parameters_(parameters), values_(values) {}
    absl::Status Read(std::string_view name, int64_t /*rows*/, int64_t /*cols*/,
                      std::span<float> out) const override {
      for (const Parameter& p : parameters_.list()) {
        if (p.name == name) {
          std::copy_n(values_.begin() + p.offset, out.size(), out.begin());
          return absl::OkStatus();
        }
      }
      return absl::NotFoundError(std::string(name));
    }

   private:
    const Parameters& parameters_;
    const std::vector<float>& values_;
  };
  if (absl::Status status = parameters->Load(Values(*parameters, values)); !status.ok()) {
    return status;
  }
  if (m != nullptr) parameters->device().Upload(m->data(), m_host.data(), bytes);
  if (v != nullptr) parameters->device().Upload(v->data(), v_host.data(), bytes);
  return parameters->device().Synchronize();
}

std::vector<std::pair<int64_t, std::string>> ListRunCheckpoints(const std::string& directory) {
  std::vector<std::pair<int64_t, std::string>> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    int64_t step = 0;
    if (name.starts_with("checkpoint-") && name.ends_with(".m3c") &&
        absl::SimpleAtoi(name.substr(11, name.size() - 15), &step)) {
      found.emplace_back(step, entry.path().string());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::string RunCheckpointPath(const std::string& directory, int64_t step) {
  return (fs::path(directory) / absl::StrFormat("checkpoint-%08d.m3c", step)).string();
}

void PruneRunCheckpoints(const std::string& directory, int keep) {
  std::error_code error;
  const auto found = ListRunCheckpoints(directory);
  for (int i = 0; i + keep < static_cast<int>(found.size()); ++i) {
    fs::remove(found[i].second, error);
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    if (entry.path().filename().string().find(".m3c.tmp-") != std::string::npos) {
      fs::remove(entry.path(), error);
    }
  }
}

}  // namespace memory3
