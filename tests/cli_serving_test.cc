// Black-box tests of the parts of `memory3` that need both servers: serve, ask, status, load, demo.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "tests/child_process.h"

namespace memory3 {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::SizeIs;
namespace fs = std::filesystem;

// A port of this machine: held until released.
class Port {
 public:
  Port() : socket_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(socket_, 1), 0);
    EXPECT_EQ(getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    number_ = ntohs(address.sin_port);
  }
  ~Port() { Release(); }
  Port(const Port&) = delete;
  void Release() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }
  int number() const { return number_; }
  std::string address() const { return absl::StrCat("127.0.0.1:", number_); }

 private:
  int socket_;
  int number_ = 0;
};

std::vector<pid_t> ChildrenOf(pid_t pid) {
  std::vector<pid_t> children;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    std::ifstream stat(entry.path() / "stat");
    std::string text;
    if (!std::getline(stat, text)) continue;
    // "pid (name) state parent …", and the name may hold anything.
    std::istringstream rest(text.substr(text.rfind(')') + 1));
    std::string state;
    pid_t parent = 0;
    rest >> state >> parent;
    if (parent == pid) children.push_back(std::stoi(entry.path().filename().string()));
  }
  return children;
}

bool Lives(pid_t pid) { return kill(pid, 0) == 0 || errno != ESRCH; }

struct Ran {
  int code;
  std::string output;
};

std::vector<json> Events(const std::string& output) {
  std::vector<json> events;
  for (const absl::string_view line : absl::StrSplit(output, '\n', absl::SkipEmpty()))
    events.push_back(json::parse(std::string(line)));
  return events;
}

fs::path MakeDirectory(const std::string& name) {
  const fs::path directory =
      fs::path(::testing::TempDir()) / absl::StrCat("cli_serving_", getpid(), "_", name);
  fs::remove_all(directory);
  fs::create_directories(directory);
  return directory;
}

std::vector<std::string> DemoFiles() {
  std::vector<std::string> files;
  for (const auto& file : fs::directory_iterator("demo/knowledge")) files.push_back(file.path());
  return files;
}

// Both servers for all tests, as `memory3 serve` runs them, with two documents to ask about.
class ServedTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = MakeDirectory("served");
    Port memory, inference, http;
    memory_ = memory.address();
    inference_ = inference.address();
    http_port_ = http.number();
    for (Port* port : {&memory, &inference, &http}) port->Release();
    serve_ = new ChildProcess(
        "memory3", {"serve", "--model", "models/tiny", "--data", (directory_ / "data").string(),
                    "--memory_listen", memory_, "--inference_listen", inference_, "--http_listen",
                    http.address()});
    ASSERT_TRUE(serve_->WaitForLine("Ready. The page: (http.*)")) << serve_->output();
    const std::string file = (directory_ / "towns.jsonl").string();
    std::ofstream(file)
        << R"({"id": "aro", "title": "Aro", "text": "Aro was founded by Bela Tarn in 1203."})"
        << "\n"
        << R"({"id": "ibb", "title": "Ibb", "text": "Ibb exports copper and fine wool."})"
        << "\n";
    const Ran ran = Memory3({"load", "towns", file, "--model", "models/tiny"});
    ASSERT_EQ(ran.code, 0) << ran.output;
    EXPECT_THAT(ran.output, HasSubstr("towns: version 2, 2 documents in 2 references"));
  }
  static void TearDownTestSuite() {
    delete serve_;
    fs::remove_all(directory_);
  }

  static Ran Memory3(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(),
                     {"--memory_server", memory_, "--inference_server", inference_});
    ChildProcess process("memory3", arguments);
    const int code = process.Wait();
    return {code, process.output()};
  }

  static fs::path directory_;
  static std::string memory_, inference_;
  static int http_port_;
  static ChildProcess* serve_;
};

fs::path ServedTest::directory_;
std::string ServedTest::memory_, ServedTest::inference_;
int ServedTest::http_port_ = 0;
ChildProcess* ServedTest::serve_ = nullptr;

constexpr const char kQuestion[] = "Who founded Aro?";

TEST_F(ServedTest, AskShowsTheAnswerItsFiguresAndSources) {
  const Ran ran = Memory3({"ask", "towns", kQuestion, "--max_tokens", "8"});
  EXPECT_EQ(ran.code, 0);
  EXPECT_THAT(ran.output,
              AllOf(HasSubstr(" tokens; first after "), HasSubstr("waited "),
                    HasSubstr("[1] Aro, characters 0-37, score "), HasSubstr("[2] Ibb")));
  EXPECT_THAT(Memory3({"ask", "towns", kQuestion, "--references", "1"}).output,
              AllOf(HasSubstr("[1] Aro"), Not(HasSubstr("[2]"))));
}

