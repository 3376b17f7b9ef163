// What clients and probes see of a failing disk: writes fail with the cause, reads go on, and
// health turns to not serving for writes only.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <rocksdb/env.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "memory_server/client.h"
#include "memory_server/conversions.h"
#include "memory_server/faulty_file_system.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/server.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using Fault = store_testing::FaultyFileSystem::Fault;

// grpc.health.v1.Health/Check: 1 SERVING, 2 NOT_SERVING; -1: no answer.
int Health(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  // HealthCheckRequest{1: service}, HealthCheckResponse{1: status}
  const std::string request =
      service.empty()
          ? ""
          : absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  grpc::GenericStub generic(channel);
  grpc::Slice slice(request);
  grpc::ByteBuffer out(&slice, 1), in;
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto call = generic.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", out, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&in, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  std::vector<grpc::Slice> slices;
  if (!queue.Next(&tag, &ok) || !status.ok() || !in.Dump(&slices).ok() || slices.size() != 1 ||
      slices[0].size() != 2) {
    return -1;
  }
  return *(slices[0].begin() + 1);
}

class ServerFaultTest : public testing::TestWithParam<Fault> {};

TEST_P(ServerFaultTest, HealthTurnsForWritesOnly) {
  store_testing::TemporaryDirectory directory;
  auto faulty = std::make_shared<store_testing::FaultyFileSystem>();
  const std::unique_ptr<rocksdb::Env> env = rocksdb::NewCompositeEnv(faulty);
  RocksDbStoreOptions options;
  options.directory = directory.path() + "/data";
  options.cache_bytes = 8 << 20;
  options.env = env.get();
  absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(options);
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_TRUE((*store)->CreateKnowledgeBase("default", store_testing::SmallSpec("kb"), false).ok());
  ServingOptions serving;
  serving.listen = "127.0.0.1:0";
  absl::StatusOr<std::unique_ptr<MemoryServer>> server =
      MemoryServer::Start(store->get(), serving, {});
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string target = absl::StrCat("127.0.0.1:", (*server)->port());
  MemoryClientOptions client_options;
  client_options.target = target;
  const std::unique_ptr<MemoryClient> client = *MemoryClient::Create(client_options);
  const auto put = [&](uint64_t n) {
    const auto owned = store_testing::MakeEntry("doc", static_cast<uint32_t>(n), n);
    v1::Entry entry;
    *entry.mutable_source() = ToProto(owned->entry.source);
    entry.set_record_id(std::string(owned->entry.record_id.view()));
    entry.mutable_embedding()->Add(owned->embedding.begin(), owned->embedding.end());
    const auto writer = client->Put("kb", /*wait=*/true);
    (void)writer->Write(entry, owned->record);
    return writer->Finish().status();
  };
  const auto retrieve = [&] {
    v1::RetrieveRequest request;
    request.set_knowledge_base("kb");
    const std::vector<float> vector = store_testing::MakeVector(1);
    request.add_queries()->mutable_embedding()->Add(vector.begin(), vector.end());
    request.mutable_queries(0)->set_top_k(1);
    return client->OpenRetrieve()->Retrieve(std::move(request)).status();
  };
  const auto channel = grpc::CreateChannel(target, grpc::InsecureChannelCredentials());
  const auto await_write_health = [&](int wanted) {
    const absl::Time until = absl::Now() + absl::Seconds(60);
    while (Health(channel, kMemoryWriteHealthName) != wanted && absl::Now() < until) {
      std::this_thread::yield();
    }
    return Health(channel, kMemoryWriteHealthName);
  };
  ASSERT_TRUE(put(1).ok());
  EXPECT_EQ(await_write_health(1), 1);

  faulty->fault = GetParam();
  const absl::Status failed = put(2);
  EXPECT_EQ(failed.code(), GetParam() == Fault::kNoSpace ? absl::StatusCode::kResourceExhausted
                                                         : absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(failed.message()), testing::HasSubstr("injected"));
  EXPECT_EQ(await_write_health(2), 2);
  EXPECT_EQ(Health(channel, kMemoryServiceName), 1);
  EXPECT_EQ(Health(channel, ""), 1);
  EXPECT_TRUE(retrieve().ok()) << retrieve();

  faulty->fault = Fault::kNone;
  EXPECT_EQ(await_write_health(1), 1);
  EXPECT_TRUE(put(3).ok());
  EXPECT_TRUE(retrieve().ok());
  (*server)->Shutdown(absl::Seconds(20));
}

INSTANTIATE_TEST_SUITE_P(Faults, ServerFaultTest, testing::Values(Fault::kNoSpace, Fault::kError));

}  // namespace
}  // namespace memory3
