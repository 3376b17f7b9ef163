// `trainer write`: documents to a knowledge base.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <optional>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "trainer/command.h"
#include "trainer/memory_writing.h"
#include "trainer/progress.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using Phase = MemoryWritingProgress::Phase;
using Clock = std::chrono::steady_clock;

struct WriteFlags {
  std::string model, codec, codebook, embedder = "lexical", weights = "f32", mode = "append";
  std::string shard = "1/1", metrics;
  bool dry_run = false;
  int patience = 120;
  int64_t unacknowledged_kb = int64_t{64} << 10;
  MemoryClientOptions client;
  MemoryWritingOptions writing;
  DeviceFlags device;
};

// "2/8": the second of eight.
absl::Status ParseShard(const std::string& text, MemoryWritingOptions* o) {
  const size_t slash = text.find('/');
  int shard = 0;
  if (slash == std::string::npos || !absl::SimpleAtoi(text.substr(0, slash), &shard) ||
      !absl::SimpleAtoi(text.substr(slash + 1), &o->shards) || shard < 1 || shard > o->shards) {
    return absl::InvalidArgumentError(
        absl::StrCat("--shard \"", text, "\": must be I/N with 1 <= I <= N"));
  }
  o->shard = shard - 1;
  return absl::OkStatus();
}

// What happens, as lines of JSON, one a second; and as a line on the terminal.
class Reporter {
 public:
  Reporter(bool dry_run, const std::string& metrics)
      : progress_(std::in_place, dry_run ? "counting" : "writing", "MB", 1e6),
        metrics_path_(metrics),
        begin_(Clock::now()) {
    if (!metrics.empty()) metrics_.open(metrics, std::ios::app);
  }
  absl::Status status() const {
    if (metrics_path_.empty() || metrics_.good()) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat(metrics_path_, ": cannot be written"));
  }

  void operator()(const MemoryWritingProgress& p) {
    const double now = std::chrono::duration<double>(Clock::now() - begin_).count();
    if (p.phase >= Phase::kIndexing && progress_) {
      progress_.reset();  // ends its line
      if (p.phase == Phase::kIndexing) std::fprintf(stderr, "the server builds the index\n");
    }
    if (p.phase == Phase::kWriting) {
      progress_->Update(p.counts.bytes_read, p.counts.bytes_total,
                        absl::StrFormat("%d references, %d encoded (%.1f/s), %d on the server",
                                        p.counts.references, p.encoded, Rate(now, p.encoded),
                                        p.acknowledged + p.counts.loaded));
    }
    if (!metrics_.is_open() || (p.phase != Phase::kDone && now - last_line_ < 1)) return;
    nlohmann::json line = {{"seconds", now},
                           {"documents", p.counts.documents},
                           {"references", p.counts.references},
                           {"encoded", p.encoded},
                           {"encoded_per_s", Rate(now, p.encoded)},
                           {"acknowledged", p.acknowledged},
                           {"bytes_acknowledged", p.bytes_acknowledged},
                           {"loaded_before", p.counts.loaded},
                           {"same_in_run", p.counts.in_run},
                           {"same_in_store", p.counts.in_store},
                           {"documents_skipped", p.counts.skipped},
                           {"indexing_fraction", p.indexing_fraction}};
    metrics_ << line.dump() << std::endl;
    last_line_ = now;
  }

 private:
  // References a second since the first was encoded.
  double Rate(double now, int64_t encoded) {
    if (encoded == 0 || since_ < 0) {
      since_ = now;
      return 0;
    }
    return now > since_ ? static_cast<double>(encoded) / (now - since_) : 0;
  }

  std::optional<Progress> progress_;
  const std::string metrics_path_;
  std::ofstream metrics_;
  const Clock::time_point begin_;
  double since_ = -1, last_line_ = -1;
};

void PrintCounts(const MemoryWritingResult& r) {
  const ReferenceCounts& c = r.progress.counts;
  for (const std::string& warning : r.warnings) std::cerr << warning << "\n";
  if (c.skipped > 0) std::cerr << c.skipped << " documents skipped\n";
  std::cout << absl::StrFormat(
      "%d documents, %d references, %d tokens; records %d bytes, texts %d bytes, embeddings %d "
      "bytes\n",
      c.documents, c.references, c.tokens, r.record_bytes, r.text_bytes, r.embedding_bytes);
  if (c.in_run > 0) std::cout << c.in_run << " references repeat an earlier one's tokens\n";
}

