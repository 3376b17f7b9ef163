#include "transformer/safetensors.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "transformer/atomic_file.h"
#include "transformer/bf16.h"
#include "transformer/f16.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TestDirectory {
 public:
  TestDirectory()
      : path_(fs::path(testing::TempDir()) /
              ("m3." + std::to_string(::getpid()) + "." +
               testing::UnitTest::GetInstance()->current_test_info()->name())) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~TestDirectory() { fs::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  const fs::path& path() const { return path_; }

 private:
  const fs::path path_;
};

std::string FileOf(const std::string& header, size_t data_bytes) {
  std::string file(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(file.data(), &length, 8);
  return file + header + std::string(data_bytes, '\1');
}

void ExpectRefused(const std::string& file, const std::vector<std::string>& words,
                   absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
  const auto header = ParseSafetensorsHeader(file, "dir/x.safetensors");
  ASSERT_FALSE(header.ok()) << words[0];
  EXPECT_EQ(header.status().code(), code) << header.status();
  const std::string message(header.status().message());
  EXPECT_THAT(message, HasSubstr("dir/x.safetensors"));
  for (const std::string& word : words) EXPECT_THAT(message, HasSubstr(word));
}

TEST(SafetensorsHeader, ReadsAWellFormedOne) {
  const auto header = ParseSafetensorsHeader(
      FileOf(
          R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},)"
          R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
          R"("empty":{"dtype":"F32","shape":[0,9],"data_offsets":[16,16]}}   )",
          16),
      "x");
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->tensors.size(), 3);
  EXPECT_EQ(header->metadata.at("format"), "pt");
  const SafetensorsEntry& b = header->tensors.at("b");
  EXPECT_EQ(b.dtype, "BF16");
  EXPECT_THAT(b.shape, ElementsAre(2, 3));
  EXPECT_EQ(b.begin, 4);
  EXPECT_EQ(b.end, 16);
  EXPECT_EQ(header->tensors.at("a").elements(), 1);
}

TEST(SafetensorsHeader, RefusesLyingLengths) {
  constexpr auto kLoss = absl::StatusCode::kDataLoss;
  ExpectRefused("", {"8 bytes"}, kLoss);
  ExpectRefused("1234567", {"8 bytes"}, kLoss);
  std::string file = FileOf("{}", 0);
  file[0] = 3;
  ExpectRefused(file, {"header length 3", "truncated"}, kLoss);
  file = FileOf("{}", 0);
  std::memset(file.data(), 0xff, 8);
  ExpectRefused(file, {"header length 18446744073709551615"});
  file = FileOf("", 0);
  ExpectRefused(file, {"not JSON"});
  ExpectRefused(FileOf("{}", 5), {"5 bytes past the last tensor"}, kLoss);
  // Truncated in the data.
  ExpectRefused(FileOf(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 7),
                {"\"a\"", "data_offsets", "truncated"}, kLoss);
}

TEST(SafetensorsHeader, RefusesNonsense) {
  for (const std::string header : {"[]", "3", "null", "{", "{\"a\":}", "\"x\"", "{}{}"}) {
    ExpectRefused(FileOf(header, 0), {"header"});
  }
  ExpectRefused(FileOf("{\"\xff\":1}", 0), {"not JSON"});
  ExpectRefused(FileOf(R"({"__metadata__":[]})", 0), {"__metadata__"});
  ExpectRefused(FileOf(R"({"__metadata__":{"format":1}})", 0), {"__metadata__", "format"});
  ExpectRefused(FileOf(R"({"a":7})", 0), {"\"a\"", "object"});
  ExpectRefused(FileOf(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                       R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                       4),
                {"key 'a' stands twice"});
  const std::string deep = "{\"a\":" + std::string(1 << 20, '[');
  ExpectRefused(FileOf(deep, 0), {"header"});
}

