#include "trainer/memory_writing.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "memory/record.h"
#include "trainer/bounded_queue.h"
#include "trainer/compressed_file.h"
#include "trainer/knowledge_base_setup.h"
#include "trainer/load_upload.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;
using Phase = MemoryWritingProgress::Phase;

constexpr int kCpuRows = 2048, kDeviceRows = 16384;
constexpr size_t kMostItems = 4096;  // of one batch; those whose records are held cost no rows
constexpr int64_t kBatchesWaiting = 2;
constexpr absl::Duration kPoll = absl::Milliseconds(200);

// Repeats a call that is safe to repeat while the server is away.
template <typename F>
auto Patiently(absl::Duration patience, const F& call) -> decltype(call()) {
  const absl::Time give_up = absl::Now() + patience;
  while (true) {
    auto result = call();
    if (result.ok() || !MayPass(result.status()) || absl::Now() + kPoll >= give_up) return result;
    absl::SleepFor(kPoll);
  }
}

absl::Status CheckOptions(const MemoryWritingOptions& o) {
  if (o.shards < 1 || o.shard < 0 || o.shard >= o.shards) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard ", o.shard + 1, " of ", o.shards, " is none"));
  }
  if (o.threads < 1) return absl::InvalidArgumentError("threads: must be at least 1");
  if (o.tenant.empty()) return absl::InvalidArgumentError("tenant: must not be empty");
  return absl::OkStatus();
}

// Of everything that decides what is written, the shard excepted.
absl::StatusOr<std::string> IdempotencyKey(const MemoryWritingOptions& o, const WritingModel& model,
                                           const Embedder& embedder, const Codec& codec) {
  Sha256 key;
  for (const std::string& field :
       {std::string("m3load1"), std::string(model.fingerprint().view()),
        std::string(WeightFormatName(model.format())), std::string(CodecName(codec.id())),
        std::string(codec.codebook_hash().view()), std::string(embedder.fingerprint().view()),
        o.tenant, o.label, std::string(o.replace ? "replace" : "append"), o.documents.text_field,
        o.documents.title_field, o.documents.id_field, o.documents.uri_field,
        o.documents.metadata_field, absl::StrCat(o.documents.max_document_bytes)}) {
    key.UpdateLengthPrefixed(field);
  }
  for (const std::string& path : o.inputs) {
    key.UpdateLengthPrefixed(path);  // documents without an id are named after their file
    std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                         &std::fclose);
    if (file == nullptr) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
    Sha256 content;
    std::vector<char> buffer(size_t{1} << 20);
    while (const size_t n = std::fread(buffer.data(), 1, buffer.size(), file.get())) {
      content.Update({buffer.data(), n});
    }
    if (std::ferror(file.get()) != 0) {
      return absl::UnavailableError(absl::StrCat(path, ": cannot be read to its end"));
    }
    key.UpdateLengthPrefixed(content.Finish().view());
  }
  return key.Finish().ToHex();
}

ReferenceSourceOptions SourceOptions(const MemoryWritingOptions& o, const WritingModel& model,
                                     const Codec& codec) {
  ReferenceSourceOptions s;
  s.inputs = o.inputs;
  s.documents = o.documents;
  s.reference_tokens = model.memory().reference_tokens;
  s.shard = o.shard;
  s.shards = o.shards;
  s.threads = o.threads;
  s.tenant = o.tenant;
  s.writer_fingerprint = model.fingerprint();
  s.codec = codec.id();
  s.codebook_hash = codec.codebook_hash();
  return s;
}

int64_t RecordBytes(const WritingModel& model, const Codec& codec, int tokens) {
  return kRecordHeaderBytes + model.ShapeOf(tokens).vectors() * codec.bytes_per_vector();
}

void Account(const ReferenceItem& item, const WritingModel& model, const Codec& codec,
             const Embedder& embedder, MemoryWritingResult* result) {
  if (!item.has_record) {
    result->record_bytes += RecordBytes(model, codec, static_cast<int>(item.token_ids.size()));
  }
  result->text_bytes += static_cast<int64_t>(item.text.size());
  result->embedding_bytes += int64_t{4} * embedder.dimension();
}

// What one forward pass gave.
struct EncodedBatch {
  std::vector<ReferenceItem> items;
  std::vector<ExplicitMemory> memories;  // of the items without a record, in their order
};

// Memories to entries, to the upload. On a CPU device in the caller's thread, so that the stages do
// not take the cores from each other; else in a thread of its own.
class Compressor {
 public:
  Compressor(const WritingModel& model, const Codec& codec, const Embedder& embedder, int threads,
             LoadUpload* upload)
      : model_(model),
        codec_(codec),
        embedder_(embedder),
        threads_(threads),
        upload_(upload),
        queue_(kBatchesWaiting) {
    if (!model.writer()->model().device().is_cpu()) thread_ = std::thread([this] { Run(); });
  }
  ~Compressor() {
    queue_.Cancel();
    if (thread_.joinable()) thread_.join();
  }

