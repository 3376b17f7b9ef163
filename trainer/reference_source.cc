#include "trainer/reference_source.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "trainer/references.h"

namespace memory3 {
namespace {

constexpr int64_t kQueueBytes = int64_t{16} << 20;
constexpr int64_t kBytesAtOnce = int64_t{1} << 20;  // of text that is cut side by side
constexpr size_t kDocumentsAtOnce = 256;
constexpr size_t kMaxWarnings = 20;
// What the store takes (memory.proto).
constexpr size_t kMaxDocumentId = 512, kMaxTitle = 4096, kMaxUri = 8192;
constexpr size_t kMaxMetadataPairs = 64, kMaxMetadataKey = 256, kMaxMetadataValue = 4096;
// Of records remembered, 200 MiB; what repeats later is written again and shared by the store.
constexpr size_t kMostRecordsSeen = size_t{1} << 23;

int64_t CodePoints(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

}  // namespace

ShortHash ShortHash::Of(const Hash256& hash) {
  ShortHash s;
  std::memcpy(&s, hash.bytes.data(), sizeof s);
  return s;
}

void ParallelFor(int64_t n, int threads, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next = 0;
  const auto run = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min<int64_t>(threads, n); ++t) others.emplace_back(run);
  run();
  for (std::thread& other : others) other.join();
}

absl::StatusOr<std::unique_ptr<ReferenceSource>> ReferenceSource::Open(
    const Tokenizer* tokenizer, ReferenceSourceOptions options) {
  absl::StatusOr<std::unique_ptr<DocumentReader>> reader =
      DocumentReader::Open(options.inputs, options.documents);
  if (!reader.ok()) return reader.status();
  std::unique_ptr<ReferenceSource> source(
      new ReferenceSource(tokenizer, std::move(options), *std::move(reader)));
  source->thread_ = std::thread([s = source.get()] { s->Run(); });
  return source;
}

ReferenceSource::ReferenceSource(const Tokenizer* tokenizer, ReferenceSourceOptions options,
                                 std::unique_ptr<DocumentReader> reader)
    : tokenizer_(tokenizer),
      options_(std::move(options)),
      reader_(std::move(reader)),
      queue_(kQueueBytes) {
  counts_.bytes_total = reader_->bytes_total();
}

ReferenceSource::~ReferenceSource() {
  queue_.Cancel();
  thread_.join();
}

ReferenceCounts ReferenceSource::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

std::vector<std::string> ReferenceSource::warnings() const {
  const std::lock_guard lock(mutex_);
  return warnings_;
}

void ReferenceSource::Warn(std::string warning) {
  const std::lock_guard lock(mutex_);
  ++counts_.skipped;
  if (warnings_.size() < kMaxWarnings) warnings_.push_back(std::move(warning));
}

void ReferenceSource::Run() {
  const absl::Status status = ReadAll();
  {
    const std::lock_guard lock(mutex_);
    status_ = status;
    counts_.bytes_read = reader_->bytes_consumed();
    counts_.skipped += reader_->skipped();
    for (const std::string& warning : reader_->warnings()) {
      if (warnings_.size() < kMaxWarnings) warnings_.push_back(warning);
    }
  }
  queue_.Close();
}

std::string ReferenceSource::Problem(const Document& document) {
  if (document.id.size() > kMaxDocumentId) {
    return absl::StrCat("its id has ", document.id.size(), " bytes, at most ", kMaxDocumentId,
                        " are taken");
  }
  if (document.title.size() > kMaxTitle) {
    return absl::StrCat("its title has ", document.title.size(), " bytes, at most ", kMaxTitle,
                        " are taken");
  }
  if (document.uri.size() > kMaxUri) {
    return absl::StrCat("its uri has ", document.uri.size(), " bytes, at most ", kMaxUri,
                        " are taken");
  }
  if (document.metadata.size() > kMaxMetadataPairs) {
    return absl::StrCat("it has ", document.metadata.size(), " metadata pairs, at most ",
                        kMaxMetadataPairs, " are taken");
  }
  for (const auto& [key, value] : document.metadata) {
    if (key.empty() || key.size() > kMaxMetadataKey || value.size() > kMaxMetadataValue) {
      return absl::StrCat("its metadata \"", key.substr(0, 40), "\" has a key of ", key.size(),
                          " bytes (1 to ", kMaxMetadataKey, " are taken) and a value of ",
                          value.size(), " (at most ", kMaxMetadataValue, ")");
    }
  }
  if (!documents_seen_.insert(ShortHash::OfText(document.id)).second) {
    return absl::StrCat("another document before it has the id \"", document.id, "\"");
  }
  return "";
}

absl::StatusOr<std::vector<ReferenceSource::Cut>> ReferenceSource::ReadSome() {
  std::vector<Cut> some;
  int64_t bytes = 0;
  while (bytes < kBytesAtOnce && some.size() < kDocumentsAtOnce) {
    Cut cut;
    absl::StatusOr<bool> found = reader_->Next(&cut.document);
    if (!found.ok()) return found.status();
    if (!*found) break;
    const Document& document = cut.document;
    if (const std::string problem = Problem(document); !problem.empty()) {
      const std::string place =
          document.line == 0 ? document.file : absl::StrCat(document.file, ":", document.line);
      if (options_.documents.strict) {
        return absl::InvalidArgumentError(absl::StrCat(place, ": ", problem));
      }
      Warn(absl::StrCat(place, ": ", problem));
      continue;
    }
    if (number_++ % options_.shards != options_.shard) continue;
    bytes += static_cast<int64_t>(document.text.size());
    some.push_back(std::move(cut));
  }
  const std::lock_guard lock(mutex_);
  counts_.bytes_read = reader_->bytes_consumed();
  return some;
}

void ReferenceSource::CutOne(Cut* cut) const {
  const Document& document = cut->document;
  absl::StatusOr<std::vector<CutReference>> references =
      CutReferences(document.title, document.text, *tokenizer_, options_.reference_tokens);
  if (!references.ok()) {
    cut->status = references.status();
    return;
  }
  const auto head = std::make_shared<const DocumentHead>(
      DocumentHead{document.id, document.title, document.uri, document.metadata});
  const std::string_view text = document.text;
  size_t at = 0;
  uint64_t characters = 0;  // of text[0, at)
  cut->items.reserve(references->size());
  for (CutReference& reference : *references) {
    ReferenceItem& item = cut->items.emplace_back();
    item.document = head;
    item.ordinal = static_cast<uint32_t>(cut->items.size() - 1);
    characters += CodePoints(text.substr(at, reference.begin - at));
    item.char_begin = characters;
    characters += CodePoints(text.substr(reference.begin, reference.end - reference.begin));
    item.char_end = characters;
    at = reference.end;
    item.text = std::move(reference.text);
    item.token_ids = std::move(reference.token_ids);
    item.record_id = ComputeRecordId(options_.tenant, options_.writer_fingerprint, options_.codec,
                                     options_.codebook_hash, item.token_ids);
  }
}

absl::Status ReferenceSource::AskStore(std::vector<ReferenceItem*>* items) const {
  std::mutex mutex;
  absl::Status status;
  ParallelFor(static_cast<int64_t>(items->size()), options_.threads, [&](int64_t i) {
    absl::StatusOr<bool> has = options_.store_has((*items)[i]->record_id);
    if (has.ok()) {
      (*items)[i]->has_record = *has;
    } else {
      const std::lock_guard lock(mutex);
      status.Update(has.status());
    }
  });
  return status;
}

absl::Status ReferenceSource::ReadAll() {
  while (true) {
    absl::StatusOr<std::vector<Cut>> some = ReadSome();
    if (!some.ok()) return some.status();
    if (some->empty()) return absl::OkStatus();
    ParallelFor(static_cast<int64_t>(some->size()), options_.threads,
                [&](int64_t i) { CutOne(&(*some)[i]); });
    ReferenceCounts more;
    std::vector<ReferenceItem*> wanted, asked;
    for (Cut& cut : *some) {
      if (!cut.status.ok()) return cut.status;
      ++more.documents;
      const auto loaded = options_.loaded.find(ShortHash::OfText(cut.document.id));
      const uint32_t first = loaded == options_.loaded.end() ? 0 : loaded->second;
      for (ReferenceItem& item : cut.items) {
        ++more.references;
        more.tokens += static_cast<int64_t>(item.token_ids.size());
        if (item.ordinal < first) {
          ++more.loaded;
          continue;
        }
        wanted.push_back(&item);
        const ShortHash record = ShortHash::Of(item.record_id);
        if (options_.deduplicate && records_seen_.contains(record)) {
          item.has_record = true;
          ++more.in_run;
        } else {
          if (records_seen_.size() < kMostRecordsSeen) records_seen_.insert(record);
          asked.push_back(&item);
        }
      }
    }
    if (options_.store_has != nullptr) {
      if (absl::Status status = AskStore(&asked); !status.ok()) return status;
      more.in_store = std::count_if(asked.begin(), asked.end(),
                                    [](const ReferenceItem* item) { return item->has_record; });
    }
    {
      const std::lock_guard lock(mutex_);
      counts_.documents += more.documents;
      counts_.references += more.references;
      counts_.tokens += more.tokens;
      counts_.loaded += more.loaded;
      counts_.in_run += more.in_run;
      counts_.in_store += more.in_store;
    }
    for (ReferenceItem* item : wanted) {
      const auto bytes = static_cast<int64_t>(item->text.size() + item->token_ids.size() * 4 + 256);
      if (!queue_.Push(std::move(*item), bytes)) return absl::CancelledError("nobody reads on");
    }
  }
}

absl::StatusOr<bool> ReferenceSource::Next(int64_t tokens, size_t most,
                                           std::vector<ReferenceItem>* items) {
  items->clear();
  int64_t taken = 0;
  while (items->size() < most) {
    if (!next_) next_ = queue_.Pop();
    if (!next_) {
      if (!items->empty()) return true;
      const std::lock_guard lock(mutex_);
      if (!status_.ok()) return status_;
      return false;
    }
    const auto needed = next_->has_record ? 0 : static_cast<int64_t>(next_->token_ids.size());
    if (!items->empty() && taken + needed > tokens) return true;
    taken += needed;
    items->push_back(*std::move(next_));
    next_.reset();
  }
  return true;
}

}  // namespace memory3
