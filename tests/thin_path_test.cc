// The thin path through all rooms: a model writes memories, they are bulk-loaded into the real
// memory server, a query retrieves them over the wire, the decoder attends to them, and the logits
// are those of the path that never left the process, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "embedder/embedder.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory_server/client.h"
#include "tests/child_process.h"
#include "transformer/decoder.h"
#include "transformer/memory_writer.h"
#include "transformer/model.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;

ModelConfig TinyConfig() {
  ModelConfig config;
  config.vocab_size = 128;
  config.hidden_size = 48;
  config.intermediate_size = 96;
  config.layers = 4;
  config.heads = 6;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.max_position_embeddings = 512;
  config.bos_token_id = 1;
  config.explicit_memory.emplace();
  config.explicit_memory->memory_layers = {0, 1};
  config.explicit_memory->prefix_token_ids = {1, 50, 60};
  return config;
}

// Byte-level "tokens" of a text, all within the vocabulary.
std::vector<int32_t> Ids(const std::string& text) {
  std::vector<int32_t> ids;
  for (const unsigned char c : text) ids.push_back(c % 128);
  ids.resize(std::min<size_t>(ids.size(), 128));
  return ids;
}

TEST(ThinPathTest, LogitsThroughTheServersAreThoseOfTheProcessBitForBit) {
  const std::vector<std::string> references = {
      "The lighthouse of Velmora was lit for the first time in the spring of 1871.",
      "Copper from the Arden mines was carried to the coast by a narrow railway.",
      "A heron nests by the upper lake and returns to the same reeds each March.",
      "Bread.",  // shorter than tokens_kept
      "The clock of the town hall strikes thirteen at noon, in memory of a wager.",
      "Ferries cross the strait every forty minutes, more often on market days.",
      "In the school's cellar stands a telescope that once belonged to a baker.",
  };
  const std::string question = "When was the lighthouse of Velmora first lit?";

  absl::StatusOr<std::unique_ptr<Device>> device = MakeCpuDevice({.threads = 1});
  ASSERT_TRUE(device.ok()) << device.status();
  const ModelConfig config = TinyConfig();
  const auto model = Model::Load(device->get(), config, RandomWeights(7, 0.2f), WeightFormat::kF32);
  ASSERT_TRUE(model.ok()) << model.status();
  auto writer = MemoryWriter::Create(*model, {});
  ASSERT_TRUE(writer.ok()) << writer.status();
  auto embedder = MakeEmbedder("lexical");
  ASSERT_TRUE(embedder.ok()) << embedder.status();

  // Write.
  std::vector<std::vector<int32_t>> ids;
  for (const std::string& reference : references) ids.push_back(Ids(reference));
  const auto memories = (*writer)->Write(ids);
  ASSERT_TRUE(memories.ok()) << memories.status();

  // Load.
  const std::filesystem::path data =
      std::filesystem::path(::testing::TempDir()) / absl::StrCat("thin_path_", getpid());
  std::filesystem::remove_all(data);
  ChildProcess server("memory_server", {"--data", data.string(), "--listen", "127.0.0.1:0"});
  const std::optional<std::string> port = server.WaitForLine(R"(gRPC on port (\d+))");
  ASSERT_TRUE(port) << server.output();
  const auto client = MemoryClient::Create({.target = "localhost:" + *port});
  ASSERT_TRUE(client.ok()) << client.status();
  const Hash256 fingerprint = Sha256Of("the tiny model");
  const std::unique_ptr<Codec> codec = MakeF32Codec(config.head_dim);

  v1::CreateKnowledgeBaseRequest create;
  v1::KnowledgeBaseSpec& spec = *create.mutable_spec();
  spec.set_name("velmora");
  spec.set_writer_fingerprint(std::string(fingerprint.view()));
  spec.set_embedder_fingerprint(std::string((*embedder)->fingerprint().view()));
  spec.set_embedding_dimension((*embedder)->dimension());
  spec.set_codec(v1::CODEC_F32);
  for (const int layer : config.explicit_memory->memory_layers)
    spec.mutable_geometry()->add_memory_layers(layer);
  spec.mutable_geometry()->set_kv_heads(config.kv_heads);
  spec.mutable_geometry()->set_head_dim(config.head_dim);
  spec.mutable_geometry()->set_tokens_kept(config.explicit_memory->tokens_kept);
  spec.mutable_geometry()->set_reference_tokens(config.explicit_memory->reference_tokens);
  const auto created = (*client)->Call(&Stub::CreateKnowledgeBase, create);
  ASSERT_TRUE(created.ok()) << created.status();

  v1::BeginLoadRequest begin;
  begin.set_knowledge_base("velmora");
  begin.set_idempotency_key("thin path");
  begin.set_mode(v1::LOAD_MODE_REPLACE);
  const auto load = (*client)->Call(&Stub::BeginLoad, begin);
  ASSERT_TRUE(load.ok()) << load.status();
  const std::unique_ptr<LoadWriter> load_writer = (*client)->PutLoad(load->load().load_id());
  for (size_t r = 0; r < references.size(); ++r) {
    const auto record = EncodeRecord((*memories)[r], fingerprint, *codec);
    ASSERT_TRUE(record.ok()) << record.status();
    v1::Entry entry;
    entry.mutable_source()->set_document_id(absl::StrCat("doc-", r));
    entry.mutable_source()->set_text(references[r]);
    const RecordId id = ComputeRecordId("default", fingerprint, CodecId::kF32, {}, ids[r]);
    entry.set_record_id(std::string(id.view()));
    const auto embedding = (*embedder)->EmbedOne(references[r]);
    ASSERT_TRUE(embedding.ok()) << embedding.status();
    entry.mutable_embedding()->Add(embedding->begin(), embedding->end());
    ASSERT_TRUE(load_writer->Write(entry, *record).ok());
  }
  const auto taken = load_writer->Finish();
  ASSERT_TRUE(taken.ok()) << taken.status();
  v1::CommitLoadRequest commit;
  commit.set_load_id(load->load().load_id());
  commit.set_wait(true);
  const auto committed = (*client)->Call(&Stub::CommitLoad, commit);
  ASSERT_TRUE(committed.ok()) << committed.status();
  ASSERT_EQ(committed->load().state(), v1::LOAD_STATE_COMMITTED) << committed->load().failure();

  // Retrieve.
  v1::RetrieveRequest request;
  request.set_knowledge_base("velmora");
  const auto query = (*embedder)->EmbedOne(question);
  ASSERT_TRUE(query.ok());
  request.add_queries()->set_top_k(5);
  request.mutable_queries(0)->mutable_embedding()->Add(query->begin(), query->end());
  const auto answer = (*client)->OpenRetrieve()->Retrieve(request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  const auto& hits = answer->hits.queries(0).hits();
  ASSERT_EQ(hits.size(), 5);
  EXPECT_EQ(hits[0].sources(0).document_id(), "doc-0");

  // Attend: once to what came over the wire, once to what never left.
  const auto logits_with = [&](bool through_the_server) {
    DecoderOptions options;
    options.memory_slots = 5;
    auto decoder = Decoder::Create(*model, options);
    EXPECT_TRUE(decoder.ok()) << decoder.status();
    MemoryRead read;
    for (int i = 0; i < hits.size(); ++i) {
      const RecordId id = *RecordId::FromBytes(hits[i].record_id());
      const size_t reference = std::stoul(hits[i].sources(0).document_id().substr(4));
      ExplicitMemory memory = (*memories)[reference];
      if (through_the_server) {
        auto decoded = DecodeRecord(*answer->records.at(id), fingerprint, *codec);
        EXPECT_TRUE(decoded.ok()) << decoded.status();
        memory = *std::move(decoded);
      }
      EXPECT_TRUE((*decoder)->pool().Load(i, memory).ok());
      read.slots.push_back(i);
    }
    std::vector<int32_t> prompt = Ids(question);
    prompt.insert(prompt.begin(), config.bos_token_id);
    Sequence sequence = *(*decoder)->Start(Layout::kMemory);
    read.tokens = static_cast<int>(prompt.size());
    const Slice slice = {&sequence, prompt, {&read, 1}, read.tokens};
    EXPECT_TRUE((*decoder)->Forward({&slice, 1}).ok());
    std::vector<float> logits;
    EXPECT_TRUE((*decoder)->DownloadLogits(&logits).ok());
    return logits;
  };
  const std::vector<float> through_the_server = logits_with(true);
  ASSERT_FALSE(through_the_server.empty());
  EXPECT_EQ(through_the_server, logits_with(false));

  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0) << server.output();
  std::filesystem::remove_all(data);
}

}  // namespace
}  // namespace memory3
