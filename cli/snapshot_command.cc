// memory3 snapshot, memory3 backup: copies of the whole memory server.
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "cli/call.h"
#include "cli/command.h"
#include "cli/text.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;

struct Arguments {
  std::string name, directory;
  uint64_t backup_id = 0;
  bool yes = false;
};

}  // namespace

void AddSnapshotCommands(CLI::App& app, Commands& commands) {
  const auto arguments = std::make_shared<Arguments>();
  CLI::App* snapshot = app.add_subcommand(
      "snapshot", "Snapshots of the memory server: create, list, restore, delete");
  snapshot->require_subcommand(1);

  CLI::App* create = snapshot->add_subcommand("create", "Keep the store as it is now");
  create->add_option("NAME", arguments->name, "Default: made from the time");
  commands.push_back({create, [=](const Session& session) {
                        v1::CreateSnapshotRequest request;
                        request.set_name(arguments->name);
                        return CallAndSay(session, &Stub::CreateSnapshot, request,
                                          [](const v1::CreateSnapshotResponse& reply) {
                                            return absl::StrCat(
                                                "Created snapshot ", reply.snapshot().name(), ", ",
                                                HumanBytes(reply.snapshot().bytes()), "\n");
                                          });
                      }});

  CLI::App* list = snapshot->add_subcommand("list", "All snapshots, newest first");
  commands.push_back(
      {list, [](const Session& session) {
         return CallAndSay(
             session, &Stub::ListSnapshots, v1::ListSnapshotsRequest(),
             [](const v1::ListSnapshotsResponse& reply) {
               Table table({"NAME", "CREATED", "SIZE"});
               for (const v1::Snapshot& one : reply.snapshots())
                 table.Add({one.name(), HumanTime(one.created_at()), HumanBytes(one.bytes())});
               return table.ToString();
             });
       }});

  CLI::App* restore = snapshot->add_subcommand("restore", "Bring back the store as it was then");
  restore->add_option("NAME", arguments->name)->required();
  restore->add_flag("--yes", arguments->yes, "Do not ask");
  commands.push_back(
      {restore, [=](const Session& session) -> absl::Status {
         if (absl::Status status = Confirm(
                 arguments->yes, absl::StrCat("Replace everything in the store by snapshot ",
                                              arguments->name, "?"));
             !status.ok()) {
           return status;
         }
         v1::RestoreSnapshotRequest request;
         request.set_name(arguments->name);
         return CallAndSay(session, &Stub::RestoreSnapshot, request,
                           [&](const v1::RestoreSnapshotResponse&) {
                             return absl::StrCat("Restored snapshot ", arguments->name, "\n");
                           });
       }});

  CLI::App* remove = snapshot->add_subcommand("delete", "Delete a snapshot");
  remove->add_option("NAME", arguments->name)->required();
  commands.push_back({remove, [=](const Session& session) {
                        v1::DeleteSnapshotRequest request;
                        request.set_name(arguments->name);
                        return CallAndSay(session, &Stub::DeleteSnapshot, request,
                                          [&](const v1::DeleteSnapshotResponse&) {
                                            return absl::StrCat("Deleted snapshot ",
                                                                arguments->name, "\n");
                                          });
                      }});

  CLI::App* backup =
      app.add_subcommand("backup", "Incremental copies on another disk: create, restore");
  backup->require_subcommand(1);
  CLI::App* make = backup->add_subcommand("create", "Copy what is new since the last backup there");
  make->add_option("DIRECTORY", arguments->directory, "Below the server's --backup_root")
      ->required();
  commands.push_back({make, [=](const Session& session) {
                        v1::CreateBackupRequest request;
                        request.set_directory(arguments->directory);
                        return CallAndSay(session, &Stub::CreateBackup, request,
                                          [](const v1::CreateBackupResponse& reply) {
                                            return absl::StrCat("Backup ", reply.backup_id(), ", ",
                                                                HumanBytes(reply.bytes_copied()),
                                                                " copied\n");
                                          });
                      }});
  CLI::App* bring_back = backup->add_subcommand("restore", "Bring a backup back");
  bring_back->add_option("DIRECTORY", arguments->directory, "Below the server's --backup_root")
      ->required();
  const CLI::Option* id =
      bring_back->add_option("--id", arguments->backup_id, "Default: the newest");
  bring_back->add_flag("--yes", arguments->yes, "Do not ask");
  commands.push_back(
      {bring_back, [=](const Session& session) -> absl::Status {
         if (absl::Status status = Confirm(
                 arguments->yes, absl::StrCat("Replace everything in the store by the backup in ",
                                              arguments->directory, "?"));
             !status.ok()) {
           return status;
         }
         v1::RestoreBackupRequest request;
         request.set_directory(arguments->directory);
         if (id->count() > 0) request.set_backup_id(arguments->backup_id);
         return CallAndSay(
             session, &Stub::RestoreBackup, request, [&](const v1::RestoreBackupResponse&) {
               return absl::StrCat("Restored the backup in ", arguments->directory, "\n");
             });
       }});
}

}  // namespace memory3
