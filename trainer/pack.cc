#include "trainer/pack.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "memory/little_endian.h"
#include "trainer/random.h"
#include "trainer/token_shard.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
constexpr char kEnding[] = ".m3s";
constexpr size_t kLongestLine = 16384;
constexpr size_t kDocumentsAtOnce = 256;

}  // namespace

absl::StatusOr<HoldOut> ParseHoldOut(const std::string& ids,
                                     const std::vector<std::string>& titles) {
  HoldOut hold_out;
  if (!ids.empty()) {
    const std::vector<std::string> parts = absl::StrSplit(ids, ':');
    int64_t modulus = 0, remainder = 0;
    if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &modulus) ||
        !absl::SimpleAtoi(parts[1], &remainder) || modulus < 1 || remainder < 0 ||
        remainder >= modulus) {
      return absl::InvalidArgumentError(
          absl::StrCat("hold_out_ids: \"", ids, "\" is not MODULUS:REMAINDER, such as 10:3"));
    }
    hold_out = HoldOut(modulus, remainder);
  }
  for (const std::string& path : titles) {
    if (absl::Status status = hold_out.AddTitlesFrom(path); !status.ok()) return status;
  }
  return hold_out;
}

absl::StatusOr<std::vector<std::string>> SampleLines(DocumentReader* reader,
                                                     const HoldOut& hold_out, int64_t sample_bytes,
                                                     const ProgressFunction& progress) {
  // A line stays while its hash is below a threshold that falls whenever too much has gathered.
  std::vector<std::pair<uint64_t, std::string>> kept;
  int64_t bytes = 0;
  uint64_t threshold = UINT64_MAX;
  Document document;
  while (true) {
    absl::StatusOr<bool> found = reader->Next(&document);
    if (!found.ok()) return found.status();
    if (!*found) break;
    if (hold_out.Contains(document)) continue;
    for (const absl::string_view line : absl::StrSplit(document.text, '\n')) {
      if (line.empty() || line.size() > kLongestLine) continue;
      const Hash256 digest = Sha256Of({line.data(), line.size()});
      const uint64_t hash = LoadLittleEndian<uint64_t>(digest.bytes.data());
      if (hash >= threshold) continue;
      kept.emplace_back(hash, std::string(line));
      bytes += static_cast<int64_t>(line.size());
      if (bytes <= 2 * sample_bytes) continue;
      threshold /= 2;
      std::erase_if(kept, [&](const auto& k) { return k.first >= threshold; });
      bytes = 0;
      for (const auto& k : kept) bytes += static_cast<int64_t>(k.second.size());
    }
    if (progress) progress(reader->bytes_consumed(), reader->bytes_total());
  }
  std::sort(kept.begin(), kept.end());
  std::vector<std::string> lines;
  bytes = 0;
  for (auto& [hash, line] : kept) {
    if (bytes >= sample_bytes) break;
    bytes += static_cast<int64_t>(line.size());
    lines.push_back(std::move(line));
  }
  if (lines.empty()) return absl::InvalidArgumentError("the documents hold no line to train on");
  return lines;
}

absl::StatusOr<PackCounts> PackDocuments(DocumentReader* reader, const HoldOut& hold_out,
                                         const Tokenizer& tokenizer, const std::string& directory,
                                         const PackOptions& options,
                                         const ProgressFunction& progress) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return absl::UnavailableError(absl::StrCat(directory, ": ", error.message()));
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    if (entry.path().extension() == kEnding) {
      return absl::AlreadyExistsError(absl::StrCat(entry.path().string(), ": exists already"));
    }
  }
  TokenShardBuilder shard(tokenizer.file_hash(), tokenizer.vocab_size());
  PackCounts counts;
  const auto write = [&] {
    const std::string name = absl::StrFormat("shard-%05d%s", counts.shards++, kEnding);
    return shard.Write((fs::path(directory) / name).string());
  };

  std::vector<Document> batch;
  std::vector<std::vector<int32_t>> ids;
  const auto flush = [&]() -> absl::Status {
    ids.assign(batch.size(), {});
    std::vector<std::thread> threads;
    const int n = std::max(1, options.threads);
    for (int t = 0; t < n; ++t) {
      threads.emplace_back([&, t] {
        for (size_t i = t; i < batch.size(); i += n) {
          const Document& d = batch[i];
          ids[i] = tokenizer.Encode(d.title.empty() ? d.text : d.title + "\n\n" + d.text);
          if (tokenizer.eos_id() >= 0) ids[i].push_back(tokenizer.eos_id());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t i = 0; i < batch.size(); ++i) {
      absl::Status status = shard.Add(batch[i].id, batch[i].title, ids[i]);
      if (!status.ok()) return status;
      counts.documents += 1;
      counts.tokens += static_cast<int64_t>(ids[i].size());
      if (shard.tokens() < options.shard_tokens) continue;
      if (status = write(); !status.ok()) return status;
    }
    batch.clear();
    return absl::OkStatus();
  };

  while (true) {
    Document document;
    absl::StatusOr<bool> found = reader->Next(&document);
    if (!found.ok()) return found.status();
    if (!*found) break;
    const bool held_out = hold_out.Contains(document);
    counts.held_out += held_out;
    if (held_out != options.only_held_out) continue;
    batch.push_back(std::move(document));
    if (batch.size() < kDocumentsAtOnce) continue;
    if (absl::Status status = flush(); !status.ok()) return status;
    if (progress) progress(reader->bytes_consumed(), reader->bytes_total());
  }
  if (absl::Status status = flush(); !status.ok()) return status;
  if (counts.documents == 0) return absl::InvalidArgumentError("no document is left to pack");
  if (shard.tokens() > 0) {
    if (absl::Status status = write(); !status.ok()) return status;
  }
  return counts;
}

absl::StatusOr<std::vector<std::string>> ShardPaths(const std::vector<std::string>& inputs) {
  std::vector<std::string> paths;
  for (const std::string& input : inputs) {
    std::error_code error;
    if (!fs::is_directory(input, error)) {
      paths.push_back(input);
      continue;
    }
    const size_t before = paths.size();
    for (const fs::directory_entry& entry : fs::directory_iterator(input, error)) {
      if (entry.path().extension() == kEnding) paths.push_back(entry.path().string());
    }
    if (paths.size() == before) {
      return absl::NotFoundError(absl::StrCat(input, ": holds no token shard (*.m3s)"));
    }
    std::sort(paths.begin() + static_cast<int64_t>(before), paths.end());
  }
  return paths;
}

}  // namespace memory3
