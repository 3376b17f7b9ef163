// memory3_evaluate: what `make evaluate` runs. Loads held-out documents into the real memory server
// as memories, asks the real inference server development questions, and reports.
//
// The model's geometry is varied without touching its weights: a directory with another config.json
// and links to the model's files is another model to the servers, with memories of its own.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/servers.h"
#include "cli/writing.h"
#include "evaluation/evaluation_data.h"
#include "evaluation/examination.h"
#include "evaluation/report.h"
#include "memory/vq_codebook.h"
#include "memory/vq_training.h"
#include "trainer/codebook_sampling.h"
#include "transformer/atomic_file.h"
#include "transformer/device.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMostFileBytes = int64_t{1} << 30;
// Servers of a variant with more data than this may take a while to be ready.
constexpr absl::Duration kPatience = absl::Minutes(2);

struct Arguments {
  std::string model = "models/tiny", directory = "build/evaluate";
  std::string prompt = AskRequest().prompt;
  EvaluationDataOptions data = {.directory = "../shared/data"};
  int factbook_documents = 40;
  std::vector<std::string> modes;  // empty: all
  bool no_ablations = false;
};

// One row to measure, and what it is measured with.
struct Plan {
  size_t set = 0;
  ReadingMode reading;
  EvaluationRow row;
};

// The plans that share a model directory and a run of the servers.
struct Variant {
  ExplicitMemoryConfig memory;
  bool unchanged = true;
  std::vector<Plan> plans;
};

// The knowledge bases: the documents in each codec, by its name, and the Factbook, which holds no
// answer.
constexpr const char kFactbook[] = "factbook";

std::vector<int> LayerRange(int first, int count) {
  std::vector<int> layers;
  for (int i = 0; i < count; ++i) layers.push_back(first + i);
  return layers;
}

class Evaluation {
 public:
  explicit Evaluation(const Arguments& arguments) : arguments_(arguments) {}

  absl::Status Run() {
    if (absl::Status status = Prepare(); !status.ok()) return status;
    for (Variant& variant : PlanVariants()) {
      std::erase_if(variant.plans, [&](const Plan& plan) { return IsDone(plan.row); });
      if (variant.plans.empty()) continue;
      if (absl::Status status = Measure(variant); !status.ok()) return status;
    }
    return Report();
  }

 private:
  std::string In(const std::string& name) const { return arguments_.directory + "/" + name; }

  absl::Status Prepare() {
    absl::StatusOr<std::unique_ptr<WritingModel>> model = WritingModel::Open(arguments_.model);
    if (!model.ok()) return model.status();
    config_ = (*model)->config();
    memory_ = (*model)->memory();
    fingerprint_ = (*model)->fingerprint().ToHex();
    std::error_code error;
    fs::create_directories(arguments_.directory, error);
    if (error)
      return absl::FailedPreconditionError(
          absl::StrCat(arguments_.directory, ": ", error.message()));
    if (fs::exists(In("report.json"))) {
      absl::StatusOr<std::string> text = ReadSmallFile(In("report.json"), kMostFileBytes);
      if (!text.ok()) return text.status();
      absl::StatusOr<std::vector<EvaluationRow>> rows = RowsFromJson(*text, In("report.json"));
      if (!rows.ok()) return rows.status();
      rows_ = *std::move(rows);
      // Of another model or other questions: not to be mixed with this run's.
      std::erase_if(rows_, [&](const EvaluationRow& row) { return !IsOfThisRun(row); });
    }
    std::fprintf(stderr, "Reading the held-out articles…\n");
    absl::StatusOr<EvaluationData> data = ReadEvaluationData(arguments_.data);
    if (!data.ok()) return data.status();
    data_ = *std::move(data);
    absl::StatusOr<std::vector<EvaluationDocument>> factbook =
        SampleDocuments(arguments_.data.directory + "/kb/factbook.jsonl.zst",
                        arguments_.factbook_documents, arguments_.data.seed);
    if (!factbook.ok()) return factbook.status();
    absl::Status status = WriteEvaluationDocuments(data_.documents, In("documents.jsonl"));
    if (status.ok()) status = WriteEvaluationDocuments(*factbook, In("factbook.jsonl"));
    return status;
  }

  bool IsOfThisRun(const EvaluationRow& row) const {
    return row.model == fingerprint_ && row.prompt == arguments_.prompt &&
           row.questions_asked == arguments_.data.questions &&
           row.documents == arguments_.data.documents && row.seed == arguments_.data.seed;
  }

