#include "trainer/documents.h"

#include <zlib.h>
#include <zstd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class DocumentsTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::path(testing::TempDir()) /
                 testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string Write(const std::string& name, std::string_view bytes) {
    const std::string path = (directory_ / name).string();
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

  std::filesystem::path directory_;
};

std::string Zstd(std::string_view data, int window_log = 0) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  if (window_log > 0) {
    ZSTD_CCtx_setParameter(context, ZSTD_c_enableLongDistanceMatching, 1);
    ZSTD_CCtx_setParameter(context, ZSTD_c_windowLog, window_log);
  }
  std::string out(ZSTD_compressBound(data.size()), '\0');
  // Streamed, so that the frame does not know its size and keeps the window asked for.
  ZSTD_inBuffer in{data.data(), data.size(), 0};
  ZSTD_outBuffer to{out.data(), out.size(), 0};
  ZSTD_compressStream2(context, &to, &in, ZSTD_e_continue);
  ZSTD_compressStream2(context, &to, &in, ZSTD_e_end);
  ZSTD_freeCCtx(context);
  out.resize(to.pos);
  return out;
}

std::string Gzip(std::string_view data) {
  z_stream s{};
  deflateInit2(&s, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&s, data.size()) + 64, '\0');
  s.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  s.avail_in = static_cast<uInt>(data.size());
  s.next_out = reinterpret_cast<Bytef*>(out.data());
  s.avail_out = static_cast<uInt>(out.size());
  deflate(&s, Z_FINISH);
  out.resize(s.total_out);
  deflateEnd(&s);
  return out;
}

struct ReadResult {
  std::vector<std::string> texts, titles, ids, warnings;
  int64_t skipped = 0;
  absl::Status status;
};

ReadResult ReadAll(std::vector<std::string> paths, DocumentOptions options = {}) {
  ReadResult result;
  auto reader = DocumentReader::Open(std::move(paths), std::move(options));
  if (!reader.ok()) {
    result.status = reader.status();
    return result;
  }
  Document document;
  while (true) {
    absl::StatusOr<bool> found = (*reader)->Next(&document);
    if (!found.ok()) {
      result.status = found.status();
      break;
    }
    if (!*found) {
      EXPECT_EQ((*reader)->bytes_consumed(), (*reader)->bytes_total());
      break;
    }
    result.texts.push_back(document.text);
    result.titles.push_back(document.title);
    result.ids.push_back(document.id);
  }
  result.skipped = (*reader)->skipped();
  result.warnings = (*reader)->warnings();
  return result;
}

constexpr std::string_view kLines =
    "{\"id\": 7, \"title\": \"One\", \"text\": \"first\\ntext\"}\n"
    "\n"
    "{\"id\": \"b\", \"text\": \"söcond\"}\r\n"
    "{\"text\": \"third\"}";

TEST_F(DocumentsTest, EveryFormReadsTheSame) {
  const std::string plain = Write("a.jsonl", kLines);
  for (const std::string& path :
       {plain, Write("a.jsonl.gz", Gzip(kLines)), Write("a.jsonl.zst", Zstd(kLines)),
        // Two gzip members, two zstd frames, cut in the middle of a line.
        Write("two.jsonl.gz", Gzip(kLines.substr(0, 70)) + Gzip(kLines.substr(70))),
        Write("two.jsonl.zst", Zstd(kLines.substr(0, 70)) + Zstd(kLines.substr(70)))}) {
    const ReadResult r = ReadAll({path});
    ASSERT_TRUE(r.status.ok()) << path << ": " << r.status;
    EXPECT_THAT(r.texts, ElementsAre("first\ntext", "söcond", "third")) << path;
    EXPECT_THAT(r.titles, ElementsAre("One", "", ""));
    EXPECT_THAT(r.ids, ElementsAre("7", "b", path + ":4"));
    EXPECT_EQ(r.skipped, 0);
  }
}

