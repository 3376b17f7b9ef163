// `trainer write` against the real memory server: whatever is killed whenever, the knowledge base
// ends as an undisturbed run makes it; shards, replacing, bad input, a knowledge base of another
// model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "embedder/embedder.h"
#include "memory/hash.h"
#include "memory_server/client.h"
#include "nlohmann/json.hpp"
#include "tests/child_process.h"
#include "transformer/checkpoint.h"
#include "transformer/json.h"
#include "transformer/model.h"
#include "transformer/tokenizer.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
using Stub = MemoryClient::Stub;
namespace fs = std::filesystem;

constexpr char kTokenizer[] = "transformer/testdata/spm_tiny";

// Record id → the record's SHA-256 and its sources, in order.
using Content = std::map<std::string, std::string>;

class WriteTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(::testing::TempDir()) / absl::StrCat("write_", getpid());
    fs::remove_all(root_);
    fs::create_directories(root_);
    SaveModel("model", 1);
  }
  void TearDown() override {
    server_.reset();
    fs::remove_all(root_);
  }
  std::string Path(const std::string& name) const { return (root_ / name).string(); }

  void SaveModel(const std::string& name, uint64_t seed) {
    const std::string file = absl::StrCat(kTokenizer, "/tokenizer.model");
    const auto tokenizer = MakeSentencePieceTokenizer(*ReadSmallFile(file, 1 << 24), file);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    ModelConfig config;
    config.vocab_size = (*tokenizer)->vocab_size();
    config.hidden_size = 64;
    config.intermediate_size = 128;
    config.layers = 4;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 16;
    config.bos_token_id = (*tokenizer)->bos_id();
    config.explicit_memory.emplace();
    config.explicit_memory->memory_layers = {0, 1};
    config.explicit_memory->prefix_token_ids = PrefixTokenIds(**tokenizer);
    const RandomWeights weights(seed, 0.1f);
    const absl::Status saved = SaveModelDirectory(
        Path(name), config, DType::kF32,
        [&](const ModelTensor& t, std::span<float> out) {
          return weights.Read(t.name, t.rows, t.cols, out);
        },
        kTokenizer);
    ASSERT_TRUE(saved.ok()) << saved;
  }

  // Some sentences stand in several documents.
  void SaveDocuments(const std::string& name, int first, int count) {
    std::ofstream out(Path(name));
    for (int d = first; d < first + count; ++d) {
      std::mt19937 random(d);
      std::string text;
      for (int s = 0; s < 25; ++s) {
        absl::StrAppend(&text, s == 0 ? "" : s % 5 == 0 ? "\\n" : " ", "The");
        for (int w = 0; w < 8; ++w) {
          text += ' ';
          for (int c = 0; c < 4; ++c) text += static_cast<char>('a' + random() % 26);
        }
        text += '.';
      }
      out << "{\"id\": " << d << ", \"title\": \"" << (d % 7 == 0 ? "Same" : absl::StrCat("N ", d))
          << "\", \"text\": \"" << (d % 7 == 0 ? "One short text for many." : text) << "\"}\n";
    }
  }

  void StartServer(const std::string& data, const std::string& port = "0",
                   const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {"--data", Path(data), "--listen", "127.0.0.1:" + port};
    arguments.insert(arguments.end(), more.begin(), more.end());
    server_ = std::make_unique<ChildProcess>("memory_server", arguments);
    const std::optional<std::string> found = server_->WaitForLine(R"(gRPC on port (\d+))");
    ASSERT_TRUE(found) << server_->output();
    port_ = *found;
  }
  std::unique_ptr<MemoryClient> Connect() const {
    return *MemoryClient::Create({.target = "127.0.0.1:" + port_});
  }

  std::vector<std::string> Write(const std::string& documents,
                                 const std::vector<std::string>& more = {}) const {
    std::vector<std::string> arguments = {"write",
                                          Path(documents),
                                          "--model",
                                          Path("model"),
                                          "--knowledge_base",
                                          "kb",
                                          "--server",
                                          "127.0.0.1:" + port_,
                                          "--threads",
                                          "1",
                                          "--rows",
                                          "256",
                                          "--metrics",
                                          Path("metrics.jsonl"),
                                          "--codec",
                                          "bf16",
                                          "--patience",
                                          "60",
                                          "--unacknowledged_kb",
                                          "64"};
    // What is given takes the place of the default.
    for (size_t i = 0; i + 1 < more.size(); i += 2) {
      const auto same = std::find(arguments.begin(), arguments.end(), more[i]);
      if (same != arguments.end()) arguments.erase(same, same + 2);
    }
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  int Run(const std::vector<std::string>& arguments) {
    // FAISS's threads on a busy machine wait for each other more than they train.
    ChildProcess process("trainer", arguments,
                         {{"OMP_NUM_THREADS", "1"}, {"OPENBLAS_NUM_THREADS", "1"}});
    const int code = process.Wait();
    output_ = process.output();
    return code;
  }
  // The last line of the last run.
  nlohmann::json Metrics() const {
    std::ifstream in(Path("metrics.jsonl"));
    std::string last;
    for (std::string line; std::getline(in, line);) last = line;
    return nlohmann::json::parse(last);
  }

  Content ContentOf(uint64_t* version) const {
    const auto client = Connect();
    v1::GetKnowledgeBaseRequest get;
    get.set_knowledge_base("kb");
    const auto kb = client->Call(&Stub::GetKnowledgeBase, get);
    EXPECT_TRUE(kb.ok()) << kb.status();
    if (!kb.ok()) return {};
    *version = kb->knowledge_base().version();
    v1::RetrieveRequest request;
    request.set_knowledge_base("kb");
    request.set_with_text(true);
    request.add_queries()->set_top_k(1000);
    const auto query = (*MakeEmbedder("lexical"))->EmbedOne("the one");
    request.mutable_queries(0)->mutable_embedding()->Add(query->begin(), query->end());
    const auto answer = client->OpenRetrieve()->Retrieve(request);
    EXPECT_TRUE(answer.ok()) << answer.status();
    Content content;
    size_t entries = 0;
    for (const auto& hit : answer->hits.queries(0).hits()) {
      std::vector<std::string> sources;
      for (const v1::Source& source : hit.sources()) sources.push_back(source.SerializeAsString());
      entries += sources.size();
      std::sort(sources.begin(), sources.end());
      const RecordId id = *RecordId::FromBytes(hit.record_id());
      std::string& value = content[id.ToHex()];
      value = Sha256Of(*answer->records.at(id)).ToHex() + absl::StrCat(" ", hit.score());
      for (const std::string& source : sources) absl::StrAppend(&value, "\n", source);
    }
    EXPECT_EQ(entries, kb->knowledge_base().entries());
    EXPECT_EQ(content.size(), kb->knowledge_base().records());
    EXPECT_LT(content.size(), 1000);  // all of them
    return content;
  }

  fs::path root_;
  std::string port_, output_;
  std::unique_ptr<ChildProcess> server_;
};