  bool IsDone(const EvaluationRow& row) const {
    return std::any_of(rows_.begin(), rows_.end(),
                       [&](const EvaluationRow& done) { return SameSettings(done, row); });
  }

  void Add(const std::string& mode, const std::string& ablation, const ReadingMode& reading,
           Variant* variant) const {
    if (!arguments_.modes.empty() && std::find(arguments_.modes.begin(), arguments_.modes.end(),
                                               mode) == arguments_.modes.end()) {
      return;
    }
    const bool retrieves = !reading.knowledge_base.empty();
    for (size_t set = 0; set < data_.sets.size(); ++set) {
      Plan plan = {.set = set, .reading = reading};
      plan.row.set = data_.sets[set].name;
      plan.row.mode = mode;
      plan.row.ablation = ablation;
      if (retrieves) {
        plan.row.references_per_chunk =
            static_cast<int>(reading.references_per_chunk.value_or(memory_.references_per_chunk));
      }
      if (retrieves && !reading.as_text) {
        plan.row.tokens_kept = variant->memory.tokens_kept;
        plan.row.memory_layers = variant->memory.memory_layers;
      }
      plan.row.model = fingerprint_;
      plan.row.prompt = arguments_.prompt;
      plan.row.questions_asked = arguments_.data.questions;
      plan.row.documents = arguments_.data.documents;
      plan.row.seed = arguments_.data.seed;
      variant->plans.push_back(std::move(plan));
    }
  }

  std::vector<Variant> PlanVariants() const {
    std::vector<Variant> variants;
    Variant model = {.memory = memory_};
    Add("none", "", {}, &model);
    Add("memory", "", {.knowledge_base = "f32"}, &model);
    Add("memory_bf16", "", {.knowledge_base = "bf16"}, &model);
    Add("memory_int8", "", {.knowledge_base = "int8"}, &model);
    Add("memory_gold", "", {.knowledge_base = "f32", .gold = true}, &model);
    Add("text", "", {.knowledge_base = "f32", .as_text = true}, &model);
    Add("text_gold", "", {.knowledge_base = "f32", .as_text = true, .gold = true}, &model);
    Add("memory_factbook", "", {.knowledge_base = kFactbook}, &model);
    if (!arguments_.no_ablations) {
      for (const uint32_t references : {1U, 3U, 5U, 8U})
        Add("memory", "references_per_chunk",
            {.knowledge_base = "f32", .references_per_chunk = references}, &model);
    }
    Add("memory_vq", "", {.knowledge_base = "vq"}, &model);  // last: its codebook takes long
    variants.push_back(std::move(model));
    if (arguments_.no_ablations) return variants;

    for (const int kept : {4, 8, 16, 32, memory_.reference_tokens}) {
      Variant variant = {.memory = memory_, .unchanged = kept == memory_.tokens_kept};
      variant.memory.tokens_kept = kept;
      Add("memory_bf16", "tokens_kept", {.knowledge_base = "bf16"}, &variant);
      variants.push_back(std::move(variant));
    }
    const int layers = config_.layers, half = layers / 2;
    for (const std::vector<int>& chosen :
         {LayerRange(0, half), LayerRange((layers - half) / 2, half), LayerRange(0, layers)}) {
      Variant variant = {.memory = memory_, .unchanged = chosen == memory_.memory_layers};
      variant.memory.memory_layers = chosen;
      Add("memory_bf16", "memory_layers", {.knowledge_base = "bf16"}, &variant);
      variants.push_back(std::move(variant));
    }
    return variants;
  }