TEST_F(DocumentsTest, LongWindow) {
  // 2^27 is what `zstd --long=27` writes and more than the decoder takes by default elsewhere.
  std::string text(300000, '\0');
  std::mt19937 random(3);
  for (char& c : text) c = static_cast<char>('a' + random() % 26);
  const std::string line = "{\"text\": \"" + text + "\"}\n";
  const ReadResult r = ReadAll({Write("l.jsonl.zst", Zstd(line + line, 27))});
  ASSERT_TRUE(r.status.ok()) << r.status;
  ASSERT_EQ(r.texts.size(), 2u);
  EXPECT_EQ(r.texts[1], text);
  // A window of 2^28 is refused, not allocated.
  EXPECT_EQ(ReadAll({Write("m.jsonl.zst", Zstd(line, 28))}).status.code(),
            absl::StatusCode::kDataLoss);
}

TEST_F(DocumentsTest, TextFiles) {
  const std::string path = Write("notes.txt", "line one\nline two\n");
  const ReadResult r = ReadAll({path, Write("more.txt.gz", Gzip("packed"))});
  ASSERT_TRUE(r.status.ok()) << r.status;
  EXPECT_THAT(r.texts, ElementsAre("line one\nline two", "packed"));
  EXPECT_THAT(r.titles, ElementsAre("notes", "more"));
  EXPECT_EQ(r.ids[0], path);
}

TEST_F(DocumentsTest, LongTextIsCutAtLineEnds) {
  DocumentOptions options;
  options.max_document_bytes = 12;
  const ReadResult r = ReadAll({Write("l.txt", "aaaaaaa\nbbbbbbb\nccccccc\n")}, options);
  ASSERT_TRUE(r.status.ok()) << r.status;
  EXPECT_THAT(r.texts, ElementsAre("aaaaaaa\nbbbbbbb", "ccccccc"));
  EXPECT_NE(r.ids[0], r.ids[1]);
}

TEST_F(DocumentsTest, BadLinesAreSkippedAndCounted) {
  DocumentOptions options;
  options.max_document_bytes = 100;
  const std::string path = Write("bad.jsonl",
                                 "{\"text\": \"good\"}\n"
                                 "{\"text\": \"cut\n"
                                 "[1, 2]\n"
                                 "{\"title\": \"no text\"}\n"
                                 "{\"text\": 5}\n"
                                 "{\"text\": \"  \"}\n"
                                 "{\"text\": \"\xff\"}\n"
                                 "{\"text\": \"" +
                                     std::string(300000, 'x') +
                                     "\"}\n"
                                     "{\"text\": \"last\"}\n");
  const ReadResult r = ReadAll({path}, options);
  ASSERT_TRUE(r.status.ok()) << r.status;
  EXPECT_THAT(r.texts, ElementsAre("good", "last"));
  EXPECT_EQ(r.skipped, 7);
  ASSERT_EQ(r.warnings.size(), 7u);
  EXPECT_EQ(r.warnings[0], path + ":2: is not valid JSON in UTF-8");
  EXPECT_THAT(r.warnings[2], HasSubstr(":4: has no field \"text\""));
  EXPECT_THAT(r.warnings[6], HasSubstr(":8: is longer than 100 bytes"));
  options.strict = true;
  const ReadResult strict = ReadAll({path}, options);
  EXPECT_EQ(strict.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(strict.status.message()), HasSubstr("bad.jsonl:2"));
}

TEST_F(DocumentsTest, OtherFields) {
  DocumentOptions options;
  options.text_field = "body";
  options.title_field = "name";
  const ReadResult r =
      ReadAll({Write("f.jsonl", R"({"body": "b", "name": "n", "text": "t"})")}, options);
  EXPECT_THAT(r.texts, ElementsAre("b"));
  EXPECT_THAT(r.titles, ElementsAre("n"));
}