TEST_F(WriteTest, KilledAtAnyMomentItEndsWithTheSameKnowledgeBase) {
  SaveDocuments("documents.jsonl", 0, 120);
  StartServer("undisturbed");
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_EQ(Run(Write("documents.jsonl")), 0) << output_;
  const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::steady_clock::now() - begin);
  uint64_t version = 0;
  const Content undisturbed = ContentOf(&version);
  EXPECT_EQ(version, 2);
  ASSERT_GT(undisturbed.size(), 300);

  // Killed by turns in random order, after waits that are short beside the whole. How fast the
  // machine is may change meanwhile: a run that ends too soon to be killed often enough on both
  // sides must agree too, and another follows, with shorter waits.
  constexpr int kEach = 3, kAttempts = 6;
  std::mt19937 random(17);
  int writer_kills = 0, server_kills = 0, resumptions = 0, attempt = 0;
  for (; attempt < kAttempts && std::min(writer_kills, server_kills) < kEach; ++attempt) {
    StartServer(absl::StrCat("disturbed_", attempt));
    writer_kills = server_kills = 0;
    for (bool done = false; !done;) {
      fs::remove(Path("metrics.jsonl"));
      ChildProcess writer("trainer", Write("documents.jsonl"));
      for (bool ended = false; !ended;) {
        const int left[] = {kEach - writer_kills, kEach - server_kills};
        const bool disturb = left[0] + left[1] > 0;
        const auto wait =
            disturb ? took * (random() % 500 + 50) / (1000 << attempt) : std::chrono::seconds(120);
        if (writer.WaitForLine("is published|this load is there already", wait)) {
          ASSERT_EQ(writer.Wait(), 0) << writer.output();
          ended = done = true;
        } else if (!disturb) {
          FAIL() << writer.output();
        } else if (static_cast<int>(random() % (left[0] + left[1])) < left[0]) {
          ++writer_kills;
          writer.Signal(SIGKILL);
          EXPECT_EQ(writer.Wait(), -SIGKILL) << writer.output();
          ended = true;
        } else {  // the writer goes on with the next server
          ++server_kills;
          server_->Signal(SIGKILL);
          server_->Wait();
          StartServer(absl::StrCat("disturbed_", attempt), port_);
        }
      }
      if (fs::exists(Path("metrics.jsonl")) && fs::file_size(Path("metrics.jsonl")) > 0) {
        resumptions += Metrics()["loaded_before"] > 0;
      }
    }
    EXPECT_TRUE(ContentOf(&version) == undisturbed);
    EXPECT_EQ(version, 2);
  }
  RecordProperty("writer_kills", writer_kills);
  RecordProperty("server_kills", server_kills);
  RecordProperty("resumptions", resumptions);
  RecordProperty("attempts", attempt);
  EXPECT_EQ(writer_kills, kEach);
  EXPECT_EQ(server_kills, kEach);

  // Once more: nothing to do.
  ASSERT_EQ(Run(Write("documents.jsonl")), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("committed as version 2"));
}

