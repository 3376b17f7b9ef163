// Black-box tests of `memory3`: what it prints, what it changes, and its exit codes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "memory_server/client.h"
#include "tests/child_process.h"

namespace memory3 {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Ran {
  int code;
  std::string output;
};

Ran RunCli(const std::vector<std::string>& arguments,
           const std::map<std::string, std::string>& environment = {}) {
  ChildProcess process("memory3", arguments, environment);
  const int code = process.Wait();
  return {code, process.output()};
}

class CliTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::path(::testing::TempDir()) /
                 absl::StrCat("cli_test_", getpid(), "_",
                              ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
    server_ = std::make_unique<ChildProcess>(
        "memory_server",
        std::vector<std::string>{"--data", (directory_ / "data").string(), "--listen",
                                 "127.0.0.1:0", "--backup_root", (directory_ / "backup").string()});
    const std::optional<std::string> port = server_->WaitForLine(R"(gRPC on port (\d+))");
    ASSERT_TRUE(port) << server_->output();
    address_ = "localhost:" + *port;
  }
  void TearDown() override {
    server_.reset();
    std::filesystem::remove_all(directory_);
  }

  void Create(const std::string& name) {
    absl::StatusOr<std::unique_ptr<MemoryClient>> client =
        MemoryClient::Create({.target = address_});
    ASSERT_TRUE(client.ok()) << client.status();
    v1::CreateKnowledgeBaseRequest request;
    v1::KnowledgeBaseSpec& spec = *request.mutable_spec();
    spec.set_name(name);
    spec.set_writer_fingerprint(std::string(32, '\1'));
    spec.set_embedder_fingerprint(std::string(32, '\2'));
    spec.set_codec(v1::CODEC_BF16);
    spec.set_embedding_dimension(8);
    v1::Geometry& geometry = *spec.mutable_geometry();
    geometry.add_memory_layers(0);
    geometry.set_kv_heads(2);
    geometry.set_head_dim(16);
    geometry.set_tokens_kept(8);
    geometry.set_reference_tokens(128);
    const auto reply = (*client)->Call(&MemoryClient::Stub::CreateKnowledgeBase, request);
    ASSERT_TRUE(reply.ok()) << reply.status();
  }

  Ran Memory3(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--memory_server", address_});
    return RunCli(arguments);
  }

  std::filesystem::path directory_;
  std::unique_ptr<ChildProcess> server_;
  std::string address_;
};

TEST_F(CliTest, KnowledgeBasesAreListedShownAliasedAndDropped) {
  Ran ran = Memory3({"kb", "list"});
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, HasSubstr("No knowledge bases yet"));
  Create("atlas");
  Create("birds");
  ran = Memory3({"kb", "alias", "current", "atlas"});
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_EQ(ran.output, "current → atlas\n");
  ran = Memory3({"kb", "alias", "current", "birds"});
  EXPECT_EQ(ran.output, "current → birds (was atlas)\n");
  ran = Memory3({"kb", "list"});
  EXPECT_EQ(ran.code, 0);
  EXPECT_THAT(ran.output, AllOf(HasSubstr("atlas"), HasSubstr("birds"), HasSubstr("current"),
                                HasSubstr("bf16"), HasSubstr("1.1 KiB")));
  ran = Memory3({"kb", "list", "--names"});
  EXPECT_EQ(ran.output, "atlas\nbirds\ncurrent\n");
  ran = Memory3({"kb", "show", "current"});
  EXPECT_THAT(ran.output,
              AllOf(HasSubstr("birds"), HasSubstr("2 KV heads"), HasSubstr("published")));
  ran = Memory3({"kb", "alias", "current"});
  EXPECT_EQ(ran.output, "Deleted alias current\n");
  ran = Memory3({"kb", "drop", "birds", "--yes"});
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_EQ(Memory3({"kb", "list", "--names"}).output, "atlas\n");
}

TEST_F(CliTest, NothingIsDroppedUnlessSomebodySaysSo) {
  Create("atlas");
  const Ran ran = Memory3({"kb", "drop", "atlas"});  // its input is no terminal
  EXPECT_EQ(ran.code, 1);
  EXPECT_THAT(ran.output, AllOf(HasSubstr("atlas"), HasSubstr("--yes")));
  EXPECT_EQ(Memory3({"kb", "list", "--names"}).output, "atlas\n");
}