TEST_F(ServedTest, JsonIsTheStreamEventByEvent) {
  const Ran ran = Memory3({"--json", "ask", "towns", kQuestion, "--max_tokens", "8"});
  ASSERT_EQ(ran.code, 0) << ran.output;
  const std::vector<json> events = Events(ran.output);
  ASSERT_GE(events.size(), 4u);
  EXPECT_EQ(events.front()["prompt"]["knowledge_base"], "towns");
  EXPECT_TRUE(events.back().contains("finish"));
  std::string text;
  int deltas = 0;
  std::vector<std::string> read;
  for (const json& event : events) {
    if (event.contains("delta")) {
      ++deltas;
      text += event["delta"]["text"].get<std::string>();
    }
    if (!event.contains("provenance")) continue;
    for (const json& memory : event["provenance"]["memories"])
      for (const json& source : memory["sources"]) read.push_back(source["document_id"]);
  }
  EXPECT_GT(deltas, 1);  // it streams
  EXPECT_THAT(read, ::testing::IsSupersetOf({"aro", "ibb"}));
  // What a person is shown is the same answer.
  const std::string shown = Memory3({"ask", "towns", kQuestion, "--max_tokens", "8"}).output;
  EXPECT_THAT(shown, ::testing::StartsWith(text.substr(text.find_first_not_of(' '))));
}

TEST_F(ServedTest, WithoutMemoryNothingIsRead) {
  Ran ran = Memory3({"ask", "towns", kQuestion, "--no_memory", "--max_tokens", "8"});
  EXPECT_EQ(ran.code, 0);
  EXPECT_THAT(ran.output, AllOf(HasSubstr(" tokens; first after "), Not(HasSubstr("[1]"))));
  ran = Memory3({"ask", "towns", kQuestion, "--compare", "--max_tokens", "8"});
  EXPECT_EQ(ran.code, 0);
  const size_t with = ran.output.find("With memory:"), source = ran.output.find("[1] Aro"),
               without = ran.output.find("Without:");
  EXPECT_LT(with, source);
  EXPECT_LT(source, without);
  EXPECT_EQ(ran.output.find("[1]", without), std::string::npos);
}

TEST_F(ServedTest, ExitCodesSayWhatWentWrong) {
  Ran ran = Memory3({"ask", "villages", kQuestion});
  EXPECT_EQ(ran.code, 3);
  EXPECT_THAT(ran.output, MatchesRegex("memory3: [^\n]*villages[^\n]*\n"));
  EXPECT_EQ(Memory3({"ask", "towns", kQuestion, "--compare", "--no_memory"}).code, 2);
  EXPECT_EQ(Memory3({"ask", "towns"}).code, 2);
  Port nobody;
  nobody.Release();
  ChildProcess process("memory3",
                       {"--inference_server", nobody.address(), "ask", "towns", kQuestion});
  EXPECT_EQ(process.Wait(), 4);
  EXPECT_THAT(process.output(), MatchesRegex("memory3: [^\n]*\n"));
}

TEST_F(ServedTest, StatusShowsBothServers) {
  Memory3({"ask", "towns", kQuestion, "--max_tokens", "4"});
  Ran ran = Memory3({"status"});
  EXPECT_EQ(ran.code, 0);
  EXPECT_THAT(ran.output, AllOf(HasSubstr("memory server " + memory_), HasSubstr("2 references"),
                                HasSubstr("inference server " + inference_),
                                HasSubstr("model tiny"), HasSubstr("0 running, 0 waiting"),
                                HasSubstr("memories read: "), HasSubstr("reads towns")));
  ran = Memory3({"--json", "status"});
  const json both = json::parse(ran.output);
  EXPECT_EQ(both["memory_server"]["entries"], "2");  // 64 bits are text in proto3's mapping
  const json& state = both["inference_server"]["state"];
  EXPECT_GT(state["kv_pages"], 0);
  EXPECT_EQ(state["kv_pages_used"], 0);
  EXPECT_NE(state["store_hits"], "0");

  Port nobody;
  nobody.Release();
  ChildProcess half("memory3", {"--json", "status", "--memory_server", memory_,
                                "--inference_server", nobody.address()});
  EXPECT_EQ(half.Wait(), 4);
  std::vector<std::string> lines = absl::StrSplit(half.output(), '\n', absl::SkipEmpty());
  std::sort(lines.begin(), lines.end());  // what is said about it goes to stderr
  ASSERT_THAT(lines, SizeIs(2));
  EXPECT_EQ(lines[0], "memory3: the inference server does not answer");
  EXPECT_EQ(json::parse(lines[1])["inference_server"]["error"]["code"], "UNAVAILABLE");
}

TEST_F(ServedTest, ThePageAndTheApiAnswer) {
  httplib::Client client("127.0.0.1", http_port_);
  const auto page = client.Get("/");
  ASSERT_TRUE(page);
  EXPECT_EQ(page->status, 200);
  EXPECT_THAT(page->body, HasSubstr("<html"));
  const auto models = client.Get("/v1/models");
  ASSERT_TRUE(models);
  EXPECT_EQ(json::parse(models->body)["data"][0]["id"], "tiny");
}

