// The HTTP door of the real binaries, an inference_server and a memory_server of its own process:
// OpenAI's Python client, a browser, gRPC from Python, and every example of docs/http_api.md.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "memory/hash.h"
#include "tests/inference_testing.h"

namespace memory3 {
namespace {

// Skips where tools/setup has not been: `module` is of a package that it installs.
#define SKIP_WITHOUT_PYTHON(module)                                            \
  if (std::system(".venv/bin/python -c 'import " module "' 2>/dev/null") != 0) \
  GTEST_SKIP() << "no .venv with the Python module " module " (tools/setup makes it)"

class InferenceHttpTest : public ::testing::Test {
 protected:
  void SetUp() override { SKIP_WITHOUT_STORIES(); }

  void Start(std::vector<std::string> flags = {}) {
    memory_ = std::make_unique<MemoryProcess>(directory_ / "store");
    OfflineModel offline(*StoriesDirectory());
    offline.FillKnowledgeBase(*memory_->Connect(), offline.Spec("harbour"));
    flags.insert(flags.end(), {"--model", *StoriesDirectory(), "--model_name", "stories260K",
                               "--memory", memory_->target(), "--http_listen", "127.0.0.1:0"});
    server_ = std::make_unique<InferenceProcess>(flags);
    const auto port = server_->process().WaitForLine(R"(HTTP on port (\d+))");
    ASSERT_TRUE(port) << server_->process().output();
    url_ = "http://127.0.0.1:" + *port;
  }
  // The flag that has the server ask for `key`.
  std::vector<std::string> KeyFlags(const std::string& key) {
    const std::string file = directory_ / "keys.json";
    std::ofstream(file) << absl::StrCat(
        R"({"keys": [{"name": "t", "tenant": "default", "sha256": ")", Sha256Of(key).ToHex(),
        R"(", "knowledge_bases": {"*": "read"}}]})");
    return {"--api_keys", file};
  }
  static int RunPython(const std::string& script, const std::vector<std::string>& arguments) {
    std::string command = ".venv/bin/python tests/" + script;
    for (const std::string& argument : arguments) absl::StrAppend(&command, " '", argument, "'");
    return std::system(command.c_str());
  }

  TestDirectory directory_;
  std::unique_ptr<MemoryProcess> memory_;
  std::unique_ptr<InferenceProcess> server_;
  std::string url_;
};

TEST_F(InferenceHttpTest, OpenAisClientWorksUnchanged) {
  SKIP_WITHOUT_PYTHON("openai");
  std::vector<std::string> flags = KeyFlags("a secret of tests");
  flags.insert(flags.end(), {"--max_running", "1", "--max_waiting", "2"});
  Start(std::move(flags));
  EXPECT_EQ(RunPython("openai_client.py", {url_, "a secret of tests"}), 0);
}

TEST_F(InferenceHttpTest, ThePageShowsBothAnswersAndWhatTheyRead) {
  if (std::system("command -v chromium >/dev/null && command -v chromedriver >/dev/null") != 0)
    GTEST_SKIP() << "no chromium or chromium-driver (tools/setup installs them)";
  SKIP_WITHOUT_PYTHON("selenium");
  Start();
  EXPECT_EQ(RunPython("web_page.py", {url_}), 0);
}

TEST_F(InferenceHttpTest, GrpcFromPython) {
  SKIP_WITHOUT_PYTHON("grpc_reflection");
  Start(KeyFlags("another secret"));
  EXPECT_EQ(RunPython("inference_grpc_client.py", {server_->target(), "another secret"}), 0);
}

TEST_F(InferenceHttpTest, TheDocumentsExamplesRun) {
  SKIP_WITHOUT_PYTHON("openai");
  Start();
  EXPECT_EQ(RunPython("http_api_examples.py", {"docs/http_api.md", url_}), 0);
}

}  // namespace
}  // namespace memory3
