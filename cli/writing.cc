#include "cli/writing.h"

#include <algorithm>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/server_process.h"
#include "trainer/progress.h"
#include "transformer/device.h"
#include "transformer/json.h"

namespace memory3 {

void WritingFlags::AddTo(CLI::App& command) {
  command.add_option("--model", model, "Directory of the model that writes and will read")
      ->envname("MEMORY3_MODEL")
      ->required();
  command.add_option("--codec", codec, "Of memories; default: the knowledge base's, else bf16")
      ->check(CLI::IsMember({"f32", "bf16", "int8", "vq"}));
  command.add_option("--codebook", codebook, "File for vq, made by `trainer codec`")
      ->check(CLI::ExistingFile);
  command.add_option("--embedder", embedder, "lexical, lexical:DIR or bert:DIR")
      ->capture_default_str();
  command.add_option("--tenant", writing.tenant, "Of the API key")->capture_default_str();
  command.add_option("--description", writing.description, "Of a knowledge base that is made");
}

absl::StatusOr<MemoryWritingOptions> ToOptions(const WritingFlags& flags) {
  MemoryWritingOptions options = flags.writing;
  if (!flags.codec.empty()) {
    absl::StatusOr<CodecId> codec = ParseCodecId(flags.codec);
    if (!codec.ok()) return codec.status();
    options.codec = *codec;
  }
  if (!flags.codebook.empty()) {
    absl::StatusOr<std::string> bytes = ReadSmallFile(flags.codebook, int64_t{1} << 30);
    if (!bytes.ok()) return bytes.status();
    options.codebook = *std::move(bytes);
  }
  options.threads = flags.threads > 0
                        ? flags.threads
                        : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  options.cancelled = Interrupted;
  return options;
}

absl::StatusOr<MemoryWritingResult> LoadDocuments(const Session& session, const WritingFlags& flags,
                                                  bool quiet) {
  absl::StatusOr<MemoryWritingOptions> options = ToOptions(flags);
  if (!options.ok()) return options.status();
  absl::StatusOr<WeightFormat> format = ParseWeightFormat(flags.weights);
  if (!format.ok()) return format.status();
  absl::StatusOr<std::unique_ptr<Embedder>> embedder =
      MakeEmbedder(flags.embedder, {.threads = flags.threads});
  if (!embedder.ok()) return embedder.status();
  absl::StatusOr<std::unique_ptr<Device>> device =
      flags.device == "cuda" ? MakeCudaDevice({}) : MakeCpuDevice({.threads = flags.threads});
  if (!device.ok()) return device.status();
  absl::StatusOr<std::unique_ptr<WritingModel>> model = WritingModel::Open(flags.model);
  if (!model.ok()) return model.status();
  if (absl::Status status = (*model)->LoadWriter(device->get(), *format, options->rows);
      !status.ok())
    return status;
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  Progress progress(absl::StrCat("loading ", options->knowledge_base), "MB", 1e6);
  return WriteMemories(
      *options, **model, **embedder, client->get(), [&](const MemoryWritingProgress& now) {
        if (quiet) return;
        progress.Update(
            now.counts.bytes_read, now.counts.bytes_total,
            now.phase == MemoryWritingProgress::Phase::kIndexing
                ? absl::StrFormat("indexing %.0f %%", 100 * now.indexing_fraction)
                : absl::StrFormat("%d references, %d on the server", now.counts.references,
                                  now.acknowledged + now.counts.loaded));
      });
}

}  // namespace memory3