// An interrupted load publishes nothing; the same command goes on.
TEST_F(ServedTest, AnInterruptedLoadLeavesNoHalfAndGoesOn) {
  std::vector<std::string> arguments = {"--memory_server", memory_, "load", "elements"};
  for (const std::string& file : DemoFiles()) arguments.push_back(file);
  arguments.insert(arguments.end(), {"--model", "models/tiny"});
  ChildProcess load("memory3", arguments);
  ASSERT_TRUE(load.WaitForLine("loading elements")) << load.output();
  load.Signal(SIGINT);
  EXPECT_EQ(load.Wait(), -SIGINT);
  json base = json::parse(Memory3({"--json", "kb", "list"}).output);
  for (const json& one : base["knowledge_bases"]) {
    if (one["spec"]["name"] == "elements") {
      EXPECT_EQ(one["entries"], "0");
    }
  }
  ChildProcess again("memory3", arguments);
  ASSERT_EQ(again.Wait(), 0) << again.output();
  EXPECT_THAT(again.output(), HasSubstr("313 documents in 313 references"));
}

TEST(ServeTest, AnInterruptStopsBothServers) {
  const fs::path directory = MakeDirectory("stop");
  Port memory, inference, http;
  for (Port* port : {&memory, &inference, &http}) port->Release();
  ChildProcess serve(
      "memory3", {"serve", "--model", "models/tiny", "--data", (directory / "data").string(),
                  "--memory_listen", memory.address(), "--inference_listen", inference.address(),
                  "--http_listen", http.address()});
  ASSERT_TRUE(serve.WaitForLine("Ready")) << serve.output();
  const std::vector<pid_t> servers = ChildrenOf(serve.pid());
  EXPECT_THAT(servers, SizeIs(2));
  serve.Signal(SIGINT);
  EXPECT_EQ(serve.Wait(), 0) << serve.output();
  for (const pid_t server : servers) EXPECT_FALSE(Lives(server));
  fs::remove_all(directory);
}

// Whichever of the three ports is taken, whatever is missing: the last line names it, and no server
// stays behind.
TEST(ServeTest, WhatIsInTheWayIsNamed) {
  const fs::path directory = MakeDirectory("taken");
  Port taken;
  struct Case {
    std::vector<std::string> flags;
    std::string named;
  };
  const std::string data = (directory / "data").string();
  std::ofstream(directory / "file") << "no directory";
  const Case cases[] = {
      {{"--model", "models/tiny", "--data", data, "--memory_listen", taken.address()},
       taken.address()},
      {{"--model", "models/tiny", "--data", data, "--inference_listen", taken.address()},
       taken.address()},
      {{"--model", "models/tiny", "--data", data, "--http_listen", taken.address()},
       taken.address()},
      {{"--model", "models/none", "--data", data}, "models/none"},
      {{"--model", "models/tiny", "--data", (directory / "file" / "data").string()}, "file"},
  };
  for (const Case& one : cases) {
    std::vector<std::string> arguments = {"serve"};
    for (const std::string flag : {"--memory_listen", "--inference_listen", "--http_listen"}) {
      if (std::find(one.flags.begin(), one.flags.end(), flag) != one.flags.end()) continue;
      Port port;
      port.Release();
      arguments.insert(arguments.end(), {flag, port.address()});
    }
    arguments.insert(arguments.end(), one.flags.begin(), one.flags.end());
    ChildProcess serve("memory3", arguments);
    EXPECT_EQ(serve.Wait(), 1) << serve.output();
    std::vector<std::string> lines = absl::StrSplit(serve.output(), '\n', absl::SkipEmpty());
    ASSERT_FALSE(lines.empty());
    // One line, but for the logs of a server that ran already.
    std::erase_if(lines, [](const std::string& line) {
      return line.starts_with("[") && line.find("[info]") != std::string::npos;
    });
    EXPECT_THAT(lines, SizeIs(1)) << serve.output();
    EXPECT_THAT(lines.back(), AllOf(HasSubstr(one.named), MatchesRegex("[a-z0-9_]+: .*")));
  }
  fs::remove_all(directory);
}

TEST(DemoTest, AnInterruptDuringTheLoadLeavesNothingBehind) {
  const fs::path directory = MakeDirectory("demo");
  ChildProcess demo("memory3", {"demo", "--directory", directory.string()});
  ASSERT_TRUE(demo.WaitForLine("loading demo")) << demo.output();
  const std::vector<pid_t> servers = ChildrenOf(demo.pid());
  EXPECT_THAT(servers, SizeIs(2));
  demo.Signal(SIGINT);
  EXPECT_EQ(demo.Wait(), 130) << demo.output();
  for (const pid_t server : servers) EXPECT_FALSE(Lives(server));
  EXPECT_FALSE(fs::exists(directory / "report.json"));
  // Its store has the knowledge base as it was before the load: empty.
  ChildProcess store("memory_server",
                     {"--data", (directory / "data").string(), "--listen", "127.0.0.1:0"});
  const std::optional<std::string> port = store.WaitForLine(R"(gRPC on port (\d+))");
  ASSERT_TRUE(port) << store.output();
  ChildProcess list("memory3", {"--json", "--memory_server", "localhost:" + *port, "kb", "list"});
  EXPECT_EQ(list.Wait(), 0);
  for (const json& base : json::parse(list.output())["knowledge_bases"])
    EXPECT_EQ(base["entries"], "0") << base;
  fs::remove_all(directory);
}

}  // namespace
}  // namespace memory3
