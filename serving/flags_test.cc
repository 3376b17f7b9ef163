#include "serving/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace memory3 {
namespace {

class FlagsTest : public ::testing::Test {
 protected:
  bool Parse(std::vector<std::string> arguments) {
    options_ = {.listen = "0.0.0.0:7070"};
    CLI::App app("test");
    AddServingFlags(app, options_);
    AddSwitch(app, "verify", verify_, "a switch");
    arguments.insert(arguments.begin(), "server");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    return ParseFlags(app, static_cast<int>(argv.size()), argv.data(), exit_code_);
  }
  void TearDown() override { unsetenv("MEMORY3_MAX_MESSAGE_MB"); }

  ServingOptions options_;
  bool verify_ = false;
  int exit_code_ = 0;
};

TEST_F(FlagsTest, CommandLineBeatsFileBeatsEnvironment) {
  const std::filesystem::path file =
      std::filesystem::path(::testing::TempDir()) / "flags_test.conf";
  std::ofstream(file) << "max_message_mb = 32\nlog_level = \"warn\"\n";
  ASSERT_TRUE(Parse({"--config", file.string()}));
  EXPECT_EQ(options_.max_message_mb, 32);
  EXPECT_EQ(options_.log_level, "warn");
  setenv("MEMORY3_MAX_MESSAGE_MB", "64", 1);
  ASSERT_TRUE(Parse({}));
  EXPECT_EQ(options_.max_message_mb, 64);
  ASSERT_TRUE(Parse({"--config", file.string()}));
  EXPECT_EQ(options_.max_message_mb, 32);
  ASSERT_TRUE(Parse({"--config", file.string(), "--max_message_mb", "128"}));
  EXPECT_EQ(options_.max_message_mb, 128);
}

TEST_F(FlagsTest, SwitchesTakeAValueOrNone) {
  ASSERT_TRUE(Parse({"--verify"}));
  EXPECT_TRUE(verify_);
  ASSERT_TRUE(Parse({"--verify=false"}));
  EXPECT_FALSE(verify_);
}

TEST_F(FlagsTest, BadValuesAndUnknownFlagsAreRefused) {
  EXPECT_FALSE(Parse({"--max_message_mb", "0"}));
  EXPECT_NE(exit_code_, 0);
  EXPECT_FALSE(Parse({"--lissten", "x"}));
  EXPECT_FALSE(Parse({"--log_level", "loud"}));
  EXPECT_FALSE(Parse({"--config", "/nonexistent.conf"}));
}

TEST_F(FlagsTest, TlsFlagsBelongTogether) {
  ASSERT_TRUE(Parse({"--tls_certificate", "a.pem"}));
  EXPECT_THAT(std::string(CheckServingOptions(options_).message()),
              ::testing::HasSubstr("--tls_key"));
  ASSERT_TRUE(Parse({"--tls_client_ca", "a.pem"}));
  EXPECT_THAT(std::string(CheckServingOptions(options_).message()),
              ::testing::HasSubstr("--tls_client_ca"));
  ASSERT_TRUE(Parse({}));
  EXPECT_TRUE(CheckServingOptions(options_).ok());
}

}  // namespace
}  // namespace memory3
