// The files of a snapshot: a manifest with the SHA-256 of every one, their copying, and the small
// files the store's directory is steered by. docs/store.md has the manifest.
//
// Thread-safety: functions; a directory from one thread at a time.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "memory_server/memory_store.h"

namespace memory3 {

// Whole, synced, and in place by one rename. NOT_FOUND from the reader when there is none.
absl::Status WriteSmallFile(const std::string& path, std::string_view text);
absl::StatusOr<std::string> ReadSmallFile(const std::string& path);
// Renames and syncs both parent directories.
absl::Status RenameDurably(const std::string& from, const std::string& to);

// Hashes all files below `directory` and writes MANIFEST.json there.
absl::StatusOr<SnapshotInfo> WriteManifest(const std::string& directory, std::string_view name,
                                           absl::Time created_at);
// `files`, if given: path below `directory` → SHA-256 and size. DATA_LOSS names what is wrong.
struct ManifestFile {
  uint64_t bytes = 0;
  Hash256 sha256;
};
absl::StatusOr<SnapshotInfo> ReadManifest(const std::string& directory,
                                          std::map<std::string, ManifestFile>* files);
// Every file of the manifest is there, whole and unchanged, and no other. DATA_LOSS names the file.
absl::Status VerifySnapshot(const std::string& directory, std::string_view name);
// db/ and index/ from a snapshot into a new directory. Files that never change are linked where the
// file system can.
absl::Status CopySnapshot(const std::string& from, const std::string& to);

// `root`/`relative`, where no symbolic link on the way leads out of `root`. INVALID_ARGUMENT.
absl::StatusOr<std::string> ResolveBelow(const std::string& root, std::string_view relative);

}  // namespace memory3
