#include "memory_server/snapshot_files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "memory_server/message.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "MANIFEST.json";

absl::Status Failed(std::string_view doing, const std::string& path, int code) {
  std::string message = Message(doing, " ", path, ": ", std::strerror(code));
  if (code == ENOSPC || code == EDQUOT) return absl::ResourceExhaustedError(message);
  if (code == ENOENT) return absl::NotFoundError(message);
  return absl::UnavailableError(message);
}

absl::Status SyncPath(const std::string& path, int flags) {
  int fd = ::open(path.c_str(), flags | O_CLOEXEC);
  if (fd < 0) return Failed("opening", path, errno);
  absl::Status status = ::fsync(fd) == 0 ? absl::OkStatus() : Failed("syncing", path, errno);
  ::close(fd);
  return status;
}

absl::Status HashFile(const std::string& path, ManifestFile* out) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return Failed("opening", path, errno);
  Sha256 sha;
  std::vector<char> buffer(size_t{1} << 20);
  out->bytes = 0;
  while (in) {
    in.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    sha.Update({buffer.data(), static_cast<size_t>(in.gcount())});
    out->bytes += static_cast<uint64_t>(in.gcount());
  }
  if (in.bad()) return Failed("reading", path, EIO);
  out->sha256 = sha.Finish();
  return absl::OkStatus();
}

std::vector<std::string> FilesBelow(const std::string& directory, std::error_code* error) {
  std::vector<std::string> files;
  for (auto it = fs::recursive_directory_iterator(directory, *error);
       !*error && it != fs::recursive_directory_iterator(); it.increment(*error)) {
    if (it->is_directory()) continue;
    std::string path = fs::path(it->path()).lexically_relative(directory);
    if (path != kManifest) files.push_back(path);
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

absl::Status WriteSmallFile(const std::string& path, std::string_view text) {
  const std::string temporary = path + ".tmp";
  {
    std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    out.close();
    if (!out) return Failed("writing", temporary, errno);
  }
  if (absl::Status s = SyncPath(temporary, O_RDONLY); !s.ok()) return s;
  return RenameDurably(temporary, path);
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return Failed("opening", path, errno);
  std::stringstream text;
  text << in.rdbuf();
  if (in.bad()) return Failed("reading", path, EIO);
  return text.str();
}

absl::Status RenameDurably(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) return Failed("renaming to", to, errno);
  return SyncPath(fs::path(to).parent_path(), O_RDONLY | O_DIRECTORY);
}

absl::StatusOr<SnapshotInfo> WriteManifest(const std::string& directory, std::string_view name,
                                           absl::Time created_at) {
  SnapshotInfo info;
  info.name = name;
  info.created_at = absl::FromUnixMicros(absl::ToUnixMicros(created_at));
  nlohmann::json files = nlohmann::json::object();
  std::error_code error;
  for (const std::string& path : FilesBelow(directory, &error)) {
    ManifestFile file;
    const std::string full = Message(directory, "/", path);
    if (absl::Status s = SyncPath(full, O_RDONLY); !s.ok()) return s;
    if (absl::Status s = HashFile(full, &file); !s.ok()) return s;
    files[path] = {{"bytes", file.bytes}, {"sha256", file.sha256.ToHex()}};
    info.bytes += file.bytes;
  }
  if (error) return absl::UnavailableError(Message("listing ", directory, ": ", error.message()));
  nlohmann::json manifest = {{"format", "memory3 snapshot"},
                             {"version", 1},
                             {"name", info.name},
                             {"created_at_us", absl::ToUnixMicros(info.created_at)},
                             {"files", files}};
  const std::string text = manifest.dump(1) + "\n";
  info.manifest_sha256 = Sha256Of(text);
  if (absl::Status s = WriteSmallFile(Message(directory, "/", kManifest), text); !s.ok()) return s;
  for (const char* sub : {"/db", "/index"}) {
    if (absl::Status s = SyncPath(directory + sub, O_RDONLY | O_DIRECTORY); !s.ok()) return s;
  }
  return info;
}

absl::StatusOr<SnapshotInfo> ReadManifest(const std::string& directory,
                                          std::map<std::string, ManifestFile>* files) {
  absl::StatusOr<std::string> text = ReadSmallFile(Message(directory, "/", kManifest));
  if (!text.ok()) return absl::DataLossError(text.status().message());
  auto bad = [&](const char* what) {
    return absl::DataLossError(Message(directory, "/", kManifest, ": ", what));
  };
  nlohmann::json m = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!m.is_object() || m.value("format", nlohmann::json()) != "memory3 snapshot" ||
      m.value("version", nlohmann::json()) != 1) {
    return bad("not a manifest of version 1");
  }
  const nlohmann::json& name = m["name"];
  const nlohmann::json& created = m["created_at_us"];
  const nlohmann::json& list = m["files"];
  if (!name.is_string() || !created.is_number_integer() || !list.is_object()) {
    return bad("fields are missing");
  }
  SnapshotInfo info;
  info.name = name.get<std::string>();
  info.created_at = absl::FromUnixMicros(created.get<int64_t>());
  info.manifest_sha256 = Sha256Of(*text);
  for (const auto& [path, file] : list.items()) {
    if (!file.is_object() || !file.contains("bytes") || !file["bytes"].is_number_unsigned() ||
        !file.contains("sha256") || !file["sha256"].is_string()) {
      return bad("a file's fields are missing");
    }
    absl::StatusOr<Hash256> hash = Hash256::FromHex(file["sha256"].get<std::string>());
    if (!hash.ok()) return bad("a malformed sha256");
    ManifestFile f{file["bytes"].get<uint64_t>(), *hash};
    info.bytes += f.bytes;
    if (files != nullptr) (*files)[path] = f;
  }
  return info;
}

