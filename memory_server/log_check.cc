#include "memory_server/log_check.h"

#include <rocksdb/env.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "memory/hash.h"
#include "memory_server/database.h"
#include "memory_server/message.h"

namespace memory3 {
namespace {

constexpr size_t kBlock = 32768;
constexpr size_t kHeader = 7;

uint32_t Little(std::string_view bytes) {
  uint32_t v = 0;
  for (size_t i = bytes.size(); i-- > 0;) v = v << 8 | static_cast<uint8_t>(bytes[i]);
  return v;
}

// RocksDB masks checksums, so that a checksum of bytes that hold checksums stays a good one.
uint32_t Unmasked(uint32_t masked) {
  const uint32_t rotated = masked - 0xa282ead8u;
  return rotated >> 17 | rotated << 15;
}

// Whether the record at the front of `bytes` is sound if its payload has `length` bytes.
bool Sound(std::string_view bytes, size_t length) {
  return kHeader + length <= bytes.size() &&
         Crc32c(bytes.substr(6, 1 + length)) == Unmasked(Little(bytes.substr(0, 4)));
}

bool AllZero(std::string_view bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; });
}

struct Checked {
  std::optional<size_t> damaged_at;
  bool zeros = false;  // from some point to the block's end
};

Checked CheckBlock(std::string_view block) {
  size_t at = 0;
  while (at + kHeader <= block.size()) {
    const std::string_view rest = block.substr(at);
    const size_t length = Little(rest.substr(4, 2));
    if (length == 0 && rest[6] == 0) {  // never written
      if (!AllZero(rest)) return {at, false};
      return {std::nullopt, true};
    }
    if (at + kHeader + length > kBlock) return {at, false};
    if (kHeader + length > rest.size()) {
      // The file ends within the record, unless its length is not what was written: then the
      // record is sound with another.
      for (int bit = 0; bit < 16; ++bit) {
        if (Sound(rest, length ^ (size_t{1} << bit))) return {at, false};
      }
      return {};
    }
    if (!Sound(rest, length)) return {at, false};
    at += kHeader + length;
  }
  return {};  // fewer bytes than a header's: a block's padding or a torn header
}

}  // namespace

absl::Status CheckLog(rocksdb::Env* env, const std::string& path) {
  std::unique_ptr<rocksdb::SequentialFile> file;
  rocksdb::Status s = env->NewSequentialFile(path, &file, rocksdb::EnvOptions());
  if (!s.ok()) return FromRocksDb(s, Message("opening ", path));
  std::vector<char> buffer(kBlock);
  bool zeros = false;
  for (uint64_t offset = 0;; offset += kBlock) {
    std::string block;
    while (block.size() < kBlock) {  // a read may give less than there is
      rocksdb::Slice read;
      s = file->Read(kBlock - block.size(), &read, buffer.data());
      if (!s.ok()) return FromRocksDb(s, Message("reading ", path));
      if (read.empty()) break;
      block.append(read.data(), read.size());
    }
    if (block.empty()) return absl::OkStatus();
    Checked checked;
    if (!zeros) {
      checked = CheckBlock(block);
    } else if (!AllZero(block)) {
      checked.damaged_at = 0;
    }
    if (checked.damaged_at) {
      return absl::DataLossError(Message(path, ": damaged at byte ", offset + *checked.damaged_at,
                                         "; what was acknowledged after it would be lost"));
    }
    zeros |= checked.zeros;
    if (block.size() < kBlock) return absl::OkStatus();
  }
}

absl::Status CheckLogs(rocksdb::Env* env, const std::string& directory) {
  std::vector<std::string> logs;
  std::string current;
  if (rocksdb::ReadFileToString(env, directory + "/CURRENT", &current).ok()) {
    logs.push_back(current.substr(0, current.find('\n')));
  }
  std::vector<std::string> files;
  if (env->GetChildren(directory, &files).ok()) {
    std::copy_if(files.begin(), files.end(), std::back_inserter(logs),
                 [](const std::string& name) { return name.ends_with(".log"); });
  }
  for (const std::string& name : logs) {
    // A file that is not there is for RocksDB to judge.
    const std::string path = Message(directory, "/", name);
    if (!env->FileExists(path).ok()) continue;
    if (absl::Status s = CheckLog(env, path); !s.ok()) return s;
  }
  return absl::OkStatus();
}

}  // namespace memory3
