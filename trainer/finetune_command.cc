// `trainer finetune`: questions and answers, with their references as memories or as text.
#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "trainer/command.h"
#include "trainer/corpus.h"
#include "trainer/pack.h"
#include "trainer/progress.h"
#include "trainer/qa_batches.h"
#include "trainer/qa_data.h"
#include "trainer/qa_groups.h"
#include "trainer/reference_index.h"
#include "trainer/run_flags.h"
#include "transformer/checkpoint.h"
#include "transformer/parameters.h"

namespace memory3 {
namespace {

using nlohmann::json;

struct FinetuneFlags : RunFlags {
  std::string questions, model, mode = "memory", embedder = "lexical", kept = "0@0";
  std::string hold_out_ids;
  std::vector<std::string> hold_out_titles, shards, texts;
  DeviceFlags device;
  int clozes = 20000, retrieved = 1, rehearsal = 2, rehearsal_context = 129;
  int title_words = 0, text_pieces = 20;
  double cloze = 0.3, rehearsal_copy = 0.5, rehearsal_retrieve = 1, previous_query = 0;
  QaGroupOptions group = {.groups = 0};
  int64_t references = 20000;
  bool stop_writing_gradient = false;
};

// Continual training's batches, beside the questions.
struct Rehearsal {
  std::unique_ptr<TokenCorpus> corpus;
  std::unique_ptr<ReferenceIndex> index;
  std::unique_ptr<ContinualBatches> batches;