TEST_F(DocumentsTest, UriAndMetadata) {
  const std::string path = Write(
      "m.jsonl",
      R"({"text": "a", "uri": "u:1", "url": "no", "metadata": {"year": 1871, "kind": "lamp", "lit": true}}
{"text": "b", "url": "u:2", "metadata": null}
{"text": "c", "link": "u:3", "metadata": {"of": {"what": 1}}}
{"text": "d", "link": "u:4", "metadata": ["x"]}
)");
  const auto read = [&](const DocumentOptions& options, int64_t* skipped) {
    auto reader = DocumentReader::Open({path}, options).value();
    std::vector<Document> all;
    for (Document d; reader->Next(&d).value();) all.push_back(d);
    *skipped = reader->skipped();
    return all;
  };
  int64_t skipped = 0;
  DocumentOptions options;
  std::vector<Document> all = read(options, &skipped);
  ASSERT_EQ(all.size(), 4u);
  EXPECT_EQ(all[0].uri, "u:1");
  EXPECT_EQ(all[1].uri, "u:2");
  EXPECT_EQ(all[2].uri, "");
  EXPECT_TRUE(all[0].metadata.empty()) << "not read unless named";
  options.metadata_field = "metadata";
  all = read(options, &skipped);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(skipped, 2) << "nested values and arrays are bad";
  using Pairs = std::map<std::string, std::string>;
  EXPECT_EQ(all[0].metadata, (Pairs{{"kind", "lamp"}, {"lit", "true"}, {"year", "1871"}}));
  EXPECT_TRUE(all[1].metadata.empty()) << "nothing is left of the line before";
  options.metadata_field.clear();
  options.uri_field = "link";
  all = read(options, &skipped);
  EXPECT_EQ(all[0].uri, "");
  EXPECT_EQ(all[3].uri, "u:4");
}

TEST_F(DocumentsTest, DamagedFiles) {
  std::string big;
  for (int i = 0; i < 5000; ++i) big += "{\"text\": \"number " + std::to_string(i * 7919) + "\"}\n";
  for (const auto& [name, bytes] :
       {std::pair<std::string, std::string>{"c.jsonl.gz", Gzip(big)}, {"c.jsonl.zst", Zstd(big)}}) {
    const ReadResult cut = ReadAll({Write(name, bytes.substr(0, bytes.size() / 2))});
    EXPECT_EQ(cut.status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(cut.status.message()), HasSubstr(name));
    EXPECT_EQ(ReadAll({Write(name, "")}).status.code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(ReadAll({Write(name, "this is no compressed data")}).status.code(),
              absl::StatusCode::kDataLoss);
  }
  EXPECT_EQ(ReadAll({Write("b.txt", std::string_view("PK\0\0", 4))}).status.code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadAll({"/nonexistent/x.txt"}).status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadAll({Write("x.pdf", "a")}).status.code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::create_directories(directory_ / "d.txt");
  EXPECT_EQ(ReadAll({(directory_ / "d.txt").string()}).status.code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(ReadAll({Write("empty.jsonl", "")}).texts.empty());
}

TEST_F(DocumentsTest, NoBytesCrashIt) {
  std::mt19937 random(7);
  for (int round = 0; round < 60; ++round) {
    std::string bytes(random() % 2000, '\0');
    for (char& b : bytes) b = static_cast<char>(random());
    if (round % 3 == 0) bytes = std::string(random() % 100000, '[');
    for (const char* name : {"r.jsonl", "r.txt", "r.jsonl.gz", "r.txt.zst"}) {
      const ReadResult r = ReadAll({Write(name, bytes)});
      EXPECT_TRUE(r.status.ok() || !r.status.message().empty());
    }
  }
}

TEST_F(DocumentsTest, BrokenUtf8InText) {
  const ReadResult r = ReadAll({Write("u.txt", "caf\xe9 \xef\xbf\xbd ok")});
  ASSERT_TRUE(r.status.ok());
  EXPECT_THAT(r.texts, ElementsAre("caf\uFFFD \uFFFD ok"));
  ASSERT_EQ(r.warnings.size(), 1u);
  EXPECT_THAT(r.warnings[0], HasSubstr("1 bytes are not UTF-8"));
}

TEST_F(DocumentsTest, HoldOut) {
  HoldOut hold_out(10, 3);
  ASSERT_TRUE(
      hold_out.AddTitlesFrom(Write("t.jsonl", "{\"title\": \"Black_Death\", \"x\": 1}\n")).ok());
  Document document;
  document.id = "1273";
  EXPECT_TRUE(hold_out.Contains(document));
  document.id = "1274";
  EXPECT_FALSE(hold_out.Contains(document));
  document.id = "f.txt:3";
  EXPECT_FALSE(hold_out.Contains(document));
  document.title = "Black Death";
  EXPECT_TRUE(hold_out.Contains(document));
  EXPECT_FALSE(HoldOut().Contains(document));
}

}  // namespace
}  // namespace memory3