  // False: it has failed, or the upload has; Finish says why.
  bool Add(EncodedBatch batch) {
    if (thread_.joinable()) return queue_.Push(std::move(batch), 1);
    status_ = Compress(batch);
    return status_.ok();
  }
  // CANCELLED: the upload has failed.
  absl::Status Finish() {
    queue_.Close();
    if (thread_.joinable()) thread_.join();
    return status_;
  }

 private:
  void Run() {
    while (std::optional<EncodedBatch> batch = queue_.Pop()) {
      status_ = Compress(*batch);
      if (!status_.ok()) break;
    }
    queue_.Cancel();
  }

  absl::Status Compress(EncodedBatch& batch) {
    const auto n = static_cast<int64_t>(batch.items.size());
    std::vector<std::string_view> texts;
    std::vector<int64_t> encoded;  // items without a record
    for (int64_t i = 0; i < n; ++i) {
      texts.emplace_back(batch.items[i].text);
      if (!batch.items[i].has_record) encoded.push_back(i);
    }
    const int dimension = embedder_.dimension();
    std::vector<float> vectors(n * dimension);
    if (absl::Status s = embedder_.Embed(texts, vectors); !s.ok()) return s;
    std::vector<LoadEntry> entries(n);
    std::vector<absl::Status> failures(encoded.size());
    ParallelFor(static_cast<int64_t>(encoded.size()), threads_, [&](int64_t m) {
      absl::StatusOr<std::string> record =
          EncodeRecord(batch.memories[m], model_.fingerprint(), codec_);
      failures[m] = record.status();
      if (record.ok()) entries[encoded[m]].record = *std::move(record);
    });
    for (size_t m = 0; m < failures.size(); ++m) {
      if (failures[m].ok()) continue;
      const ReferenceItem& item = batch.items[encoded[m]];
      return {failures[m].code(),
              absl::StrCat("document \"", item.document->id, "\", reference ", item.ordinal, ": ",
                           std::string(failures[m].message()))};
    }
    for (int64_t i = 0; i < n; ++i) {
      ReferenceItem& item = batch.items[i];
      v1::Entry& entry = entries[i].entry;
      v1::Source& source = *entry.mutable_source();
      source.set_document_id(item.document->id);
      source.set_ordinal(item.ordinal);
      source.set_title(item.document->title);
      source.set_uri(item.document->uri);
      source.mutable_metadata()->insert(item.document->metadata.begin(),
                                        item.document->metadata.end());
      source.set_char_begin(item.char_begin);
      source.set_char_end(item.char_end);
      source.set_text(std::move(item.text));
      entry.set_record_id(std::string(item.record_id.view()));
      entry.mutable_embedding()->Add(vectors.data() + i * dimension,
                                     vectors.data() + (i + 1) * dimension);
      if (!upload_->Add(std::move(entries[i]))) return absl::CancelledError("the upload has ended");
    }
    return absl::OkStatus();
  }

  const WritingModel& model_;
  const Codec& codec_;
  const Embedder& embedder_;
  const int threads_;
  LoadUpload* const upload_;
  BoundedQueue<EncodedBatch> queue_;
  absl::Status status_;  // of the thread that compresses; read after it has ended
  std::thread thread_;
};

class Writing {
 public:
  Writing(const MemoryWritingOptions& options, const WritingModel& model, const Embedder& embedder,
          MemoryClient* client, const MemoryWritingCallback& progress)
      : options_(options),
        model_(model),
        embedder_(embedder),
        client_(client),
        progress_(progress) {}

  absl::StatusOr<MemoryWritingResult> Run() {
    Tell(Phase::kChecking);
    absl::StatusOr<TargetKnowledgeBase> target =
        OpenOrCreateKnowledgeBase(options_, model_, embedder_, client_);
    if (!target.ok()) return target.status();
    target_ = *std::move(target);
    absl::StatusOr<v1::Load> load = Begin();
    if (!load.ok()) return load.status();
    result_.load_id = load->load_id();
    if (load->state() == v1::LOAD_STATE_COMMITTED) {
      result_.nothing_to_do = result_.committed = true;
      result_.version = load->version();
      Tell(Phase::kDone);
      return std::move(result_);
    }
    if (load->state() == v1::LOAD_STATE_LOADING) {
      absl::Status status = Write(/*trust_records=*/true);
      // A record that was there is gone since (deleted, or its version dropped): send them all.
      if (absl::IsNotFound(status)) status = Write(/*trust_records=*/false);
      if (!status.ok()) return status;
      if (options_.shards > 1) {
        Tell(Phase::kDone);
        return std::move(result_);
      }
      if (result_.progress.counts.references == 0) return AbortEmpty();
    } else if (options_.shards > 1) {  // being committed
      Tell(Phase::kDone);
      return std::move(result_);
    }
    if (absl::Status status = Commit(); !status.ok()) return status;
    Tell(Phase::kDone);
    return std::move(result_);
  }

