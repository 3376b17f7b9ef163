// `trainer pretrain` and `trainer export`.
#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "trainer/command.h"
#include "trainer/continual.h"
#include "trainer/copy_evaluation.h"
#include "trainer/copying_parameters.h"
#include "trainer/corpus.h"
#include "trainer/progress.h"
#include "trainer/reference_index.h"
#include "trainer/run_checkpoint.h"
#include "trainer/run_flags.h"
#include "trainer/training_run.h"
#include "transformer/checkpoint.h"
#include "transformer/parameters.h"

namespace memory3 {
namespace {

using nlohmann::json;

struct PretrainFlags : RunFlags {
  std::string stage = "warmup", tokenizer, model, initial = "random";
  std::vector<std::string> shards;
  DeviceFlags device;
  ModelConfig config;  // of a new model
  bool untied = false, no_shuffle = false;
  int context = 256;

  // Continual stage.
  std::string embedder = "lexical", kept = "128@0", level = "0@0";
  ContinualOptions continual;
  ReferenceIndex::Options references;
  std::vector<int> memory_layers;
  bool stop_writing_gradient = false;
  int64_t copy_every = 100;
  int copy_exercises = 50;
};

void AddModelFlags(CLI::App* flags, PretrainFlags* f) {
  ModelConfig* const c = &f->config;
  bool* const untied = &f->untied;
  c->hidden_size = 256;
  c->intermediate_size = 704;
  c->layers = 6;
  c->heads = 8;
  c->kv_heads = 4;
  c->max_position_embeddings = 2048;
  const auto add = [&](const char* name, int* value, const char* help) {
    flags->add_option(name, *value, help)
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str()
        ->group("New model");
  };
  add("--hidden", &c->hidden_size, "Width");
  add("--intermediate", &c->intermediate_size, "Width of the MLP");
  add("--layers", &c->layers, "Blocks");
  add("--heads", &c->heads, "Query heads; the head size is hidden / heads");
  add("--kv_heads", &c->kv_heads, "Key/value heads");
  flags->add_option("--rope_theta", c->rope_theta, "Base of the rotary frequencies")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group("New model");
  add("--max_positions", &c->max_position_embeddings, "max_position_embeddings");
  flags
      ->add_option("--initial", f->initial,
                   "Weights to start from: random, or copying: with heads that copy in the context")
      ->check(CLI::IsMember({"random", "copying"}))
      ->capture_default_str()
      ->group("New model");
  flags->add_flag("--untied", *untied, "An lm_head of its own")->group("New model");
}

void AddTextFlags(CLI::App* flags, PretrainFlags* f) {
  flags->add_option("--context", f->context, "Tokens of a sequence, <s> included")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  flags
      ->add_option(
          "--copy", f->continual.copy,
          "Part of the sequences that are copying exercises; default: 0.3 in the continual "
          "stage, else 0")
      ->check(CLI::Range(0.0, 1.0));
  flags->add_flag("--no_shuffle", f->no_shuffle, "Windows in the shards' order");
}

void AddContinualFlags(CLI::App* flags, PretrainFlags* f) {
  const auto group = [](CLI::Option* o) { return o->capture_default_str()->group("Continual"); };
  group(flags->add_option("--memory_layers", f->memory_layers,
                          "Layers that read memories, of a model that has none yet; default: the "
                          "first half"));
  group(flags->add_option("--embedder", f->embedder, "Retrieves references"));
  group(flags
            ->add_option("--references", f->references.most,
                         "References searched, drawn from the shards; 4 KiB each")
            ->check(CLI::Range(1, 10000000)));
  group(flags->add_option("--tokens_kept", f->kept,
                          "Tokens kept of a reference, VALUE@STEP,…: 128@0,32@2000,8@4000"));
  group(flags->add_option("--copy_level", f->level,
                          "Copying exercises up to: 0 in the context, 1 one memory, 2 a chunk's "
                          "worth of memories; VALUE@STEP,…"));
  group(flags
            ->add_option("--retrieve", f->continual.retrieve,
                         "Part of the sequences of text that read references; the rest is ordinary "
                         "language modelling")
            ->check(CLI::Range(0.0, 1.0)));
  group(flags
            ->add_option("--previous_query", f->continual.previous_query,
                         "Part of the batches whose query is the 64 tokens before a chunk, not the "
                         "chunk's own")
            ->check(CLI::Range(0.0, 1.0)));
  group(flags
            ->add_option("--same_document", f->continual.retrieval.same_document,
                         "Probability that a chunk's reference is another piece of its document")
            ->check(CLI::Range(0.0, 1.0)));
  group(flags
            ->add_option("--overlap_limit", f->continual.retrieval.overlap_limit,
                         "Rejects references that overlap the sequence more; 1: none")
            ->check(CLI::Range(0.0, 1.0)));
  flags
      ->add_flag("--stop_writing_gradient", f->stop_writing_gradient,
                 "No gradient through the writing of memories")
      ->group("Continual");
  group(flags
            ->add_option("--copy_every", f->copy_every,
                         "Steps between measurements of exact match on copying; 0: none")
            ->check(CLI::NonNegativeNumber));
  group(flags->add_option("--copy_exercises", f->copy_exercises, "Values of each measurement")
            ->check(CLI::Range(1, 100000)));
}

absl::StatusOr<ModelConfig> NewModel(const PretrainFlags& f, const Tokenizer& tokenizer) {
  ModelConfig c = f.config;
  if (c.hidden_size % c.heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("hidden: ", c.hidden_size, " is no multiple of heads, ", c.heads));
  }
  c.head_dim = c.hidden_size / c.heads;
  c.vocab_size = tokenizer.vocab_size();
  c.bos_token_id = tokenizer.bos_id();
  if (tokenizer.eos_id() >= 0) c.eos_token_ids = {tokenizer.eos_id()};
  c.tie_word_embeddings = !f.untied;
  return c;
}

// What continual training has beyond warm-up.
struct ContinualStage {
  std::unique_ptr<Embedder> embedder;
  std::unique_ptr<ReferenceIndex> index;
  std::unique_ptr<ContinualBatches> batches;
  StepSchedule kept;