absl::Status VerifySnapshot(const std::string& directory, std::string_view name) {
  std::map<std::string, ManifestFile> files;
  absl::StatusOr<SnapshotInfo> info = ReadManifest(directory, &files);
  if (!info.ok()) return info.status();
  if (info->name != name) {
    return absl::DataLossError(Message("snapshot \"", name, "\" says it is \"", info->name, "\""));
  }
  for (const auto& [path, wanted] : files) {
    ManifestFile found;
    absl::Status s = HashFile(Message(directory, "/", path), &found);
    if (!s.ok()) return absl::DataLossError(Message("snapshot \"", name, "\": ", s.message()));
    if (found.bytes != wanted.bytes || found.sha256 != wanted.sha256) {
      return absl::DataLossError(
          Message("snapshot \"", name, "\": ", path, " is not what the manifest says (SHA-256)"));
    }
  }
  std::error_code error;
  for (const std::string& path : FilesBelow(directory, &error)) {
    if (files.count(path) == 0) {
      return absl::DataLossError(
          Message("snapshot \"", name, "\": ", path, " is not in the manifest"));
    }
  }
  return absl::OkStatus();
}

absl::Status CopySnapshot(const std::string& from, const std::string& to) {
  std::error_code error;
  for (const char* sub : {"/db", "/index"}) {
    fs::create_directories(to + sub, error);
    if (error) return absl::UnavailableError(Message("making ", to, ": ", error.message()));
  }
  for (const std::string& path : FilesBelow(from, &error)) {
    const std::string source = Message(from, "/", path), target = Message(to, "/", path);
    const std::string kind = fs::path(path).extension();
    if (kind == ".sst" || kind == ".blob" || kind == ".idx") {
      fs::create_hard_link(source, target, error);
      if (!error) continue;
    }
    fs::copy_file(source, target, error);
    if (error) return Failed("copying to", target, error.value());
    if (absl::Status s = SyncPath(target, O_RDONLY); !s.ok()) return s;
  }
  if (error) return absl::UnavailableError(Message("listing ", from, ": ", error.message()));
  for (const char* sub : {"/db", "/index", ""}) {
    if (absl::Status s = SyncPath(to + sub, O_RDONLY | O_DIRECTORY); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ResolveBelow(const std::string& root, std::string_view relative) {
  std::error_code error;
  fs::create_directories(root, error);
  fs::path base = fs::canonical(root, error);
  if (error) {
    return absl::UnavailableError(Message("the backup root ", root, ": ", error.message()));
  }
  fs::path full = fs::weakly_canonical(base / std::string(relative), error);
  auto [end, unused] = std::mismatch(base.begin(), base.end(), full.begin(), full.end());
  if (error || end != base.end() || full == base) {
    return absl::InvalidArgumentError(
        Message("directory \"", relative, "\" leads out of the backup root"));
  }
  return full.string();
}

}  // namespace memory3