  // The model with another geometry, beside links to its files.
  absl::StatusOr<std::string> MakeModel(const Variant& variant) const {
    if (variant.unchanged) return arguments_.model;
    std::string directory = In("model");
    std::error_code error;
    fs::remove_all(directory, error);
    fs::create_directories(directory, error);
    for (const auto& file : fs::directory_iterator(arguments_.model, error)) {
      const std::string name = file.path().filename().string();
      if (name == "config.json" || !file.is_regular_file()) continue;
      fs::create_symlink(fs::canonical(file.path()), directory + "/" + name, error);
    }
    if (error) return absl::FailedPreconditionError(absl::StrCat(directory, ": ", error.message()));
    absl::StatusOr<std::string> text =
        ReadSmallFile(arguments_.model + "/config.json", kMostFileBytes);
    if (!text.ok()) return text.status();
    absl::StatusOr<nlohmann::json> config = ParseJson(*text, arguments_.model + "/config.json");
    if (!config.ok()) return config.status();
    ModelConfig changed = config_;
    changed.explicit_memory = variant.memory;
    const absl::StatusOr<nlohmann::json> with = ParseJson(ModelConfigToJson(changed), "config");
    if (!with.ok()) return with.status();
    (*config)["explicit_memory"] = (*with)["explicit_memory"];
    absl::Status status = WriteFileAtomically(directory + "/config.json", config->dump(2) + "\n");
    if (!status.ok()) return status;
    return directory;
  }

  // vq's, trained on memories of the Factbook, which is not what is asked about. Kept for the next
  // run of the same model.
  absl::StatusOr<std::string> MakeCodebook() const {
    std::string path = In(absl::StrCat("codebook-", fingerprint_.substr(0, 16), ".m3cb"));
    if (fs::exists(path)) return path;
    std::fprintf(stderr, "Training the vq codec's codebook…\n");
    const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    absl::StatusOr<std::unique_ptr<Device>> device = MakeCpuDevice({.threads = threads});
    if (!device.ok()) return device.status();
    absl::StatusOr<std::unique_ptr<WritingModel>> model = WritingModel::Open(arguments_.model);
    if (!model.ok()) return model.status();
    absl::Status status = (*model)->LoadWriter(device->get(), WeightFormat::kF32, 0);
    if (!status.ok()) return status;
    const VqTrainingOptions options;
    const absl::StatusOr<CodebookSample> sample =
        SampleVectors({.inputs = {In("factbook.jsonl")},
                       .vectors = kVectorsPerCentroid << options.coarse_bits,
                       .seed = arguments_.data.seed,
                       .threads = threads},
                      **model, [](bool, int64_t, int64_t) {});
    if (!sample.ok()) return sample.status();
    absl::StatusOr<VqTraining> trained =
        TrainVqCodebook(sample->training, config_.head_dim, options);
    if (!trained.ok()) return trained.status();
    absl::StatusOr<std::string> bytes = SerializeCodebook(trained->codebook);
    if (!bytes.ok()) return bytes.status();
    if (status = WriteFileAtomically(path, *bytes); !status.ok()) return status;
    return path;
  }

  // INTERNAL where the whole of it was not loaded.
  absl::StatusOr<MemoryWritingResult> Load(const Session& session, const std::string& model,
                                           const std::string& knowledge_base) const {
    const bool factbook = knowledge_base == kFactbook;
    WritingFlags flags;
    flags.model = model;
    flags.codec = factbook ? "bf16" : knowledge_base;
    if (flags.codec == "vq") {
      absl::StatusOr<std::string> codebook = MakeCodebook();
      if (!codebook.ok()) return codebook.status();
      flags.codebook = *codebook;
    }
    flags.writing.knowledge_base = knowledge_base;
    flags.writing.inputs = {In(factbook ? "factbook.jsonl" : "documents.jsonl")};
    absl::StatusOr<MemoryWritingResult> result = LoadDocuments(session, flags, /*quiet=*/false);
    if (result.ok() && result->progress.counts.skipped > 0)
      return absl::InternalError(absl::StrCat(result->progress.counts.skipped,
                                              " documents were skipped: ", result->warnings[0]));
    return result;
  }

  absl::Status Measure(const Variant& variant) {
    std::fprintf(stderr, "%d of %d tokens kept, layers %s\n", variant.memory.tokens_kept,
                 variant.memory.reference_tokens,
                 absl::StrJoin(variant.memory.memory_layers, " ").c_str());
    absl::StatusOr<std::string> model = MakeModel(variant);
    if (!model.ok()) return model.status();
    const std::string store = In("store");
    std::error_code error;
    fs::remove_all(store, error);
    Session session;
    absl::StatusOr<std::string> memory = FreeAddress(), inference = FreeAddress();
    if (!memory.ok()) return memory.status();
    if (!inference.ok()) return inference.status();
    session.memory_server = *memory;
    session.inference_server = *inference;
    absl::Status status;
    {
      absl::StatusOr<std::unique_ptr<Servers>> servers =
          Servers::Start({.memory_server = {"--data=" + store, "--listen=" + *memory},
                          .inference_server = {"--model=" + *model, "--memory=" + *memory,
                                               "--listen=" + *inference}},
                         session.tls, kPatience, arguments_.directory);
      if (!servers.ok()) return servers.status();
      status = AskAll(session, *model, variant.plans, **servers);
    }
    fs::remove_all(store, error);  // gigabytes
    return status;
  }