absl::Status RunWrite(WriteFlags& f) {
  if (absl::Status status = ParseShard(f.shard, &f.writing); !status.ok()) return status;
  if (!f.codec.empty()) {
    absl::StatusOr<CodecId> codec = ParseCodecId(f.codec);
    if (!codec.ok()) return codec.status();
    f.writing.codec = *codec;
  }
  if (!f.codebook.empty()) {
    absl::StatusOr<std::string> bytes = ReadSmallFile(f.codebook, int64_t{1} << 30);
    if (!bytes.ok()) return bytes.status();
    f.writing.codebook = *std::move(bytes);
  }
  f.writing.replace = f.mode == "replace";
  f.writing.patience = absl::Seconds(f.patience);
  f.writing.unacknowledged_bytes = f.unacknowledged_kb << 10;
  f.writing.threads = f.device.threads > 0
                          ? f.device.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  absl::StatusOr<WeightFormat> format = ParseWeightFormat(f.weights);
  if (!format.ok()) return format.status();
  if (!f.dry_run && f.client.target.empty()) {
    return absl::InvalidArgumentError("--server: is needed, unless with --dry_run");
  }
  Reporter reporter(f.dry_run, f.metrics);
  if (absl::Status status = reporter.status(); !status.ok()) return status;
  auto embedder = MakeEmbedder(f.embedder, {.threads = f.device.threads});
  if (!embedder.ok()) return embedder.status();
  std::unique_ptr<Device> device;  // outlives the model
  auto model = WritingModel::Open(f.model);
  if (!model.ok()) return model.status();
  const MemoryWritingCallback report = [&](const MemoryWritingProgress& p) { reporter(p); };
  if (f.dry_run) {
    auto counted = CountMemories(f.writing, **model, **embedder, report);
    if (!counted.ok()) return counted.status();
    PrintCounts(*counted);
    return reporter.status();
  }
  absl::StatusOr<std::unique_ptr<Device>> made = f.device.Make();
  if (!made.ok()) return made.status();
  device = *std::move(made);
  if (absl::Status s = (*model)->LoadWriter(device.get(), *format, f.writing.rows); !s.ok()) {
    return s;
  }
  auto client = MemoryClient::Create(f.client);
  if (!client.ok()) return client.status();
  auto written = WriteMemories(f.writing, **model, **embedder, client->get(), report);
  if (!written.ok()) {
    if (!absl::IsUnavailable(written.status())) return written.status();
    return absl::UnavailableError(absl::StrCat("server ", f.client.target, ": ",
                                               std::string(written.status().message()),
                                               "; the same command goes on from here"));
  }
  const std::string& name = f.writing.knowledge_base;
  if (written->nothing_to_do) {
    std::cout << name << ": this load is there already, committed as version " << written->version
              << "; --label loads it again\n";
    return absl::OkStatus();
  }
  PrintCounts(*written);
  if (written->committed) {
    std::cout << name << ": version " << written->version << " is published\n";
  } else {
    std::cout << name << ": shard " << f.shard << " is in load " << written->load_id
              << "; the same command without --shard commits it\n";
  }
  return reporter.status();
}

}  // namespace

void AddWriteCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags =
      app->add_subcommand("write", "Writes documents' memories into a knowledge base");
  auto f = std::make_shared<WriteFlags>();
  flags->add_option("documents", f->writing.inputs, ".txt or .jsonl files, also .gz or .zst")
      ->required();
  flags->add_option("--model", f->model, "Model directory")->required();
  flags->add_option("--knowledge_base", f->writing.knowledge_base, "Made where it is missing")
      ->required();
  flags->add_option("--server", f->client.target, "The memory server, HOST:PORT");
  flags->add_option("--api_key", f->client.api_key, "Better given in the environment");
  flags->add_option("--tls_ca", f->client.tls.ca, "PEM file that signed the server's certificate");
  flags->add_option("--tls_certificate", f->client.tls.certificate, "PEM file, for mutual TLS");
  flags->add_option("--tls_key", f->client.tls.key, "PEM file, for mutual TLS");
  flags->add_option("--tenant", f->writing.tenant, "Of the API key")->capture_default_str();
  flags->add_option("--mode", f->mode, "Adds to the knowledge base, or replaces what is there")
      ->check(CLI::IsMember({"append", "replace"}))
      ->capture_default_str();
  flags->add_option("--codec", f->codec, "Of records; default: the knowledge base's, else bf16")
      ->check(CLI::IsMember({"f32", "bf16", "int8", "vq"}));
  flags->add_option("--codebook", f->codebook, "For vq, made by `trainer codec`");
  flags->add_option("--embedder", f->embedder, "lexical, lexical:DIR or bert:DIR")
      ->capture_default_str();
  flags->add_option("--weights", f->weights, "What the model computes with")
      ->check(CLI::IsMember({"f32", "bf16", "int8"}))
      ->capture_default_str();
  flags->add_option("--shard", f->shard, "I/N: writes every N-th document and does not commit")
      ->capture_default_str();
  flags->add_flag("--dry_run,--dry-run", f->dry_run, "Prints counts and bytes, sends nothing");
  flags->add_option("--label", f->writing.label, "Another label loads the same input again");
  flags->add_option("--description", f->writing.description, "Of a knowledge base that is made");
  flags->add_option("--text_field", f->writing.documents.text_field)->capture_default_str();
  flags->add_option("--title_field", f->writing.documents.title_field)->capture_default_str();
  flags->add_option("--id_field", f->writing.documents.id_field)->capture_default_str();
  flags->add_option("--uri_field", f->writing.documents.uri_field, "Default: uri, or url");
  f->writing.documents.metadata_field = "metadata";
  flags
      ->add_option("--metadata_field", f->writing.documents.metadata_field,
                   "An object of the operator's own pairs, which filters match on; empty: none")
      ->capture_default_str();
  flags->add_flag("--strict", f->writing.documents.strict, "A bad line is an error, not skipped");
  flags->add_option("--rows", f->writing.rows, "Tokens encoded at once; 0: as the device likes it")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  flags->add_option("--patience", f->patience, "Seconds to wait for a server that went away")
      ->check(CLI::Range(0, 86400))
      ->capture_default_str();
  flags
      ->add_option("--unacknowledged_kb", f->unacknowledged_kb,
                   "Sent before the server is asked whether all is synced")
      ->check(CLI::Range(1, 1 << 22))
      ->capture_default_str();
  flags->add_option("--metrics", f->metrics, "Appends lines of JSON");
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunWrite(*f); }});
}

}  // namespace memory3
