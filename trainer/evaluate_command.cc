// `trainer evaluate`: perplexity of packed text with and without memory, and question answering.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "memory/codec.h"
#include "nlohmann/json.hpp"
#include "trainer/command.h"
#include "trainer/continual.h"
#include "trainer/corpus.h"
#include "trainer/progress.h"
#include "trainer/qa_data.h"
#include "trainer/qa_evaluation.h"
#include "trainer/reference_index.h"
#include "transformer/atomic_file.h"
#include "transformer/checkpoint.h"
#include "transformer/json.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

struct EvaluateFlags {
  std::string model, embedder = "lexical", out, questions, codebook;
  std::vector<std::string> shards, references, modes = {"none", "memory", "text"};
  int title_words = 0;
  int64_t most_questions = 1 << 30;
  bool show = false;
  DeviceFlags device;
  int context = 257, tokens_kept = 0;
  int64_t windows = 100;
  double overlap_limit = 2.0 / 3;  // explicit-memory.md, Chunks and retrieval
  ReferenceIndex::Options index;
};

struct Opened {
  std::unique_ptr<Checkpoint> checkpoint;
  ModelConfig config;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Embedder> embedder;
  std::unique_ptr<Device> device;
};

absl::StatusOr<Opened> Open(const EvaluateFlags& f) {
  Opened o;
  auto checkpoint = Checkpoint::Open(f.model);
  if (!checkpoint.ok()) return checkpoint.status();
  o.checkpoint = *std::move(checkpoint);
  o.config = o.checkpoint->config();
  if (!o.config.explicit_memory) {
    return absl::FailedPreconditionError(absl::StrCat(
        f.model, ": config.json has no explicit_memory; train with --stage continual"));
  }
  auto tokenizer = OpenTokenizer(f.model, o.config);
  if (!tokenizer.ok()) return tokenizer.status();
  o.tokenizer = *std::move(tokenizer);
  auto embedder = MakeEmbedder(f.embedder, {.threads = f.device.threads});
  if (!embedder.ok()) return embedder.status();
  o.embedder = *std::move(embedder);
  auto device = f.device.Make();
  if (!device.ok()) return device.status();
  o.device = *std::move(device);
  return o;
}