TEST(SafetensorsHeader, NamesTensorAndField) {
  const auto with = [](const std::string& fields) { return FileOf("{\"w\":{" + fields + "}}", 8); };
  const std::string dtype = R"("dtype":"F32")", shape = R"("shape":[2])",
                    offsets = R"("data_offsets":[0,8])";
  ExpectRefused(with(shape + "," + offsets), {"\"w\"", "dtype", "missing"});
  ExpectRefused(with(dtype + "," + offsets), {"\"w\"", "shape", "missing"});
  ExpectRefused(with(dtype + "," + shape), {"\"w\"", "data_offsets", "missing"});
  ExpectRefused(with(dtype + "," + shape + "," + offsets + ",\"x\":1"), {"\"w\"", "\"x\""});
  for (const std::string bad : {"1", "\"f32\"", "\"F33\"", "null"}) {
    ExpectRefused(with("\"dtype\":" + bad + "," + shape + "," + offsets), {"\"w\"", "dtype"});
  }
  for (const std::string bad :
       {"2", "[2.0]", "[-2]", "[\"2\"]", "[[2]]", "null", "[1,1,1,1,1,1,1,1,2]",
        "[18446744073709551615]", "[4294967296,4294967296]", "[18446744073709551616]"}) {
    ExpectRefused(with(dtype + ",\"shape\":" + bad + "," + offsets), {"\"w\"", "shape"});
  }
  for (const std::string bad : {"8", "[0]", "[0,8,9]", "[-1,8]", "[0,8.0]", "[8,0]", "[0,7]",
                                "[0,18446744073709551615]", "[18446744073709551615,7]"}) {
    ExpectRefused(with(dtype + "," + shape + ",\"data_offsets\":" + bad),
                  {"\"w\"", "data_offsets"});
  }
}

TEST(SafetensorsHeader, RefusesOverlapAndGap) {
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + first +
           R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":)" + second + "}}";
  };
  EXPECT_TRUE(ParseSafetensorsHeader(FileOf(two("[8,16]", "[0,8]"), 16), "x").ok());
  ExpectRefused(FileOf(two("[0,8]", "[4,12]"), 12), {"\"b\"", "overlaps"});
  ExpectRefused(FileOf(two("[0,8]", "[0,8]"), 8), {"overlaps"});
  ExpectRefused(FileOf(two("[0,8]", "[12,20]"), 20), {"\"b\"", "gap"});
  ExpectRefused(FileOf(two("[4,12]", "[12,20]"), 20), {"\"a\"", "gap"});
  ExpectRefused(FileOf(two("[0,8]", "[8,16]"), 12), {"\"b\"", "truncated"},
                absl::StatusCode::kDataLoss);
}

// Every flipped byte and every cut of a real header gives an entry within the file, or an error.
TEST(SafetensorsHeader, SurvivesDamage) {
  const std::string file =
      *ReadSmallFile("transformer/testdata/llama_bf16/model.safetensors", 1 << 20);
  const auto good = ParseSafetensorsHeader(file, "x");
  ASSERT_TRUE(good.ok()) << good.status();
  std::mt19937 random(7);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string damaged = file;
    if (round % 4 == 0) {
      damaged.resize(random() % file.size());
    } else {
      for (int flips = 1 + static_cast<int>(random() % 3); flips > 0; --flips) {
        damaged[random() % good->data_begin] = static_cast<char>(random());
      }
    }
    const auto header = ParseSafetensorsHeader(damaged, "x");
    if (!header.ok()) {
      ++refused;
      continue;
    }
    for (const auto& [name, entry] : header->tensors) {
      ASSERT_LE(header->data_begin + entry.end, damaged.size());
      ASSERT_LE(entry.begin, entry.end);
    }
  }
  EXPECT_GT(refused, 2000);  // a flip inside a tensor's name passes
}

TEST(F16, IsExactForEveryHalf) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float f = F16ToFloat(static_cast<uint16_t>(h));
    const int exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
    const float sign = (h & 0x8000) != 0 ? -1.0f : 1.0f;
    if (exponent == 31) {
      EXPECT_TRUE(mantissa != 0 ? std::isnan(f)
                                : f == sign * std::numeric_limits<float>::infinity());
    } else {
      const float want = exponent == 0
                             ? std::ldexp(static_cast<float>(mantissa), -24)
                             : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      EXPECT_EQ(f, sign * want) << h;
      EXPECT_EQ(std::signbit(f), sign < 0) << h;
    }
  }
}

