// memory3 kb: knowledge bases, their aliases and versions.
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/call.h"
#include "cli/command.h"
#include "cli/text.h"
#include "memory/codec.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;

// The wire's numbers are the record's.
std::string NameOf(v1::Codec codec) { return std::string(CodecName(static_cast<CodecId>(codec))); }

absl::Status List(const Session& session, bool names_only) {
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  absl::StatusOr<v1::ListKnowledgeBasesResponse> reply =
      (*client)->Call(&Stub::ListKnowledgeBases, v1::ListKnowledgeBasesRequest());
  if (!reply.ok()) return reply.status();
  if (names_only) {
    for (const v1::KnowledgeBase& base : reply->knowledge_bases()) {
      std::puts(base.spec().name().c_str());
      for (const std::string& alias : base.aliases()) std::puts(alias.c_str());
    }
    return absl::OkStatus();
  }
  if (session.json) {
    PrintJson(*reply);
    return absl::OkStatus();
  }
  if (reply->knowledge_bases().empty()) {
    std::puts("No knowledge bases yet. `memory3 load NAME FILES…` makes one.");
    return absl::OkStatus();
  }
  Table table(
      {"NAME", "VERSION", "DOCUMENTS", "REFERENCES", "CODEC", "BYTES EACH", "INDEX", "ALIASES"});
  for (const v1::KnowledgeBase& base : reply->knowledge_bases()) {
    table.Add({base.spec().name(), std::to_string(base.version()), HumanCount(base.documents()),
               HumanCount(base.entries()), NameOf(base.spec().codec()),
               HumanBytes(base.bytes_per_reference()), base.index(),
               absl::StrJoin(base.aliases(), ", ")});
  }
  std::fputs(table.ToString().c_str(), stdout);
  return absl::OkStatus();
}

absl::Status Show(const Session& session, const std::string& name) {
  absl::StatusOr<std::unique_ptr<MemoryClient>> client = session.OpenMemory();
  if (!client.ok()) return client.status();
  v1::GetKnowledgeBaseRequest get;
  get.set_knowledge_base(name);
  absl::StatusOr<v1::GetKnowledgeBaseResponse> reply =
      (*client)->Call(&Stub::GetKnowledgeBase, get);
  if (!reply.ok()) return reply.status();
  v1::ListVersionsRequest list;
  list.set_knowledge_base(name);
  absl::StatusOr<v1::ListVersionsResponse> versions = (*client)->Call(&Stub::ListVersions, list);
  if (!versions.ok()) return versions.status();
  if (session.json) {
    PrintJson(*reply);
    PrintJson(*versions);
    return absl::OkStatus();
  }
  const v1::KnowledgeBase& base = reply->knowledge_base();
  const v1::KnowledgeBaseSpec& spec = base.spec();
  const v1::Geometry& geometry = spec.geometry();
  std::cout << spec.name();
  if (!spec.description().empty()) std::cout << ": " << spec.description();
  std::cout << "\n  " << HumanCount(base.documents()) << " documents, "
            << HumanCount(base.entries()) << " references, " << HumanCount(base.records())
            << " distinct memories\n  " << NameOf(spec.codec()) << ", "
            << HumanBytes(base.bytes_per_reference())
            << " a full reference: " << geometry.memory_layers_size() << " layers, "
            << geometry.kv_heads() << " KV heads, " << geometry.tokens_kept() << " of "
            << geometry.reference_tokens() << " tokens, dimension " << geometry.head_dim()
            << "\n  index " << base.index() << " over " << spec.embedding_dimension()
            << " dimensions\n  written by model "
            << absl::BytesToHexString(spec.writer_fingerprint()) << "\n  embedded by     "
            << absl::BytesToHexString(spec.embedder_fingerprint()) << "\n  created "
            << HumanTime(base.created_at()) << " UTC\n";
  if (!base.aliases().empty())
    std::cout << "  aliases " << absl::StrJoin(base.aliases(), ", ") << "\n";
  Table table({"VERSION", "REFERENCES", "MEMORIES", "PUBLISHED AT", "READERS", ""});
  for (const v1::Version& version : versions->versions()) {
    table.Add({std::to_string(version.version()), HumanCount(version.entries()),
               HumanCount(version.records()), HumanTime(version.published_at()),
               std::to_string(version.pins()), version.published() ? "published" : ""});
  }
  std::cout << "\n" << table.ToString() << std::flush;
  return absl::OkStatus();
}

struct Arguments {
  std::string name, alias;
  uint64_t version = 0;
  bool yes = false, names_only = false;
};

}  // namespace

