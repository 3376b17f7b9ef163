// `trainer tokenizer` and `trainer pack`.
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <limits>
#include <thread>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "trainer/command.h"
#include "trainer/pack.h"
#include "trainer/progress.h"
#include "trainer/sentencepiece_training.h"
#include "transformer/atomic_file.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

struct TextFlags {
  std::vector<std::string> inputs, titles;
  std::string hold_out_ids, out;
  DocumentOptions documents;
  int threads = static_cast<int>(std::thread::hardware_concurrency());

  void AddTo(CLI::App* flags) {
    flags->add_option("documents", inputs, ".txt or .jsonl files, also .gz or .zst")->required();
    flags->add_option("--hold_out_ids", hold_out_ids,
                      "MODULUS:REMAINDER, e.g. 10:3: holds out id % 10 == 3");
    flags->add_option("--hold_out_titles", titles,
                      "A .jsonl whose `title` fields name documents to hold out");
    flags->add_option("--text_field", documents.text_field)->capture_default_str();
    flags->add_option("--title_field", documents.title_field)->capture_default_str();
    flags->add_option("--id_field", documents.id_field)->capture_default_str();
    flags->add_flag("--strict", documents.strict, "A bad line is an error, not skipped");
    flags->add_option("--threads", threads)->check(CLI::Range(1, 1024))->capture_default_str();
  }
};

void PrintWarnings(const DocumentReader& reader) {
  for (const std::string& warning : reader.warnings()) std::cerr << warning << "\n";
  if (reader.skipped() > 0) std::cerr << reader.skipped() << " documents skipped\n";
}

struct TokenizerFlags {
  TextFlags text;
  int vocab_size = 16000;
  int64_t sample_mb = 20;
};

absl::Status RunTokenizer(TokenizerFlags& f) {
  absl::StatusOr<HoldOut> hold_out = ParseHoldOut(f.text.hold_out_ids, f.text.titles);
  if (!hold_out.ok()) return hold_out.status();
  auto reader = DocumentReader::Open(f.text.inputs, f.text.documents);
  if (!reader.ok()) return reader.status();
  absl::StatusOr<std::vector<std::string>> lines;
  {
    Progress progress("reading", "MB", 1e6);
    lines = SampleLines(reader->get(), *hold_out, f.sample_mb * 1000000,
                        [&](int64_t done, int64_t total) { progress.Update(done, total); });
  }
  PrintWarnings(**reader);
  if (!lines.ok()) return lines.status();
  std::string model, error;
  if (!TrainSentencePiece(*lines, f.vocab_size, f.text.threads, &model, &error)) {
    return absl::InvalidArgumentError(absl::StrCat("SentencePiece: ", error));
  }
  std::error_code made;
  std::filesystem::create_directories(f.text.out, made);
  const std::string path = f.text.out + "/tokenizer.model";
  if (absl::Status status = WriteFileAtomically(path, model); !status.ok()) return status;
  std::printf("%s: %d tokens, from %zu lines\n", path.c_str(), f.vocab_size, lines->size());
  return absl::OkStatus();
}

struct PackFlags {
  TextFlags text;
  std::string tokenizer;
  PackOptions options;
};

absl::Status RunPack(PackFlags& f) {
  absl::StatusOr<HoldOut> hold_out = ParseHoldOut(f.text.hold_out_ids, f.text.titles);
  if (!hold_out.ok()) return hold_out.status();
  if (f.options.only_held_out && f.text.hold_out_ids.empty() && f.text.titles.empty()) {
    return absl::InvalidArgumentError("only_held_out: needs hold_out_ids or hold_out_titles");
  }
  auto tokenizer = OpenAnyTokenizer(f.tokenizer);
  if (!tokenizer.ok()) return tokenizer.status();
  auto reader = DocumentReader::Open(f.text.inputs, f.text.documents);
  if (!reader.ok()) return reader.status();
  f.options.threads = f.text.threads;
  absl::StatusOr<PackCounts> counts;
  {
    Progress progress("packing", "MB", 1e6);
    counts = PackDocuments(reader->get(), *hold_out, **tokenizer, f.text.out, f.options,
                           [&](int64_t done, int64_t total) { progress.Update(done, total); });
  }
  PrintWarnings(**reader);
  if (!counts.ok()) return counts.status();
  std::printf("%s: %lld documents, %lld tokens, %lld shards; %lld held-out documents %s\n",
              f.text.out.c_str(), static_cast<long long>(counts->documents),
              static_cast<long long>(counts->tokens), static_cast<long long>(counts->shards),
              static_cast<long long>(counts->held_out),
              f.options.only_held_out ? "are these" : "left out");
  return absl::OkStatus();
}

}  // namespace

void AddTokenizerCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags = app->add_subcommand("tokenizer", "Trains a SentencePiece model on text");
  auto f = std::make_shared<TokenizerFlags>();
  f->text.AddTo(flags);
  flags->add_option("--out", f->text.out, "Directory for tokenizer.model")->required();
  flags->add_option("--vocab_size", f->vocab_size)
      ->check(CLI::Range(300, 1000000))
      ->capture_default_str();
  flags->add_option("--sample_mb", f->sample_mb, "Text to train on, drawn from all documents")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  commands->push_back({flags, [f] { return RunTokenizer(*f); }});
}

void AddPackCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags = app->add_subcommand("pack", "Turns documents into token shards");
  auto f = std::make_shared<PackFlags>();
  f->text.AddTo(flags);
  flags->add_option("--out", f->text.out, "Directory for the shards")->required();
  flags->add_option("--tokenizer", f->tokenizer, "Directory (or tokenizer.model)")->required();
  flags->add_flag("--only_held_out", f->options.only_held_out,
                  "Packs what is held out, for evaluation");
  flags->add_option("--shard_tokens", f->options.shard_tokens)
      ->check(CLI::Range(uint64_t{1}, std::numeric_limits<uint64_t>::max()))
      ->capture_default_str();
  commands->push_back({flags, [f] { return RunPack(*f); }});
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenAnyTokenizer(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) {
    auto bytes = ReadSmallFile(path, int64_t{64} << 20);
    if (!bytes.ok()) return bytes.status();
    return MakeSentencePieceTokenizer(*bytes, path);
  }
  ModelConfig any;
  any.vocab_size = std::numeric_limits<int>::max();
  return OpenTokenizer(path, any);
}

}  // namespace memory3