TEST_F(WriteTest, ARunGoesOnWhereTheLoadStands) {
  SaveDocuments("documents.jsonl", 0, 120);
  StartServer("store");
  {
    ChildProcess writer("trainer", Write("documents.jsonl"));
    // Killed once the load holds something.
    const auto client = Connect();
    v1::ListLoadsResponse loads;
    while (loads.loads_size() == 0 || loads.loads(0).entries() < 40) {
      const auto now = client->Call(&Stub::ListLoads, v1::ListLoadsRequest());
      ASSERT_TRUE(now.ok()) << now.status();
      loads = *now;
      ASSERT_FALSE(writer.WaitForLine("is published", std::chrono::milliseconds(1)));
    }
    writer.Signal(SIGKILL);
    writer.Wait();
  }
  ASSERT_EQ(Run(Write("documents.jsonl")), 0) << output_;
  const nlohmann::json metrics = Metrics();
  EXPECT_GE(metrics["loaded_before"], 40);
  EXPECT_LT(metrics["encoded"], metrics["references"].get<int>() - 39);
  EXPECT_GT(metrics["same_in_run"], 0);
}

TEST_F(WriteTest, ReplacingEncodesOnlyWhatIsNew) {
  SaveDocuments("old.jsonl", 0, 30);
  SaveDocuments("new.jsonl", 15, 30);
  StartServer("direct");
  ASSERT_EQ(Run(Write("new.jsonl")), 0) << output_;
  uint64_t version = 0;
  const Content direct = ContentOf(&version);
  StartServer("replaced");
  ASSERT_EQ(Run(Write("old.jsonl")), 0) << output_;
  ASSERT_EQ(Run(Write("new.jsonl", {"--mode", "replace"})), 0) << output_;
  EXPECT_TRUE(ContentOf(&version) == direct);
  EXPECT_EQ(version, 3);
  const nlohmann::json metrics = Metrics();
  EXPECT_GT(metrics["same_in_store"], 20);
  EXPECT_LT(metrics["encoded"], metrics["references"].get<int>() - 20);
}

TEST_F(WriteTest, UriAndMetadataComeWithEachSource) {
  std::ofstream(Path("documents.jsonl"))
      << R"({"id": "a", "title": "A", "text": "The one lamp.", "url": "https://a.example/1", )"
      << R"("metadata": {"year": 1871, "kind": "lamp"}})"
      << "\n"
      << R"({"id": "b", "title": "B", "text": "The one ship.", "metadata": {"kind": "ship"}})"
      << "\n"
      << R"({"id": "c", "text": "The one whose address is too long.", "uri": ")"
      << std::string(9000, 'x') << "\"}\n"
      << R"({"id": "d", "text": "The one with an empty key.", "metadata": {"": "x"}})"
      << "\n";
  StartServer("store");
  ASSERT_EQ(Run(Write("documents.jsonl")), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("documents.jsonl:3: its uri has 9000 bytes"));
  EXPECT_THAT(output_, HasSubstr("documents.jsonl:4: its metadata"));
  v1::RetrieveRequest request;
  request.set_knowledge_base("kb");
  const auto query = (*MakeEmbedder("lexical"))->EmbedOne("the one");
  request.add_queries()->set_top_k(10);
  request.mutable_queries(0)->mutable_embedding()->Add(query->begin(), query->end());
  (*request.mutable_queries(0)->mutable_filter()->mutable_metadata())["kind"] = "lamp";
  const auto answer = Connect()->OpenRetrieve()->Retrieve(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ASSERT_EQ(answer->hits.queries(0).hits_size(), 1) << "the filter matches on it";
  const v1::Source& source = answer->hits.queries(0).hits(0).sources(0);
  EXPECT_EQ(source.document_id(), "a");
  EXPECT_EQ(source.uri(), "https://a.example/1");
  EXPECT_EQ(source.metadata().at("year"), "1871");
}

