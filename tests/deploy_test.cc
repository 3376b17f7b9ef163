// deploy/ and docker/ against the built binaries; the work is done by tests/deploy_manifests.py.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace memory3 {
namespace {

namespace fs = std::filesystem;

TEST(Deploy, ManifestsAndImagesAgreeWithTheBinaries) {
  if (!fs::exists(".venv/bin/python")) {
    GTEST_SKIP()
        << "no .venv (tools/setup makes it): the manifests were not held against the binaries";
  }
  const char* data = std::getenv("MEMORY3_DATA");
  const fs::path model =
      fs::path(data != nullptr ? data : "../shared/data") / "fixtures/stories260K";
  const fs::path bin = fs::read_symlink("/proc/self/exe").parent_path().parent_path() / "bin";
  const std::string command =
      ".venv/bin/python tests/deploy_manifests.py " + bin.string() + " " + model.string() + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  for (char buffer[4096]; fgets(buffer, sizeof buffer, pipe) != nullptr;) output += buffer;
  EXPECT_EQ(pclose(pipe), 0) << output;
}

}  // namespace
}  // namespace memory3