  absl::Status Prepare(PretrainFlags& f, const ModelConfig& config, const Tokenizer& tokenizer,
                       const TokenCorpus& corpus, WindowOrder order) {
    const int most = config.explicit_memory->reference_tokens;
    auto kept_steps = StepSchedule::Parse(f.kept, "tokens_kept", 1, most);
    if (!kept_steps.ok()) return kept_steps.status();
    auto level = StepSchedule::Parse(f.level, "copy_level", 0, 2);
    if (!level.ok()) return level.status();
    kept = f.continual.kept = *kept_steps;
    f.continual.level = *level;
    f.continual.sequences = f.batch;
    f.continual.tokens = f.context;
    f.continual.accumulate = f.run.accumulate;
    f.continual.gradient_through_writing = !f.stop_writing_gradient;
    f.continual.seed = f.references.seed = f.seed;
    f.references.reference_tokens = most;
    f.run.settings["continual"] = {{"embedder", f.embedder},
                                   {"references", f.references.most},
                                   {"tokens_kept", f.kept},
                                   {"copy_level", f.level},
                                   {"retrieve", f.continual.retrieve},
                                   {"previous_query", f.continual.previous_query},
                                   {"same_document", f.continual.retrieval.same_document},
                                   {"overlap_limit", f.continual.retrieval.overlap_limit},
                                   {"stop_writing_gradient", f.stop_writing_gradient}};
    auto made = MakeEmbedder(f.embedder, {.threads = f.device.threads});
    if (!made.ok()) return made.status();
    embedder = *std::move(made);
    Progress progress("embedding", "references");
    auto built =
        ReferenceIndex::Build(&corpus, &tokenizer, embedder.get(), f.references,
                              [&](int64_t done, int64_t total) { progress.Update(done, total); });
    if (!built.ok()) return built.status();
    index = *std::move(built);
    batches = std::make_unique<ContinualBatches>(&config, &tokenizer, &corpus, index.get(),
                                                 std::move(order), f.continual);
    return absl::OkStatus();
  }
};

absl::Status LoadInitial(const PretrainFlags& f, const ModelConfig& config,
                         const Checkpoint* checkpoint, Parameters* parameters) {
  if (checkpoint != nullptr) return parameters->Load(*checkpoint);
  if (f.initial == "random") return parameters->Load(InitialParameters(f.seed, config.layers));
  auto copying = CopyingParameters::Create(config, f.seed);
  if (!copying.ok()) return copying.status();
  return parameters->Load(**copying);
}

absl::Status RunPretrain(PretrainFlags& f) {
  StopOnSignals();
  const std::string tokenizer_directory = f.tokenizer.empty() ? f.model : f.tokenizer;
  if (tokenizer_directory.empty()) {
    return absl::InvalidArgumentError("tokenizer: needed for a new model");
  }
  auto tokenizer = OpenAnyTokenizer(tokenizer_directory);
  if (!tokenizer.ok()) return tokenizer.status();
  std::unique_ptr<Checkpoint> initial;
  absl::StatusOr<ModelConfig> config;
  if (f.model.empty()) {
    config = NewModel(f, **tokenizer);
  } else {
    auto checkpoint = Checkpoint::Open(f.model);
    if (!checkpoint.ok()) return checkpoint.status();
    initial = *std::move(checkpoint);
    config = initial->config();
    auto fits = OpenTokenizer(tokenizer_directory, *config);
    if (!fits.ok()) return fits.status();
  }
  if (!config.ok()) return config.status();
  const bool continual = f.stage == "continual";
  if (f.continual.copy < 0) f.continual.copy = continual ? 0.3 : 0;
  if (continual && !config->explicit_memory) {
    ExplicitMemoryConfig& memory = config->explicit_memory.emplace();
    memory.memory_layers = f.memory_layers;
    for (int i = 0; f.memory_layers.empty() && i < (config->layers + 1) / 2; ++i) {
      memory.memory_layers.push_back(i);
    }
    memory.prefix_token_ids = PrefixTokenIds(**tokenizer);
  }
  if (continual) {
    // The model keeps what it was trained to read at the end.
    auto kept =
        StepSchedule::Parse(f.kept, "tokens_kept", 1, config->explicit_memory->reference_tokens);
    if (!kept.ok()) return kept.status();
    config->explicit_memory->tokens_kept = kept->At(f.run.schedule.steps - 1);
  }
  int taken = 0;  // positions before the sequence
  if (continual) {
    taken = static_cast<int>(config->explicit_memory->prefix_token_ids.size()) +
            config->explicit_memory->reference_tokens;
  }
  if (f.context + taken > config->max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("context: ", f.context, " is above the model's ",
                                                   config->max_position_embeddings - taken));
  }
  auto corpus = TokenCorpus::Open(f.shards, (*tokenizer)->file_hash());
  if (!corpus.ok()) return corpus.status();
  auto order = WindowOrder::Create(corpus->get(), f.context, f.seed, !f.no_shuffle);
  if (!order.ok()) return order.status();
  auto device = f.device.Make();
  if (!device.ok()) return device.status();
  auto parameters = Parameters::Create(device->get(), *config);
  if (!parameters.ok()) return parameters.status();
  if (absl::Status status = LoadInitial(f, *config, initial.get(), parameters->get());
      !status.ok()) {
    return status;
  }