TEST_F(CliTest, JsonIsOneObjectALine) {
  Create("atlas");
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"--json", "kb", "list"},
                                             {"kb", "show", "atlas", "--json"},
                                             {"status", "--json"},
                                             {"snapshot", "list", "--json"}}) {
    const Ran ran = Memory3(arguments);
    for (const absl::string_view part : absl::StrSplit(ran.output, '\n', absl::SkipEmpty())) {
      const std::string line(part);
      // No inference server runs here: that is said on stderr, and in the object.
      if (line == "memory3: the inference server does not answer") continue;
      const auto json = nlohmann::json::parse(line, nullptr, false);
      EXPECT_TRUE(json.is_object()) << line;
    }
  }
  const auto list = nlohmann::json::parse(Memory3({"--json", "kb", "list"}).output);
  EXPECT_EQ(list["knowledge_bases"][0]["spec"]["name"], "atlas");
  EXPECT_EQ(list["knowledge_bases"][0]["spec"]["codec"], "CODEC_BF16");
}

TEST_F(CliTest, ASnapshotBringsBackWhatWasDropped) {
  Create("atlas");
  Ran ran = Memory3({"snapshot", "create", "before"});
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(Memory3({"snapshot", "list"}).output, HasSubstr("before"));
  EXPECT_EQ(Memory3({"kb", "drop", "atlas", "--yes"}).code, 0);
  EXPECT_EQ(Memory3({"kb", "list", "--names"}).output, "");
  ran = Memory3({"snapshot", "restore", "before", "--yes"});
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_EQ(Memory3({"kb", "list", "--names"}).output, "atlas\n");
  EXPECT_EQ(Memory3({"snapshot", "delete", "before"}).code, 0);
  EXPECT_THAT(Memory3({"snapshot", "list"}).output, Not(HasSubstr("before")));

  EXPECT_THAT(Memory3({"backup", "create", "daily"}).output, HasSubstr("Backup 1"));
  EXPECT_EQ(Memory3({"kb", "drop", "atlas", "--yes"}).code, 0);
  ran = Memory3({"backup", "restore", "daily", "--yes"});
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_EQ(Memory3({"kb", "list", "--names"}).output, "atlas\n");
}

TEST_F(CliTest, ExitCodesSayWhatWentWrong) {
  EXPECT_EQ(Memory3({"kb", "show", "nothing"}).code, 3);
  EXPECT_EQ(Memory3({"kb", "rollback", "nothing"}).code, 3);
  EXPECT_EQ(RunCli({"kb", "flap"}).code, 2);
  EXPECT_EQ(RunCli({"kb", "show"}).code, 2);
  EXPECT_EQ(RunCli({"--help"}).code, 0);
  const Ran ran = RunCli({"--memory_server", "127.0.0.1:1", "--timeout", "1", "kb", "list"});
  EXPECT_EQ(ran.code, 4);
  EXPECT_THAT(ran.output, HasSubstr("127.0.0.1:1"));
  // The address also from the environment.
  EXPECT_EQ(RunCli({"kb", "list", "--names"}, {{"MEMORY3_MEMORY_SERVER", address_}}).code, 0);
}

TEST_F(CliTest, CompletionKnowsCommandsFlagsAndKnowledgeBases) {
  Create("atlas");
  const std::string script = (directory_ / "completion").string();
  std::ofstream(script) << RunCli({"completion"}).output;
  const auto complete = [&](const std::string& words) {
    const std::string memory3 =
        (std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path() /
         "bin/memory3")
            .string();
    const std::string command = absl::StrCat(
        "MEMORY3_MEMORY_SERVER=", address_, " bash -c 'source ", script, "; COMP_WORDS=(", memory3,
        " ", words, "); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _memory3; echo ${COMPREPLY[*]}'");
    FILE* pipe = popen(command.c_str(), "r");
    std::string output;
    for (char buffer[512]; fgets(buffer, sizeof buffer, pipe) != nullptr;) output += buffer;
    EXPECT_EQ(pclose(pipe), 0);
    return output;
  };
  EXPECT_EQ(complete("sn"), "snapshot\n");
  EXPECT_EQ(complete("kb sh"), "show\n");
  EXPECT_EQ(complete("kb show at"), "atlas\n");
  EXPECT_EQ(complete("kb drop --y"), "--yes\n");
}

}  // namespace
}  // namespace memory3
