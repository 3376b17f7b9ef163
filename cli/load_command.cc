// memory3 load: documents into a knowledge base, as one bulk load. memory3 kb create: an empty one.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "cli/command.h"
#include "cli/text.h"
#include "cli/writing.h"
#include "nlohmann/json.hpp"
#include "trainer/knowledge_base_setup.h"

namespace memory3 {
namespace {

void PrintLoad(const Session& session, const std::string& name, const MemoryWritingResult& result) {
  const ReferenceCounts& counts = result.progress.counts;
  if (session.json) {
    const nlohmann::json json = {{"knowledge_base", name},
                                 {"version", result.version},
                                 {"load_id", result.load_id},
                                 {"committed", result.committed},
                                 {"nothing_to_do", result.nothing_to_do},
                                 {"resumed", result.resumed},
                                 {"documents", counts.documents},
                                 {"references", counts.references},
                                 {"skipped", counts.skipped},
                                 {"record_bytes", result.record_bytes},
                                 {"warnings", result.warnings}};
    std::puts(json.dump().c_str());
    return;
  }
  for (const std::string& warning : result.warnings) std::fprintf(stderr, "%s\n", warning.c_str());
  if (counts.skipped > 0)
    std::fprintf(stderr, "%lld documents were skipped\n", static_cast<long long>(counts.skipped));
  if (result.nothing_to_do) {
    std::printf("%s holds these documents already (version %llu); --label loads them again\n",
                name.c_str(), static_cast<unsigned long long>(result.version));
    return;
  }
  std::printf("%s: version %llu, %s documents in %s references%s\n", name.c_str(),
              static_cast<unsigned long long>(result.version),
              HumanCount(static_cast<uint64_t>(counts.documents)).c_str(),
              HumanCount(static_cast<uint64_t>(counts.references)).c_str(),
              result.resumed ? " (went on with an interrupted load)" : "");
}

absl::Status Load(const Session& session, const WritingFlags& flags) {
  const absl::StatusOr<MemoryWritingResult> result = LoadDocuments(session, flags, session.json);
  if (absl::IsUnavailable(result.status())) {
    return absl::UnavailableError(absl::StrCat(std::string(result.status().message()),
                                               "; the same command goes on from here"));
  }
  if (!result.ok()) return result.status();
  PrintLoad(session, flags.writing.knowledge_base, *result);
  return absl::OkStatus();
}

absl::Status Create(const Session& session, const WritingFlags& flags) {
  absl::StatusOr<MemoryWritingOptions> options = ToOptions(flags);
  if (!options.ok()) return options.status();
  absl::StatusOr<std::unique_ptr<Embedder>> embedder = MakeEmbedder(flags.embedder, {});
  if (!embedder.ok()) return embedder.status();
  absl::StatusOr<std::unique_ptr<WritingModel>> model = WritingModel::Open(flags.model);
  if (!model.ok()) return model.status();
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  const absl::StatusOr<TargetKnowledgeBase> made =
      OpenOrCreateKnowledgeBase(*options, **model, **embedder, client->get());
  if (!made.ok()) return made.status();
  v1::GetKnowledgeBaseRequest get;
  get.set_knowledge_base(options->knowledge_base);
  const absl::StatusOr<v1::GetKnowledgeBaseResponse> reply =
      (*client)->Call(&MemoryClient::Stub::GetKnowledgeBase, get);
  if (!reply.ok()) return reply.status();
  if (session.json) {
    PrintJson(*reply);
  } else {
    std::printf("%s: %s a full reference\n", options->knowledge_base.c_str(),
                HumanBytes(reply->knowledge_base().bytes_per_reference()).c_str());
  }
  return absl::OkStatus();
}

}  // namespace

void AddLoadCommand(CLI::App& app, Commands& commands) {
  const auto flags = std::make_shared<WritingFlags>();
  CLI::App* load = app.add_subcommand(
      "load",
      "Load documents into a knowledge base; the same command again goes on where it stopped");
  load->add_option("KB", flags->writing.knowledge_base, "Made where it is missing")
      ->required()
      ->type_name(kKnowledgeBase);
  load->add_option("FILES", flags->writing.inputs, ".txt or .jsonl, also .gz or .zst")->required();
  flags->AddTo(*load);
  load->add_flag("--replace", flags->writing.replace,
                 "Instead of what is there; default: added to it");
  load->add_option("--label", flags->writing.label, "Another label loads the same files again");
  load->add_option("--device", flags->device, "That writes")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  load->add_option("--weights", flags->weights, "What the model computes with")
      ->check(CLI::IsMember({"f32", "bf16", "int8"}))
      ->capture_default_str();
  load->add_option("--threads", flags->threads, "0: one per core")->check(CLI::Range(0, 1024));
  load->add_option("--text_field", flags->writing.documents.text_field, "Of a .jsonl")
      ->capture_default_str();
  load->add_option("--title_field", flags->writing.documents.title_field)->capture_default_str();
  load->add_option("--id_field", flags->writing.documents.id_field)->capture_default_str();
  load->add_option("--uri_field", flags->writing.documents.uri_field, "Default: uri, or url");
  flags->writing.documents.metadata_field = "metadata";
  load->add_option("--metadata_field", flags->writing.documents.metadata_field,
                   "An object of the operator's own pairs, which filters match on; empty: none")
      ->capture_default_str();
  load->add_flag("--strict", flags->writing.documents.strict,
                 "A bad line is an error, not skipped");
  commands.push_back({load, [=](const Session& session) { return Load(session, *flags); }});

  const auto create_flags = std::make_shared<WritingFlags>();
  CLI::App* create =
      app.get_subcommand("kb")->add_subcommand("create", "Make an empty knowledge base");
  create->add_option("NAME", create_flags->writing.knowledge_base)->required();
  create_flags->AddTo(*create);
  commands.push_back(
      {create, [=](const Session& session) { return Create(session, *create_flags); }});
}

}  // namespace memory3