  f.Apply();
  f.run.settings = {{"stage", f.stage},
                    {"model", json::parse(ModelConfigToJson(*config))},
                    {"tokenizer", (*tokenizer)->file_hash().ToHex()},
                    {"data", (*corpus)->digest()},
                    {"seed", f.seed},
                    {"initial", f.model.empty() ? f.initial : "model"},
                    {"shuffle", !f.no_shuffle},
                    {"context", f.context},
                    {"batch", f.batch},
                    {"copy", f.continual.copy}};
  std::printf("%lld parameters, %lld tokens in the shards, %lld windows, %s\n",
              static_cast<long long>((*parameters)->size()),
              static_cast<long long>((*corpus)->tokens()), static_cast<long long>(order->windows()),
              (*device)->name().c_str());
  std::fflush(stdout);
  if (absl::Status status =
          SaveModelOnce(**parameters, f.run.directory + "/initial", tokenizer_directory);
      !status.ok()) {
    return status;
  }
  WarmupBatches warmup(&*config, corpus->get(), *order,
                       {f.batch, f.context, f.continual.copy, f.seed});
  BatchSource* batches = &warmup;
  ContinualStage stage;
  if (continual) {
    absl::Status status = stage.Prepare(f, *config, **tokenizer, **corpus, *std::move(order));
    if (!status.ok()) return status;
    batches = stage.batches.get();
  }
  Recomputed recomputed(batches);
  if (f.recompute) batches = &recomputed;
  const auto measure = [&](int64_t step, json* metrics) -> absl::Status {
    if (f.copy_every == 0 || (step % f.copy_every != 0 && step != f.run.schedule.steps)) {
      return absl::OkStatus();
    }
    const int kept = stage.kept.At(step - 1);
    (*metrics)["tokens_kept"] = kept;
    for (int level = 0; level <= 2; ++level) {
      const auto match = CopyExactMatch(**parameters, static_cast<CopyLevel>(level), kept,
                                        f.copy_exercises, f.seed + 0xe7a1);
      if (!match.ok()) return match.status();
      (*metrics)[absl::StrCat("match_", CopyLevelName(static_cast<CopyLevel>(level)))] = *match;
    }
    return absl::OkStatus();
  };
  absl::StatusOr<RunOutcome> outcome =
      continual ? RunTraining(parameters->get(), batches, f.run, measure)
                : RunTraining(parameters->get(), batches, f.run, nullptr);
  if (!outcome.ok()) return outcome.status();
  if (!outcome->finished) {
    std::printf("stopped at step %lld; the same command goes on from there\n",
                static_cast<long long>(outcome->step));
    return absl::OkStatus();
  }
  const std::string out = f.run.directory + "/model";
  if (absl::Status status = SaveModelOnce(**parameters, out, tokenizer_directory); !status.ok()) {
    return status;
  }
  std::printf("%s: %lld steps\n", out.c_str(), static_cast<long long>(outcome->step));
  return absl::OkStatus();
}