  absl::Status Prepare(const FinetuneFlags& f, const ModelConfig& config,
                       const Tokenizer& tokenizer, const Embedder& embedder,
                       const StepSchedule& kept) {
    auto opened = TokenCorpus::Open(f.shards, tokenizer.file_hash());
    if (!opened.ok()) return opened.status();
    corpus = *std::move(opened);
    auto order = WindowOrder::Create(corpus.get(), f.rehearsal_context, f.seed, true);
    if (!order.ok()) return order.status();
    Progress progress("embedding", "references");
    auto built =
        ReferenceIndex::Build(corpus.get(), &tokenizer, &embedder,
                              {config.explicit_memory->reference_tokens, f.references, f.seed},
                              [&](int64_t done, int64_t total) { progress.Update(done, total); });
    if (!built.ok()) return built.status();
    index = *std::move(built);
    auto level = StepSchedule::Parse("2@0", "level", 0, 2);
    if (!level.ok()) return level.status();
    ContinualOptions options;
    options.sequences = f.rehearsal;
    options.tokens = f.rehearsal_context;
    options.accumulate = f.run.accumulate;
    options.copy = f.rehearsal_copy;
    options.retrieve = f.rehearsal_retrieve;
    options.previous_query = f.previous_query;
    options.kept = kept;
    options.level = *level;
    options.gradient_through_writing = !f.stop_writing_gradient;
    options.retrieval.same_document = 0.5;
    options.seed = f.seed;
    batches = std::make_unique<ContinualBatches>(&config, &tokenizer, corpus.get(), index.get(),
                                                 *std::move(order), options);
    return absl::OkStatus();
  }
};

absl::Status RunFinetune(FinetuneFlags& f) {
  StopOnSignals();
  auto checkpoint = Checkpoint::Open(f.model);
  if (!checkpoint.ok()) return checkpoint.status();
  ModelConfig config = (*checkpoint)->config();
  if (!config.explicit_memory) {
    return absl::FailedPreconditionError(absl::StrCat(
        f.model, ": config.json has no explicit_memory; train with --stage continual"));
  }
  ExplicitMemoryConfig& memory = *config.explicit_memory;
  auto tokenizer = OpenTokenizer(f.model, config);
  if (!tokenizer.ok()) return tokenizer.status();
  auto kept = StepSchedule::Parse(f.kept, "tokens_kept", 0, memory.reference_tokens);
  if (!kept.ok()) return kept.status();
  // The model keeps what it was trained to read at the end.
  if (const int last = kept->At(f.run.schedule.steps - 1); last > 0) memory.tokens_kept = last;
  absl::StatusOr<HoldOut> hold_out = ParseHoldOut(f.hold_out_ids, f.hold_out_titles);
  if (!hold_out.ok()) return hold_out.status();
  auto embedder = MakeEmbedder(f.embedder, {.threads = f.device.threads});
  if (!embedder.ok()) return embedder.status();

  const bool grouped = f.group.groups > 0;
  if (grouped && f.mode == "text") {
    return absl::InvalidArgumentError("groups: references are shared as memories, not as text");
  }
  auto questions = LoadQuestions(f.questions, *hold_out);
  if (!questions.ok()) return questions.status();
  std::erase_if(*questions, [&](const Question& q) { return q.title_words < f.title_words; });
  QaStore store(embedder->get());
  QaExampleCounts counts;
  auto examples = MakeQaExamples(*questions, **tokenizer, memory.reference_tokens,
                                 memory.references_per_chunk - 1, /*skip=*/true, &store, &counts);
  if (!examples.ok()) return examples.status();
  std::vector<QaExample> clozes;
  std::vector<TextPieces> texts;
  if (grouped && !f.texts.empty()) {
    auto cut = CutTexts(f.texts, *hold_out, **tokenizer, memory.reference_tokens, f.text_pieces);
    if (!cut.ok()) return cut.status();
    texts = *std::move(cut);
  } else if (!grouped && f.cloze > 0) {
    clozes = MakeClozeExamples(store, **tokenizer, f.clozes, f.seed);
    std::vector<std::string> queries;
    queries.reserve(clozes.size());
    for (const QaExample& c : clozes) queries.push_back((*tokenizer)->DecodeQuery(c.prompt));
    absl::Status status = FindOthers(store, queries, memory.references_per_chunk - 1, &clozes);
    if (!status.ok()) return status;
  }
  std::printf(
      "%lld questions (%lld without a piece that has the answer left out), %zu clozes, "
      "%d references, %zu texts\n",
      static_cast<long long>(counts.examples), static_cast<long long>(counts.without_answer),
      clozes.size(), store.size(), texts.size());
  std::fflush(stdout);
  Rehearsal rehearsal;
  if (!f.shards.empty() && f.rehearsal > 0) {
    absl::Status status = rehearsal.Prepare(f, config, **tokenizer, **embedder, *kept);
    if (!status.ok()) return status;
  }

  auto device = f.device.Make();
  if (!device.ok()) return device.status();
  auto parameters = Parameters::Create(device->get(), config);
  if (!parameters.ok()) return parameters.status();
  if (absl::Status status = (*parameters)->Load(**checkpoint); !status.ok()) return status;
  f.Apply();
  f.run.settings = {{"stage", "finetune"},
                    {"mode", f.mode},
                    {"model", json::parse(ModelConfigToJson(config))},
                    {"tokenizer", (*tokenizer)->file_hash().ToHex()},
                    {"questions", counts.examples},
                    {"clozes", clozes.size()},
                    {"cloze", f.cloze},
                    {"retrieved", f.retrieved},
                    {"rehearsal", rehearsal.batches ? f.rehearsal : 0},
                    {"rehearsal_copy", f.rehearsal_copy},
                    {"rehearsal_retrieve", f.rehearsal_retrieve},
                    {"previous_query", f.previous_query},
                    {"rehearsal_context", f.rehearsal_context},
                    {"data", rehearsal.corpus ? rehearsal.corpus->digest() : ""},
                    {"tokens_kept", f.kept},
                    {"stop_writing_gradient", f.stop_writing_gradient},
                    {"seed", f.seed},
                    {"batch", f.batch}};
  std::unique_ptr<BatchSource> batches;
  if (grouped) {
    f.group.accumulate = f.run.accumulate;
    f.group.kept = *kept;
    f.group.gradient_through_writing = !f.stop_writing_gradient;
    f.group.seed = f.seed;
    f.run.settings["groups"] = {{"groups", f.group.groups},
                                {"texts", f.group.texts},
                                {"text_documents", texts.size()},
                                {"clozes", f.group.clozes},
                                {"sparse", f.group.sparse}};
    batches = std::make_unique<QaGroupBatches>(&config, tokenizer->get(), &store, &*questions,
                                               *std::move(examples), std::move(texts),
                                               rehearsal.batches.get(), f.group);
  } else {
    batches = std::make_unique<QaBatches>(
        &config, tokenizer->get(), &store, *std::move(examples), std::move(clozes),
        rehearsal.batches.get(),
        QaBatchOptions{.mode = f.mode == "text" ? QaMode::kText : QaMode::kMemory,
                       .questions = f.batch,
                       .accumulate = f.run.accumulate,
                       .cloze = f.cloze,
                       .retrieved = f.retrieved,
                       .kept = *kept,
                       .gradient_through_writing = !f.stop_writing_gradient,
                       .seed = f.seed});
  }
  Recomputed recomputed(batches.get());
  BatchSource* const source = f.recompute ? static_cast<BatchSource*>(&recomputed) : batches.get();
  absl::StatusOr<RunOutcome> outcome = RunTraining(parameters->get(), source, f.run, nullptr);
  if (!outcome.ok()) return outcome.status();
  if (!outcome->finished) {
    std::printf("stopped at step %lld; the same command goes on from there\n",
                static_cast<long long>(outcome->step));
    return absl::OkStatus();
  }
  const std::string out = f.run.directory + "/model";
  if (absl::Status status = SaveModelOnce(**parameters, out, f.model); !status.ok()) return status;
  std::printf("%s: %lld steps\n", out.c_str(), static_cast<long long>(outcome->step));
  return absl::OkStatus();
}

void AddGroupFlags(CLI::App* flags, FinetuneFlags* f) {
  const auto group = [](CLI::Option* option) {
    option->group("Shared references")->capture_default_str();
  };
  group(flags
            ->add_option("--groups", f->group.groups,
                         "Groups of a batch, in place of --batch: a group's references are encoded "
                         "once and all its questions read them; 0: every question has its own")
            ->check(CLI::Range(0, 65536)));
  group(flags->add_option("--clozes_each", f->group.clozes, "Clozes of each reference of a group")
            ->check(CLI::Range(0, 1024)));
  group(flags->add_option("--texts", f->texts,
                          "Documents for groups without questions; held-out ones are left out"));
  group(flags->add_option("--text_groups", f->group.texts, "Part of the groups that are of these")
            ->check(CLI::Range(0.0, 1.0)));
  group(flags->add_option("--text_pieces", f->text_pieces, "First references of each document")
            ->check(CLI::Range(2, 1 << 20)));
  group(flags
            ->add_option("--sparse", f->group.sparse,
                         "Part of the batches that keep 64, 32, 16 or 8 tokens of a reference")
            ->check(CLI::Range(0.0, 1.0)));
}

}  // namespace

void AddFinetuneCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags = app->add_subcommand(
      "finetune", "Teaches to answer questions from memories, or from the same references as text");
  auto f = std::make_shared<FinetuneFlags>();
  f->run.schedule.peak = 3e-4;
  f->run.schedule.floor = 3e-5;
  f->batch = 32;
  flags
      ->add_option("questions", f->questions,
                   "A .jsonl with question, answers, answer_found, title, passage, doc_id, "
                   "n_title_words")
      ->required();
  flags->add_option("--model", f->model, "Model directory, after continual training")->required();
  flags->add_option("--mode", f->mode, "How references are read")
      ->check(CLI::IsMember({"memory", "text"}))
      ->capture_default_str();
  flags->add_option("--hold_out_ids", f->hold_out_ids,
                    "MODULUS:REMAINDER: leaves out questions whose doc_id is so");
  flags->add_option("--hold_out_titles", f->hold_out_titles,
                    "A .jsonl whose `title` fields name documents whose questions are left out");
  flags->add_option("--title_words", f->title_words, "Only questions with n_title_words at least")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  flags->add_option("--embedder", f->embedder, "Retrieves the other references")
      ->capture_default_str();
  flags
      ->add_option("--tokens_kept", f->kept,
                   "Tokens kept of a reference, VALUE@STEP,…; 0: the model's")
      ->capture_default_str();
  flags
      ->add_option("--retrieved", f->retrieved,
                   "Of a question's other references, how many are its nearest; the rest are other "
                   "questions' of the batch")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  flags
      ->add_option("--cloze", f->cloze,
                   "Part of the questions that are clozes, made of the references")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  flags->add_option("--clozes", f->clozes, "Different clozes")
      ->check(CLI::Range(1, 10000000))
      ->capture_default_str();
  flags->add_option("--rehearse", f->shards,
                    "Shards for a rehearsal of continual training in every batch; none: no "
                    "rehearsal");
  flags->add_option("--rehearsal", f->rehearsal, "Sequences of the rehearsal")
      ->check(CLI::Range(0, 65536))
      ->capture_default_str();
  flags
      ->add_option(
          "--rehearsal_copy", f->rehearsal_copy,
          "Part of these that are copying exercises; few tokens kept cannot hold what they "
          "ask for")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  flags->add_option("--rehearsal_context", f->rehearsal_context, "Tokens of these")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  flags
      ->add_option("--rehearsal_retrieve", f->rehearsal_retrieve,
                   "Part of its sequences of text that read references")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  flags
      ->add_option(
          "--previous_query", f->previous_query,
          "Part of its batches whose query is the 64 tokens before a chunk, not the chunk's "
          "own")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  AddGroupFlags(flags, f.get());
  flags->add_option("--references", f->references, "References searched for the rehearsal")
      ->check(CLI::Range(1, 10000000))
      ->capture_default_str();
  flags->add_flag("--stop_writing_gradient", f->stop_writing_gradient,
                  "No gradient through the writing of memories");
  f->AddTo(flags);
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunFinetune(*f); }});
}

}  // namespace memory3