TEST_F(WriteTest, ShardsFillOneLoadAndTheCallWithoutCommitsIt) {
  SaveDocuments("documents.jsonl", 0, 30);
  StartServer("whole");
  ASSERT_EQ(Run(Write("documents.jsonl")), 0) << output_;
  uint64_t version = 0;
  const Content whole = ContentOf(&version);
  StartServer("shards");
  for (const char* shard : {"1/3", "3/3"}) {
    ASSERT_EQ(Run(Write("documents.jsonl", {"--shard", shard})), 0) << output_;
    EXPECT_THAT(output_, HasSubstr("without --shard commits it"));
    EXPECT_TRUE(ContentOf(&version).empty());
  }
  ASSERT_EQ(Run(Write("documents.jsonl")), 0) << output_;  // the second third, and the commit
  EXPECT_TRUE(ContentOf(&version) == whole);
  EXPECT_NE(Run(Write("documents.jsonl", {"--shard", "4/3"})), 0);
  EXPECT_THAT(output_, HasSubstr("--shard \"4/3\""));
}

TEST_F(WriteTest, KeysAndCertificatesAreAskedFor) {
  SaveDocuments("documents.jsonl", 0, 3);
  const auto run = [&](const std::string& command) {
    ASSERT_EQ(std::system(("cd " + root_.string() + " && " + command + " 2>/dev/null").c_str()), 0)
        << command;
  };
  run("openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=test-ca "
      "-days 2");
  for (const char* name : {"server", "client"}) {
    run(absl::StrCat("openssl req -newkey rsa:2048 -nodes -keyout ", name, ".key -out ", name,
                     ".csr -subj /CN=localhost && echo subjectAltName=IP:127.0.0.1 > san && "
                     "openssl x509 -req -in ",
                     name,
                     ".csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out ",
                     name, ".pem"));
  }
  std::ofstream(Path("keys.json")) << absl::StrCat(
      R"({"keys": [{"name": "loader", "tenant": "acme", "knowledge_bases": {"*": "admin"}, )",
      R"("sha256": ")", Sha256Of("loader-key").ToHex(), R"("}]})");
  StartServer("store", "0",
              {"--api_keys", Path("keys.json"), "--tls_certificate", Path("server.pem"),
               "--tls_key", Path("server.key"), "--tls_client_ca", Path("ca.pem")});
  const std::vector<std::string> certificates = {
      "--tls_ca",  Path("ca.pem"),     "--tls_certificate", Path("client.pem"),
      "--tls_key", Path("client.key"), "--patience",        "3"};
  const auto with = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = certificates;
    all.insert(all.end(), more.begin(), more.end());
    return Write("documents.jsonl", all);
  };
  ASSERT_EQ(Run(with({"--api_key", "loader-key", "--tenant", "acme"})), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("is published"));
  EXPECT_EQ(Run(with({"--api_key", "wrong", "--label", "again"})), 1);
  EXPECT_THAT(output_, HasSubstr("key"));
  EXPECT_EQ(Run(with({"--label", "again"})), 1) << "no key";
  EXPECT_EQ(Run(Write("documents.jsonl", {"--api_key", "loader-key", "--patience", "3"})), 1)
      << "no certificate";
  EXPECT_THAT(output_, HasSubstr("127.0.0.1:" + port_));
  EXPECT_EQ(
      Run(Write("documents.jsonl", {"--api_key", "loader-key", "--tls_ca", Path("none.pem")})), 1);
  EXPECT_THAT(output_, HasSubstr("none.pem"));
}