absl::Status Confirm(bool yes, const std::string& question) {
  if (yes) return absl::OkStatus();
  if (isatty(STDIN_FILENO) == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(question, " Give --yes to say so without a terminal"));
  }
  std::cerr << question << " [y/N] " << std::flush;
  std::string answer;
  std::getline(std::cin, answer);
  if (answer == "y" || answer == "yes") return absl::OkStatus();
  return absl::CancelledError("nothing was changed");
}

void AddKnowledgeBaseCommands(CLI::App& app, Commands& commands) {
  CLI::App* kb = app.add_subcommand("kb", "Knowledge bases: list, show, drop, alias, rollback");
  kb->require_subcommand(1);
  const auto arguments = std::make_shared<Arguments>();

  CLI::App* list = kb->add_subcommand("list", "All knowledge bases, a line each");
  list->add_flag("--names", arguments->names_only, "Names and aliases only");
  commands.push_back(
      {list, [=](const Session& session) { return List(session, arguments->names_only); }});

  CLI::App* show = kb->add_subcommand("show", "One knowledge base with its versions");
  show->add_option("NAME", arguments->name, "Name or alias")->required()->type_name(kKnowledgeBase);
  commands.push_back(
      {show, [=](const Session& session) { return Show(session, arguments->name); }});

  CLI::App* drop = kb->add_subcommand("drop", "Delete a knowledge base, or one old version of it");
  drop->add_option("NAME", arguments->name, "Name; no alias")
      ->required()
      ->type_name(kKnowledgeBase);
  const CLI::Option* dropped_version = drop->add_option(
      "--version", arguments->version, "Only this version, which is not published");
  drop->add_flag("--yes", arguments->yes, "Do not ask");
  commands.push_back(
      {drop, [=](const Session& session) -> absl::Status {
         const bool one_version = dropped_version->count() > 0;
         const std::string what =
             one_version ? absl::StrCat("version ", arguments->version, " of ", arguments->name)
                         : absl::StrCat(arguments->name, " with all its memories");
         if (absl::Status status = Confirm(arguments->yes, absl::StrCat("Delete ", what, "?"));
             !status.ok()) {
           return status;
         }
         const auto said = [&](const auto&) { return absl::StrCat("Deleted ", what, "\n"); };
         if (one_version) {
           v1::DropVersionRequest request;
           request.set_knowledge_base(arguments->name);
           request.set_version(arguments->version);
           return CallAndSay(session, &Stub::DropVersion, request, said);
         }
         v1::DeleteKnowledgeBaseRequest request;
         request.set_knowledge_base(arguments->name);
         return CallAndSay(session, &Stub::DeleteKnowledgeBase, request, said);
       }});

  CLI::App* alias = kb->add_subcommand("alias", "Point an alias at a knowledge base, or delete it");
  alias->add_option("ALIAS", arguments->alias)->required();
  alias->add_option("NAME", arguments->name, "Knowledge base; left out: delete the alias")
      ->type_name(kKnowledgeBase);
  commands.push_back(
      {alias, [=](const Session& session) -> absl::Status {
         if (arguments->name.empty()) {
           v1::DeleteAliasRequest request;
           request.set_alias(arguments->alias);
           return CallAndSay(session, &Stub::DeleteAlias, request,
                             [&](const v1::DeleteAliasResponse&) {
                               return absl::StrCat("Deleted alias ", arguments->alias, "\n");
                             });
         }
         v1::SetAliasRequest request;
         request.set_alias(arguments->alias);
         request.set_knowledge_base(arguments->name);
         return CallAndSay(
             session, &Stub::SetAlias, request, [&](const v1::SetAliasResponse& reply) {
               return absl::StrCat(
                   arguments->alias, " → ", arguments->name,
                   reply.previous().empty() ? "" : absl::StrCat(" (was ", reply.previous(), ")"),
                   "\n");
             });
       }});

  CLI::App* rollback = kb->add_subcommand("rollback", "Publish an earlier version again");
  rollback->add_option("NAME", arguments->name, "Name or alias")
      ->required()
      ->type_name(kKnowledgeBase);
  const CLI::Option* version =
      rollback->add_option("--to", arguments->version, "Version; default: the one before");
  commands.push_back({rollback, [=](const Session& session) -> absl::Status {
                        v1::RollbackRequest request;
                        request.set_knowledge_base(arguments->name);
                        if (version->count() > 0) request.set_version(arguments->version);
                        return CallAndSay(session, &Stub::Rollback, request,
                                          [&](const v1::RollbackResponse& reply) {
                                            return absl::StrCat(arguments->name, " is at version ",
                                                                reply.version(), "\n");
                                          });
                      }});
}

}  // namespace memory3