absl::Status EvaluatePerplexity(const EvaluateFlags& f, const Opened& o, nlohmann::json* report) {
  const ModelConfig& config = o.config;
  const Tokenizer& tokenizer = *o.tokenizer;
  auto corpus = TokenCorpus::Open(f.shards, tokenizer.file_hash());
  if (!corpus.ok()) return corpus.status();
  auto store = TokenCorpus::Open(f.references, tokenizer.file_hash());
  if (!store.ok()) return store.status();
  // Another seed than training's default; the windows are a fair sample.
  auto order = WindowOrder::Create(corpus->get(), f.context, /*seed=*/0xe7a1, true);
  if (!order.ok()) return order.status();
  ReferenceIndex::Options index_options = f.index;
  index_options.reference_tokens = config.explicit_memory->reference_tokens;
  auto index =
      ReferenceIndex::Build(store->get(), &tokenizer, o.embedder.get(), index_options, nullptr);
  if (!index.ok()) return index.status();
  auto parameters = Parameters::Create(o.device.get(), config);
  if (!parameters.ok()) return parameters.status();
  if (absl::Status status = (*parameters)->Load(*o.checkpoint); !status.ok()) return status;

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
        batch.sequences.push_back(SequenceOf(**corpus, window, f.context, tokenizer.bos_id()));
        if (modes[m].memory) {
          const RetrievalOptions retrieval = {.own_chunk_query = modes[m].own_chunk,
                                              .share_previous = false,
                                              .overlap_limit = f.overlap_limit,
                                              .leave_out_document = true};
          absl::Status status = AttachReferences(config, tokenizer, **corpus, **index, {window},
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
  *report = nlohmann::json::array();
  std::printf("%-24s %12s %12s   (%lld tokens)\n", "mode", "nats/token", "perplexity",
              static_cast<long long>(tokens));
  for (int m = 0; m < 3; ++m) {
    const double loss = losses[m] / static_cast<double>(tokens);
    std::printf("%-24s %12.4f %12.3f\n", modes[m].name, loss, std::exp(loss));
    report->push_back({{"mode", modes[m].name},
                       {"nll", loss},
                       {"perplexity", std::exp(loss)},
                       {"tokens", tokens}});
  }
  return absl::OkStatus();
}

absl::StatusOr<QaEvaluationOptions> QaOptions(const EvaluateFlags& f, const Codec* vq) {
  QaEvaluationOptions options;
  options.tokens_kept = f.tokens_kept;
  options.overlap_limit = f.overlap_limit;
  options.vq = vq;
  for (const std::string& name : f.modes) {
    for (const QaReading reading :
         {QaReading::kNone, QaReading::kMemory, QaReading::kMemoryVq, QaReading::kText}) {
      if (name == QaReadingName(reading)) options.readings.push_back(reading);
    }
  }
  if (vq == nullptr && std::find(f.modes.begin(), f.modes.end(), "memory_vq") != f.modes.end()) {
    return absl::InvalidArgumentError("modes: memory_vq needs --codebook");
  }
  return options;
}

absl::Status EvaluateQa(const EvaluateFlags& f, const Opened& o, nlohmann::json* report) {
  const ExplicitMemoryConfig& memory = *o.config.explicit_memory;
  std::unique_ptr<Codec> vq;
  if (!f.codebook.empty()) {
    auto bytes = ReadSmallFile(f.codebook, int64_t{256} << 20);
    if (!bytes.ok()) return bytes.status();
    auto codec = MakeCodec(CodecId::kVq, o.config.head_dim, *bytes);
    if (!codec.ok()) {
      return absl::Status(codec.status().code(),
                          absl::StrCat(f.codebook, ": ", codec.status().message()));
    }
    vq = *std::move(codec);
  }
  auto options = QaOptions(f, vq.get());
  if (!options.ok()) return options.status();
  auto questions = LoadQuestions(f.questions, HoldOut());
  if (!questions.ok()) return questions.status();
  // All passages are in the store, whatever is asked.
  QaStore store(o.embedder.get());
  QaExampleCounts counts;
  auto examples = MakeQaExamples(*questions, *o.tokenizer, memory.reference_tokens,
                                 memory.references_per_chunk - 1, /*skip=*/false, &store, &counts);
  if (!examples.ok()) return examples.status();
  std::erase_if(*examples, [&](const QaExample& e) {
    return (*questions)[e.question].title_words < f.title_words;
  });
  if (static_cast<int64_t>(examples->size()) > f.most_questions) examples->resize(f.most_questions);
  auto model = Model::Load(o.device.get(), o.config, *o.checkpoint, WeightFormat::kF32);
  if (!model.ok()) return model.status();
  absl::StatusOr<std::vector<QaResult>> results;
  {
    Progress progress("asking", "questions");
    results = EvaluateQuestions(*model, *o.tokenizer, *questions, *examples, store, *options,
                                [&](int64_t done, int64_t total) { progress.Update(done, total); });
  }
  if (!results.ok()) return results.status();
  std::printf("%-12s %12s %12s %16s   (%zu questions, %lld of all without the answer in a piece)\n",
              "mode", "exact match", "F1", "log-likelihood", examples->size(),
              static_cast<long long>(counts.without_answer));
  nlohmann::json modes = nlohmann::json::array();
  for (const QaResult& r : *results) {
    std::printf("%-12s %12.4f %12.4f %16.3f\n", QaReadingName(r.reading), r.exact_match, r.f1,
                r.log_likelihood);
    modes.push_back({{"mode", QaReadingName(r.reading)},
                     {"exact_match", r.exact_match},
                     {"f1", r.f1},
                     {"log_likelihood", r.log_likelihood},
                     {"dropped_references", r.dropped_references}});
    if (f.show) modes.back()["answers"] = r.answers;
  }
  *report = {{"modes", modes},
             {"questions", examples->size()},
             {"tokens_kept", f.tokens_kept > 0 ? f.tokens_kept : memory.tokens_kept},
             {"overlap_limit", f.overlap_limit},
             {"store", store.size()}};
  return absl::OkStatus();
}

absl::Status RunEvaluate(const EvaluateFlags& f) {
  if (f.shards.empty() && f.questions.empty()) {
    return absl::InvalidArgumentError("needs shards, or --questions, or both");
  }
  if (!f.shards.empty() && f.references.empty()) {
    return absl::InvalidArgumentError("references: needed for the perplexity with memory");
  }
  auto opened = Open(f);
  if (!opened.ok()) return opened.status();
  nlohmann::json report = nlohmann::json::object();
  if (!f.shards.empty()) {
    absl::Status status = EvaluatePerplexity(f, *opened, &report["perplexity"]);
    if (!status.ok()) return status;
  }
  if (!f.questions.empty()) {
    absl::Status status = EvaluateQa(f, *opened, &report["question_answering"]);
    if (!status.ok()) return status;
  }
  if (f.out.empty()) return absl::OkStatus();
  return WriteFileAtomically(f.out, report.dump(2) + "\n");
}

}  // namespace

void AddEvaluateCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags =
      app->add_subcommand("evaluate", "Perplexity and question answering, with and without memory");
  auto f = std::make_shared<EvaluateFlags>();
  flags->add_option("shards", f->shards,
                    "Held-out shards (trainer pack --only_held_out), for perplexity");
  flags->add_option("--questions", f->questions,
                    "Held-out questions, a .jsonl as finetune takes, for question answering");
  flags->add_option("--modes", f->modes, "Of question answering")
      ->check(CLI::IsMember({"none", "memory", "memory_vq", "text"}))
      ->capture_default_str();
  flags->add_option("--codebook", f->codebook, "For memory_vq");
  flags->add_option("--title_words", f->title_words, "Only questions with n_title_words at least")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--most_questions", f->most_questions, "The first so many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  flags->add_flag("--show", f->show, "Puts the answers into the JSON");
  flags->add_option("--model", f->model, "Model directory")->required();
  flags->add_option("--references", f->references, "Shards the references are cut from");
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
                   "Drops references that overlap the window or question more; 1: none")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  flags->add_option("--out", f->out, "Writes the table as JSON");
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunEvaluate(*f); }});
}

}  // namespace memory3