struct ExportFlags {
  std::string checkpoint, tokenizer, out, dtype = "f32";
  DeviceFlags device;
};

absl::Status RunExport(const ExportFlags& f) {
  absl::StatusOr<json> about = ReadRunCheckpointAbout(f.checkpoint);
  if (!about.ok()) return about.status();
  const json model = about->value("settings", json::object()).value("model", json::object());
  absl::StatusOr<ModelConfig> config = ParseModelConfig(model.dump(), f.checkpoint);
  if (!config.ok()) return config.status();
  auto tokenizer = OpenTokenizer(f.tokenizer, *config);
  if (!tokenizer.ok()) return tokenizer.status();
  auto device = f.device.Make();
  if (!device.ok()) return device.status();
  auto parameters = Parameters::Create(device->get(), *config);
  if (!parameters.ok()) return parameters.status();
  absl::Status status = LoadRunCheckpoint(f.checkpoint, parameters->get(), nullptr, nullptr);
  if (!status.ok()) return status;
  return (*parameters)->Save(f.out, f.dtype == "bf16" ? DType::kBF16 : DType::kF32, f.tokenizer);
}

}  // namespace

void AddPretrainCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags = app->add_subcommand("pretrain", "Trains a model on token shards");
  auto f = std::make_shared<PretrainFlags>();
  flags->add_option("shards", f->shards, "Directories of shards (trainer pack), or shards")
      ->required();
  flags
      ->add_option("--stage", f->stage,
                   "warmup: ordinary language modelling; continual: with memories")
      ->check(CLI::IsMember({"warmup", "continual"}))
      ->capture_default_str();
  flags->add_option("--model", f->model, "Model directory to start from; none: a new model");
  flags->add_option("--tokenizer", f->tokenizer,
                    "Directory of the tokenizer; default: the model's");
  f->AddTo(flags);
  AddTextFlags(flags, f.get());
  AddContinualFlags(flags, f.get());
  AddModelFlags(flags, f.get());
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunPretrain(*f); }});
}

void AddExportCommand(CLI::App* app, Commands* commands) {
  CLI::App* flags = app->add_subcommand("export", "Writes a run's checkpoint as a model directory");
  auto f = std::make_shared<ExportFlags>();
  flags->add_option("checkpoint", f->checkpoint, "checkpoint-*.m3c")->required();
  flags->add_option("--tokenizer", f->tokenizer, "Directory of the tokenizer")->required();
  flags->add_option("--out", f->out, "The model directory to write")->required();
  flags->add_option("--dtype", f->dtype)
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  f->device.AddTo(flags);
  commands->push_back({flags, [f] { return RunExport(*f); }});
}

}  // namespace memory3