TEST_F(WriteTest, BadInputAndForeignKnowledgeBasesAreRefusedByName) {
  SaveDocuments("documents.jsonl", 0, 3);
  SaveModel("other", 2);
  std::ofstream(Path("empty.jsonl"));
  std::ofstream(Path("binary.txt")) << std::string("a\0b", 3);
  std::ofstream(Path("mixed.jsonl"))
      << "{\"id\": 1, \"text\": \"Good text.\"}\nno JSON\n{\"id\": 2, \"text\": \"\xff\xfe\"}\n"
      << "{\"id\": 1, \"text\": \"Another of the same name.\"}\n{\"id\": \""
      << std::string(600, 'x') << "\", \"text\": \"A long name.\"}\n";
  // Nobody listens.
  port_ = "1";
  EXPECT_EQ(Run(Write("documents.jsonl")), 1);
  EXPECT_THAT(output_, HasSubstr("server 127.0.0.1:1: "));
  EXPECT_EQ(Run(Write("documents.jsonl", {"--dry-run"})), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("3 documents"));

  StartServer("store");
  EXPECT_EQ(Run(Write("empty.jsonl")), 1);
  EXPECT_THAT(output_, HasSubstr("holds no text"));
  EXPECT_EQ(Run(Write("binary.txt")), 1);
  EXPECT_THAT(output_, HasSubstr("binary.txt: line 1 holds a NUL byte"));
  EXPECT_EQ(Run(Write("missing.jsonl")), 1);
  EXPECT_THAT(output_, HasSubstr("missing.jsonl"));
  EXPECT_EQ(Run(Write("mixed.jsonl", {"--strict"})), 1);
  EXPECT_THAT(output_, HasSubstr("mixed.jsonl:2: is not valid JSON"));
  EXPECT_EQ(Run(Write("mixed.jsonl")), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("mixed.jsonl:3: is not valid JSON in UTF-8"));
  EXPECT_THAT(output_, HasSubstr("mixed.jsonl:4: another document before it has the id \"1\""));
  EXPECT_THAT(output_, HasSubstr("mixed.jsonl:5: its id has 600 bytes"));
  EXPECT_THAT(output_, HasSubstr("4 documents skipped"));
  EXPECT_THAT(output_, HasSubstr("1 documents, 1 references"));

  std::vector<std::string> other = Write("documents.jsonl");
  *std::find(other.begin(), other.end(), Path("model")) = Path("other");
  EXPECT_EQ(Run(other), 1);
  EXPECT_THAT(output_, HasSubstr("writer fingerprint (model)"));
  *std::find(other.begin(), other.end(), Path("other")) = Path("none");
  EXPECT_EQ(Run(other), 1);
  EXPECT_THAT(output_, HasSubstr(Path("none")));
  std::vector<std::string> f32 = Write("documents.jsonl");
  *(std::find(f32.begin(), f32.end(), "bf16")) = "f32";
  EXPECT_EQ(Run(f32), 1);
  EXPECT_THAT(output_, HasSubstr("its codec is bf16, here it is f32"));
  *(std::find(f32.begin(), f32.end(), "f32")) = "vq";
  EXPECT_EQ(Run(f32), 1);
  EXPECT_THAT(output_, HasSubstr("codebook"));
}

TEST_F(WriteTest, ACodebookIsTrainedAndKeptWithTheKnowledgeBase) {
  SaveDocuments("documents.jsonl", 0, 12);
  const auto codec = [&](const std::string& out, const std::string& bits) {
    return std::vector<std::string>{
        "codec", Path("documents.jsonl"), "--model", Path("model"), "--out", Path(out), "--threads",
        "1",     "--coarse_bits",         bits,      "--fine_bits", "4"};
  };
  ASSERT_EQ(Run(codec("codebook.m3cb", "4")), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("on held-out keys"));
  EXPECT_EQ(Run(codec("large.m3cb", "14")), 1);
  EXPECT_THAT(output_, HasSubstr("at least 16384 are needed"));
  ASSERT_EQ(Run(codec("few.m3cb", "9")), 0) << output_;
  EXPECT_THAT(output_, HasSubstr("39 per centroid"));

  StartServer("store");
  std::vector<std::string> write = Write("documents.jsonl");
  *(std::find(write.begin(), write.end(), "bf16")) = "vq";
  std::vector<std::string> with_codebook = write;
  with_codebook.insert(with_codebook.end(), {"--codebook", Path("codebook.m3cb")});
  ASSERT_EQ(Run(with_codebook), 0) << output_;
  // The knowledge base's own serves the next load.
  write.insert(write.end(), {"--label", "again"});
  ASSERT_EQ(Run(write), 0) << output_;
  EXPECT_EQ(Metrics()["encoded"], 0);
  uint64_t version = 0;
  EXPECT_GT(ContentOf(&version).size(), 20);
  EXPECT_EQ(version, 3);
}

}  // namespace
}  // namespace memory3