 private:
  void Tell(Phase phase) {
    result_.progress.phase = phase;
    if (progress_) progress_(result_.progress);
  }

  bool Cancelled() const { return options_.cancelled && options_.cancelled(); }
  static absl::Status Interruption() {
    return absl::CancelledError("interrupted; the same command goes on from here");
  }

  // Finds the load again or begins it. One that was aborted is begun anew under the next key.
  absl::StatusOr<v1::Load> Begin() {
    absl::StatusOr<std::string> key = IdempotencyKey(options_, model_, embedder_, *target_.codec);
    if (!key.ok()) return key.status();
    for (int attempt = 1;; ++attempt) {
      v1::BeginLoadRequest begin;
      begin.set_knowledge_base(options_.knowledge_base);
      begin.set_idempotency_key(attempt == 1 ? *key : absl::StrCat(*key, "-", attempt));
      begin.set_mode(options_.replace ? v1::LOAD_MODE_REPLACE : v1::LOAD_MODE_APPEND);
      absl::StatusOr<v1::BeginLoadResponse> begun =
          Patiently(options_.patience, [&] { return client_->Call(&Stub::BeginLoad, begin); });
      if (!begun.ok()) return begun.status();
      if (begun->load().state() == v1::LOAD_STATE_ABORTED) continue;
      result_.resumed = begun->resumed();
      return std::move(*begun->mutable_load());
    }
  }

  // Which documents the load holds, and how many references of each.
  absl::Status ListLoaded(absl::flat_hash_map<ShortHash, uint32_t>* loaded) {
    v1::ListLoadedDocumentsRequest list;
    list.set_load_id(result_.load_id);
    list.set_page_size(1000);
    do {
      absl::StatusOr<v1::ListDocumentsResponse> page = Patiently(
          options_.patience, [&] { return client_->Call(&Stub::ListLoadedDocuments, list); });
      if (!page.ok()) return page.status();
      for (const v1::Document& document : page->documents()) {
        (*loaded)[ShortHash::OfText(document.document_id())] = document.entries();
      }
      list.set_page_token(page->next_page_token());
    } while (!list.page_token().empty());
    return absl::OkStatus();
  }

  absl::Status Write(bool trust_records) {
    result_.record_bytes = result_.text_bytes = result_.embedding_bytes = 0;
    result_.progress.encoded = 0;
    ReferenceSourceOptions source_options = SourceOptions(options_, model_, *target_.codec);
    source_options.deduplicate = trust_records;
    if (absl::Status status = ListLoaded(&source_options.loaded); !status.ok()) return status;
    if (trust_records && target_.has_records) {
      source_options.store_has = [this](const RecordId& id) {
        return Patiently(options_.patience,
                         [&] { return client_->HasRecord(options_.knowledge_base, id); });
      };
    }
    absl::StatusOr<std::unique_ptr<ReferenceSource>> source =
        ReferenceSource::Open(&model_.tokenizer(), std::move(source_options));
    if (!source.ok()) return source.status();
    LoadUpload upload(client_, {.load_id = result_.load_id,
                                .patience = options_.patience,
                                .unacknowledged_bytes = options_.unacknowledged_bytes});
    Compressor compressor(model_, *target_.codec, embedder_, options_.threads, &upload);
    const absl::Status encoded = Encode(**source, compressor, upload);
    const absl::Status compressed = compressor.Finish();
    const absl::Status uploaded = upload.Finish();
    UpdateCounts(**source, upload);
    result_.warnings = (*source)->warnings();
    if (!encoded.ok()) return encoded;
    // Where the upload has failed, that is why the stages before it were cancelled.
    if (!uploaded.ok()) return uploaded;
    return compressed;
  }

  void UpdateCounts(const ReferenceSource& source, const LoadUpload& upload) {
    result_.progress.counts = source.counts();
    result_.progress.acknowledged = upload.entries_acknowledged();
    result_.progress.bytes_acknowledged = upload.bytes_acknowledged();
  }

