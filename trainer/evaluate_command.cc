// `trainer evaluate`: perplexity of packed text with and without memory.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "trainer/command.h"
#include "trainer/continual.h"
#include "trainer/corpus.h"
#include "trainer/progress.h"
#include "trainer/reference_index.h"
#include "transformer/atomic_file.h"
#include "transformer/checkpoint.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

struct EvaluateFlags {
  std::string model, embedder = "lexical", out;
  std::vector<std::string> shards, references;
  DeviceFlags device;
  int context = 257, tokens_kept = 0;
  int64_t windows = 100;
  double overlap_limit = 2.0 / 3;  // explicit-memory.md, Chunks and retrieval
  ReferenceIndex::Options index;
};

absl::Status RunEvaluate(const EvaluateFlags& f) {
  auto checkpoint = Checkpoint::Open(f.model);
  if (!checkpoint.ok()) return checkpoint.status();
  const ModelConfig config = (*checkpoint)->config();
  if (!config.explicit_memory) {
    return absl::FailedPreconditionError(absl::StrCat(
        f.model, ": config.json has no explicit_memory; train with --stage continual"));
  }
  auto tokenizer = OpenTokenizer(f.model, config);
  if (!tokenizer.ok()) return tokenizer.status();
  auto corpus = TokenCorpus::Open(f.shards, (*tokenizer)->file_hash());
  if (!corpus.ok()) return corpus.status();
  auto store = TokenCorpus::Open(f.references, (*tokenizer)->file_hash());
  if (!store.ok()) return store.status();
  // Another seed than training's default; the windows are a fair sample.
  auto order = WindowOrder::Create(corpus->get(), f.context, /*seed=*/0xe7a1, true);
  if (!order.ok()) return order.status();
  auto embedder = MakeEmbedder(f.embedder, {.threads = f.device.threads});
  if (!embedder.ok()) return embedder.status();
  ReferenceIndex::Options index_options = f.index;
  index_options.reference_tokens = config.explicit_memory->reference_tokens;
  auto index = ReferenceIndex::Build(store->get(), tokenizer->get(), embedder->get(), index_options,
                                     nullptr);
  if (!index.ok()) return index.status();
  auto device = f.device.Make();
  if (!device.ok()) return device.status();
  auto parameters = Parameters::Create(device->get(), config);
  if (!parameters.ok()) return parameters.status();
  if (absl::Status status = (*parameters)->Load(**checkpoint); !status.ok()) return status;

  // References of the window's own article are never in the store.
  struct Mode {
    const char* name;
    bool memory, own_chunk;
  };
  const Mode modes[] = {
      {"none", false, false}, {"memory", true, false}, {"memory_own_chunk_query", true, true}};
  TrainingStep step(parameters->get());
  double losses[3] = {};
  int64_t tokens = 0;
  const int64_t windows = std::min(f.windows, order->windows());
  {
    Progress progress("evaluating", "windows");
    for (int64_t w = 0; w < windows; ++w) {
      const Window window = order->At(w);
      for (int m = 0; m < 3; ++m) {
        TrainingBatch batch;
        batch.layout = TrainingBatch::Layout::kMemory;
        batch.tokens_kept = f.tokens_kept;
        batch.sequences.push_back(SequenceOf(**corpus, window, f.context, (*tokenizer)->bos_id()));
        if (modes[m].memory) {
          const RetrievalOptions retrieval = {.own_chunk_query = modes[m].own_chunk,
                                              .share_previous = false,
                                              .overlap_limit = f.overlap_limit,
                                              .leave_out_document = true};
          absl::Status status = AttachReferences(config, **tokenizer, **corpus, **index, {window},
                                                 retrieval, 1, &batch);
          if (!status.ok()) return status;
        }
        absl::StatusOr<TrainingResult> result = step.Run(batch, nullptr);
        if (!result.ok()) return result.status();
        losses[m] += result->loss;
        if (m == 0) tokens += result->tokens;
      }
      progress.Update(w + 1, windows);
    }
  }
  nlohmann::json report = nlohmann::json::array();
  std::printf("%-24s %12s %12s   (%lld tokens)\n", "mode", "nats/token", "perplexity",
              static_cast<long long>(tokens));
  for (int m = 0; m < 3; ++m) {
    const double loss = losses[m] / static_cast<double>(tokens);
    std::printf("%-24s %12.4f %12.3f\n", modes[m].name, loss, std::exp(loss));
    report.push_back({{"mode", modes[m].name},
                      {"nll", loss},
                      {"perplexity", std::exp(loss)},
                      {"tokens", tokens}});
  }
  if (f.out.empty()) return absl::OkStatus();
  return WriteFileAtomically(f.out, report.dump(2) + "\n");
}

}  // namespace

void AddEvaluateCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags =
      app->add_subcommand("evaluate", "Perplexity of packed text with and without memory");
  auto f = std::make_shared<EvaluateFlags>();
  flags->add_option("shards", f->shards, "Held-out shards (trainer pack --only_held_out)")
      ->required();
  flags->add_option("--model", f->model, "Model directory")->required();
  flags->add_option("--references", f->references, "Shards the references are cut from")
      ->required();
  flags->add_option("--embedder", f->embedder)->capture_default_str();
  flags->add_option("--most_references", f->index.most)
      ->check(CLI::Range(1, 10000000))
      ->capture_default_str();
  flags->add_option("--windows", f->windows)->check(CLI::Range(1, 1 << 30))->capture_default_str();
  flags->add_option("--context", f->context, "Tokens of a window, <s> included")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  flags->add_option("--tokens_kept", f->tokens_kept, "0: the model's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags
      ->add_option("--overlap_limit", f->overlap_limit,
                   "Drops references that overlap the window more; 1: none")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  flags->add_option("--out", f->out, "Writes the table as JSON");
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunEvaluate(*f); }});
}

}  // namespace memory3
