#include "trainer/plot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Pair;

class PlotTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::path(::testing::TempDir()) / absl::StrCat("plot_", getpid());
    std::filesystem::create_directories(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = (root_ / name).string();
    std::ofstream(path) << text;
    return path;
  }
  std::filesystem::path root_;
};

TEST_F(PlotTest, EveryNumberIsACurveAndDamageIsCounted) {
  Write("metrics.jsonl",
        "{\"step\":1,\"loss\":4.5,\"skipped\":true}\n"
        "{\"step\":2,\"loss\":null,\"rate\":0.1}\n"
        "not JSON\n"
        "{\"step\":3,\"loss\":4}\n"
        "{\"step\":3,\"loss\":3.5}\n"
        "{\"step\":4,\"lo");
  const auto run = ReadRunCurves(root_.string(), "a run");
  ASSERT_TRUE(run.ok()) << run.status();
  EXPECT_EQ(run->bad_lines, 2);
  EXPECT_EQ(run->x_name, "step");
  EXPECT_EQ(run->curves.size(), 2);
  EXPECT_THAT(run->curves.at("loss"), ElementsAre(Pair(1, 4.5), Pair(3, 3.5)));
  EXPECT_THAT(run->curves.at("rate"), ElementsAre(Pair(2, 0.1)));
}

TEST_F(PlotTest, WithoutStepsSecondsOrLinesCount) {
  const auto timed = ReadRunCurves(Write("t.jsonl", "{\"seconds\":2.5,\"sent\":3}\n"), "t");
  ASSERT_TRUE(timed.ok());
  EXPECT_EQ(timed->x_name, "seconds");
  EXPECT_THAT(timed->curves.at("sent"), ElementsAre(Pair(2.5, 3)));
  const auto bare = ReadRunCurves(Write("b.jsonl", "{\"y\":3}\n{\"y\":4}\n"), "b");
  ASSERT_TRUE(bare.ok());
  EXPECT_THAT(bare->curves.at("y"), ElementsAre(Pair(1, 3), Pair(2, 4)));
}

TEST_F(PlotTest, NothingToDrawIsAnErrorNamingTheFile) {
  EXPECT_EQ(ReadRunCurves((root_ / "none").string(), "x").status().code(),
            absl::StatusCode::kNotFound);
  const auto empty = ReadRunCurves(Write("empty.jsonl", ""), "x");
  EXPECT_EQ(empty.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(empty.status().message()), HasSubstr("empty.jsonl"));
  EXPECT_FALSE(ReadRunCurves(Write("text.jsonl", "a\nb\n"), "x").ok());
}

TEST_F(PlotTest, LongCurvesAreThinnedToMeans) {
  RunCurves run;
  for (int i = 0; i < 10; ++i) run.curves["loss"].emplace_back(i, i);
  run.curves["short"] = {{0, 7}};
  Thin(&run, 5);
  EXPECT_THAT(run.curves["loss"],
              ElementsAre(Pair(0, 0.5), Pair(2, 2.5), Pair(4, 4.5), Pair(6, 6.5), Pair(8, 8.5)));
  EXPECT_THAT(run.curves["short"], ElementsAre(Pair(0, 7)));
}

TEST_F(PlotTest, ThePageStandsAloneAndNoNameEndsItsScript) {
  RunCurves run;
  run.name = "</script><b>\xff @TITLE@";
  run.curves["loss"] = {{1, 4.123456789}, {2, 1e-30}};
  const std::string page = CurvesPage({run}, "<title> @DATA@");
  // The one address is the name of SVG's namespace.
  size_t addresses = 0;
  for (size_t at = 0; (at = page.find("://", at)) != std::string::npos; ++at) ++addresses;
  EXPECT_EQ(addresses, 1);
  EXPECT_THAT(page, HasSubstr("http://www.w3.org/2000/svg"));
  EXPECT_THAT(page, Not(HasSubstr("</script><b>")));
  EXPECT_THAT(page, HasSubstr("\\u003c/script>"));
  EXPECT_THAT(page, HasSubstr("&lt;title&gt;"));
  EXPECT_THAT(page, HasSubstr("4.12346"));
  EXPECT_THAT(page, HasSubstr("1e-30"));
}

}  // namespace
}  // namespace memory3