  absl::Status Encode(ReferenceSource& source, Compressor& compressor, const LoadUpload& upload) {
    MemoryWriter& writer = *model_.writer();
    const int64_t rows = options_.rows > 0                  ? options_.rows
                         : writer.model().device().is_cpu() ? kCpuRows
                                                            : kDeviceRows;
    while (true) {
      EncodedBatch batch;
      absl::StatusOr<bool> some = source.Next(rows, kMostItems, &batch.items);
      if (!some.ok()) return some.status();
      UpdateCounts(source, upload);
      Tell(Phase::kWriting);
      if (Cancelled()) return Interruption();
      if (!*some) return absl::OkStatus();
      std::vector<std::vector<int32_t>> references;
      for (const ReferenceItem& item : batch.items) {
        Account(item, model_, *target_.codec, embedder_, &result_);
        if (!item.has_record) references.push_back(item.token_ids);
      }
      if (!references.empty()) {
        absl::StatusOr<std::vector<ExplicitMemory>> memories = writer.Write(references);
        if (!memories.ok()) return memories.status();
        batch.memories = *std::move(memories);
      }
      result_.progress.encoded += static_cast<int64_t>(references.size());
      if (!compressor.Add(std::move(batch))) return absl::OkStatus();  // Finish says why
    }
  }

  absl::Status AbortEmpty() {
    v1::AbortLoadRequest abort;
    abort.set_load_id(result_.load_id);
    const auto aborted = client_->Call(&Stub::AbortLoad, abort);
    std::string why = "the input holds no text to write";
    if (!result_.warnings.empty()) absl::StrAppend(&why, " (", result_.warnings[0], ")");
    if (!aborted.ok()) absl::StrAppend(&why, "; ", std::string(aborted.status().message()));
    return absl::InvalidArgumentError(why);
  }

  absl::Status Commit() {
    v1::CommitLoadRequest commit;
    commit.set_load_id(result_.load_id);
    absl::StatusOr<v1::CommitLoadResponse> begun =
        Patiently(options_.patience, [&] { return client_->Call(&Stub::CommitLoad, commit); });
    if (!begun.ok()) return begun.status();
    v1::Load load = std::move(*begun->mutable_load());
    v1::GetLoadRequest get;
    get.set_load_id(result_.load_id);
    while (load.state() == v1::LOAD_STATE_INDEXING) {
      result_.progress.indexing_fraction = load.indexing_fraction();
      Tell(Phase::kIndexing);
      if (Cancelled()) return Interruption();
      absl::SleepFor(kPoll);
      absl::StatusOr<v1::GetLoadResponse> now =
          Patiently(options_.patience, [&] { return client_->Call(&Stub::GetLoad, get); });
      if (!now.ok()) return now.status();
      load = std::move(*now->mutable_load());
    }
    if (load.state() != v1::LOAD_STATE_COMMITTED) {
      return absl::FailedPreconditionError(absl::StrCat(
          "load ", load.load_id(),
          " is not committed: ", load.failure().empty() ? "it was aborted" : load.failure()));
    }
    result_.committed = true;
    result_.version = load.version();
    return absl::OkStatus();
  }

  const MemoryWritingOptions& options_;
  const WritingModel& model_;
  const Embedder& embedder_;
  MemoryClient* const client_;
  const MemoryWritingCallback& progress_;
  TargetKnowledgeBase target_;
  MemoryWritingResult result_;
};

}  // namespace

absl::StatusOr<MemoryWritingResult> WriteMemories(const MemoryWritingOptions& options,
                                                  const WritingModel& model,
                                                  const Embedder& embedder, MemoryClient* client,
                                                  const MemoryWritingCallback& progress) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  if (model.writer() == nullptr) return absl::FailedPreconditionError("the model has no writer");
  // Bad paths before anything is made on the server.
  auto reader = DocumentReader::Open(options.inputs, options.documents);
  if (!reader.ok()) return reader.status();
  return Writing(options, model, embedder, client, progress).Run();
}

absl::StatusOr<MemoryWritingResult> CountMemories(const MemoryWritingOptions& options,
                                                  const WritingModel& model,
                                                  const Embedder& embedder,
                                                  const MemoryWritingCallback& progress) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  absl::StatusOr<std::unique_ptr<Codec>> codec = CodecFor(options, model, nullptr);
  if (!codec.ok()) return codec.status();
  absl::StatusOr<std::unique_ptr<ReferenceSource>> source =
      ReferenceSource::Open(&model.tokenizer(), SourceOptions(options, model, **codec));
  if (!source.ok()) return source.status();
  MemoryWritingResult result;
  result.progress.phase = Phase::kWriting;
  while (true) {
    std::vector<ReferenceItem> items;
    absl::StatusOr<bool> some = (*source)->Next(kDeviceRows, kMostItems, &items);
    if (!some.ok()) return some.status();
    result.progress.counts = (*source)->counts();
    if (progress) progress(result.progress);
    if (!*some) break;
    for (const ReferenceItem& item : items) Account(item, model, **codec, embedder, &result);
  }
  result.progress.phase = Phase::kDone;
  result.warnings = (*source)->warnings();
  return result;
}

}  // namespace memory3