TEST(SafetensorsFile, WritesWhatItReads) {
  const TestDirectory dir;
  const std::vector<float> a = {1, -2.5f, 3e-8f, 1.0f + 0x1p-8f, 0, -0.0f};
  const auto fill = [&](std::span<float> out) {
    std::copy(a.begin(), a.end(), out.begin());
    return absl::OkStatus();
  };
  const std::vector<SafetensorsOutput> outputs = {{"z", {2, 3}, fill}, {"a", {6}, fill}};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const std::string path = dir / "w.safetensors";
    ASSERT_TRUE(WriteSafetensors(path, outputs, dtype).ok());
    const auto file = SafetensorsFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ((*file)->header().data_begin % 8, 0);
    EXPECT_EQ((*file)->header().metadata.at("format"), "pt");
    for (const char* name : {"z", "a"}) {
      std::vector<float> got(6);
      ASSERT_TRUE((*file)->ReadFloats(name, got).ok());
      for (int i = 0; i < 6; ++i) {
        const float want = dtype == DType::kF32 ? a[i] : Bf16ToFloat(FloatToBf16(a[i]));
        EXPECT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(want));
      }
    }
  }
  std::vector<float> five(5);
  const auto file = *SafetensorsFile::Open(dir / "w.safetensors");
  EXPECT_EQ(file->ReadFloats("a", five).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(file->ReadFloats("q", five).message()),
              AllOf(HasSubstr("w.safetensors"), HasSubstr("\"q\"")));
  // Nothing but the file itself stays behind.
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path()), fs::directory_iterator()), 1);
}

TEST(SafetensorsFile, AFailedWriteLeavesTheOldFile) {
  const TestDirectory dir;
  const std::string path = dir / "w.safetensors";
  ASSERT_TRUE(WriteFileAtomically(path, "old").ok());
  const std::vector<SafetensorsOutput> outputs = {
      {"a", {6}, [](std::span<float>) { return absl::OkStatus(); }},
      {"b", {6}, [](std::span<float>) { return absl::AbortedError("stop"); }}};
  EXPECT_EQ(WriteSafetensors(path, outputs, DType::kF32).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(*ReadSmallFile(path, 10), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path()), fs::directory_iterator()), 1);

  const std::vector<SafetensorsOutput> twice = {outputs[0], outputs[0]};
  EXPECT_THAT(std::string(WriteSafetensors(path, twice, DType::kF32).message()),
              HasSubstr("twice"));
  const absl::Status nowhere = WriteSafetensors(dir / "no/w", outputs, DType::kF32);
  EXPECT_EQ(nowhere.code(), absl::StatusCode::kNotFound) << nowhere;
}

TEST(SafetensorsFile, OpenNamesWhatItCannotRead) {
  const TestDirectory dir;
  EXPECT_EQ(SafetensorsFile::Open(dir / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(SafetensorsFile::Open(dir.path().string()).status().message()),
              HasSubstr("not a file"));
  ASSERT_TRUE(WriteFileAtomically(dir / "empty", "").ok());
  EXPECT_EQ(SafetensorsFile::Open(dir / "empty").status().code(), absl::StatusCode::kDataLoss);
  ASSERT_TRUE(
      WriteFileAtomically(dir / "int",
                          FileOf(R"({"i":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}})", 4))
          .ok());
  std::vector<float> one(1);
  const auto file = SafetensorsFile::Open(dir / "int");
  ASSERT_TRUE(file.ok());
  EXPECT_THAT(std::string((*file)->ReadFloats("i", one).message()),
              AllOf(HasSubstr("\"i\""), HasSubstr("dtype I32")));
}

}  // namespace
}  // namespace memory3