  absl::Status AskAll(const Session& session, const std::string& model,
                      const std::vector<Plan>& plans, Servers& servers) {
    absl::StatusOr<std::unique_ptr<v1::InferenceService::Stub>> stub = session.OpenInference();
    if (!stub.ok()) return stub.status();
    std::map<std::string, MemoryWritingResult> loaded;
    for (const Plan& plan : plans) {
      EvaluationRow row = plan.row;
      const std::string& base = plan.reading.knowledge_base;
      if (!base.empty()) {
        if (!loaded.contains(base)) {
          absl::StatusOr<MemoryWritingResult> result = Load(session, model, base);
          if (!result.ok()) return result.status();
          loaded[base] = *std::move(result);
        }
        const MemoryWritingResult& load = loaded[base];
        row.references = load.progress.counts.references;
        row.bytes_per_reference =
            static_cast<double>(plan.reading.as_text ? load.text_bytes : load.record_bytes) /
            static_cast<double>(row.references);
      }
      if (absl::Status status = servers.Running(); !status.ok()) return status;
      absl::Status status =
          Examine(session, **stub, data_.sets[plan.set], plan.reading, arguments_.prompt, &row);
      if (!status.ok()) return status;
      rows_.push_back(std::move(row));
      if (status = WriteFileAtomically(In("report.json"), RowsToJson(rows_)); !status.ok())
        return status;
    }
    return absl::OkStatus();
  }

  absl::Status Report() const {
    const std::string table = RowsToMarkdown(rows_);
    std::fputs(table.c_str(), stdout);
    absl::Status status = WriteFileAtomically(In("table.md"), table);
    for (const auto& [ablation, name] : {std::pair{"", "modes"},
                                         {"references_per_chunk", "references_per_chunk"},
                                         {"tokens_kept", "tokens_kept"},
                                         {"memory_layers", "memory_layers"}}) {
      const std::string svg = RowsToSvg(rows_, ablation);
      if (status.ok() && !svg.empty())
        status = WriteFileAtomically(In(absl::StrCat(name, ".svg")), svg);
    }
    if (status.ok()) std::printf("%s, table.md and plots beside it\n", In("report.json").c_str());
    return status;
  }

  const Arguments& arguments_;
  ModelConfig config_;
  ExplicitMemoryConfig memory_;
  std::string fingerprint_;
  EvaluationData data_;
  std::vector<EvaluationRow> rows_;
};

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  memory3::Arguments arguments;
  CLI::App app(
      "Measures answers with and without memory through the real servers. Run again, it goes on "
      "after the last row that is in report.json.",
      "memory3_evaluate");
  app.add_option("--model", arguments.model, "Model directory")->capture_default_str();
  app.add_option("--data", arguments.data.directory, "The shared data")
      ->envname("MEMORY3_DATA")
      ->capture_default_str();
  app.add_option("--directory", arguments.directory, "Where report.json, table.md and plots go")
      ->capture_default_str();
  app.add_option("--questions", arguments.data.questions, "Of each set")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_option("--documents", arguments.data.documents, "Paragraphs in the knowledge base")
      ->check(CLI::Range(1, 100000000))
      ->capture_default_str();
  app.add_option("--factbook_documents", arguments.factbook_documents,
                 "Entities of the Factbook in a knowledge base without answers")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_option("--seed", arguments.data.seed, "Of the samples")->capture_default_str();
  app.add_option("--prompt", arguments.prompt, "How a question is put; {} stands for it")
      ->capture_default_str();
  app.add_option("--modes", arguments.modes, "Only these, for example none memory text");
  app.add_flag("--no_ablations", arguments.no_ablations, "The modes only");
  CLI11_PARSE(app, argc, argv);
  memory3::CatchInterrupts();
  const absl::Status status = memory3::Evaluation(arguments).Run();
  if (!status.ok())
    std::fprintf(stderr, "memory3_evaluate: %s\n", std::string(status.message()).c_str());
  return memory3::ExitCode(status);
}
