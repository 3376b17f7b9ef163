// Black-box tests of inference_server against its clients and its operator: too many clients, ones
// that vanish or do not read, keys and TLS, loading, draining, and flags that are wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "tests/inference_testing.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
using Stub = v1::InferenceService::Stub;

constexpr char kRunning[] = "memory3_num_requests_running";
constexpr char kWaiting[] = "memory3_num_requests_waiting";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// TCP connections to `target` that can be cut without a word of goodbye.
class Relay {
 public:
  explicit Relay(int target) : target_(target) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = Local(0);
    socklen_t length = sizeof address;
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), length), 0);
    EXPECT_EQ(listen(listener_, 8), 0);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
    threads_.emplace_back([this] { Accept(); });
  }
  ~Relay() {
    shutdown(listener_, SHUT_RDWR);
    Cut();
    threads_.front().join();
    for (size_t i = 1; i < threads_.size(); ++i) threads_[i].join();
    close(listener_);
    for (const int fd : sockets_) close(fd);
  }
  std::string target() const { return absl::StrCat("127.0.0.1:", port_); }
  void Cut() {
    absl::MutexLock lock(&mutex_);
    for (const int fd : sockets_) shutdown(fd, SHUT_RDWR);
  }

 private:
  static sockaddr_in Local(int port) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }
  static void Pump(int from, int to) {
    char buffer[16384];
    for (ssize_t n; (n = recv(from, buffer, sizeof buffer, 0)) > 0;) {
      if (send(to, buffer, static_cast<size_t>(n), MSG_NOSIGNAL) < 0) break;
    }
    shutdown(to, SHUT_RDWR);
  }
  void Accept() {
    for (int client; (client = accept(listener_, nullptr, nullptr)) >= 0;) {
      const int server = socket(AF_INET, SOCK_STREAM, 0);
      const sockaddr_in address = Local(target_);
      EXPECT_EQ(connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
      absl::MutexLock lock(&mutex_);
      sockets_.insert(sockets_.end(), {client, server});
      threads_.emplace_back([=] { Pump(client, server); });
      threads_.emplace_back([=] { Pump(server, client); });
    }
  }

  const int target_;
  int listener_ = -1, port_ = 0;
  absl::Mutex mutex_;
  std::vector<int> sockets_;
  std::deque<std::thread> threads_;
};

// A stream that is read only as far as it is told to.
struct OpenStream {
  OpenStream(Client& client, const v1::GenerateRequest& request) {
    client.Prepare(context);
    stream = client.stub().Generate(&context, request);
  }
  bool Read() { return stream->Read(&event); }
  grpc::Status ReadToEnd() {
    while (Read()) {
    }
    return stream->Finish();
  }
  grpc::ClientContext context;
  v1::GenerateResponse event;
  std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> stream;
};

class InferenceClientsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_STORIES();
    // The same model with room for a generation that does not end while a test looks at it.
    long_model_ = directory_ / "long";
    std::filesystem::create_directories(long_model_);
    for (const char* file : {"model.safetensors", "tokenizer.model"}) {
      std::filesystem::create_symlink(*StoriesDirectory() + "/" + file,
                                      std::filesystem::path(long_model_) / file);
    }
    std::ofstream(long_model_ + "/config.json") << absl::StrReplaceAll(
        ReadFile(*StoriesDirectory() + "/config.json"),
        {{"\"max_position_embeddings\": 512", "\"max_position_embeddings\": 200000"}});
  }
  void Start(std::vector<std::string> flags) {
    flags.insert(flags.begin(), {"--model", long_model_});
    server_ = std::make_unique<InferenceProcess>(flags);
  }
  static v1::GenerateRequest Endless() { return RequestOf({1}, 150'000); }
  static int PortOf(const InferenceProcess& server) {
    return std::stoi(server.target().substr(server.target().rfind(':') + 1));
  }
  void ExpectServes(Client& client) {
    const Generated got = client.Generate(RequestOf({1}, 5));
    EXPECT_TRUE(got.status.ok()) << got.status.error_message();
    EXPECT_EQ(got.ids.size(), 5u);
  }

  TestDirectory directory_;
  std::string long_model_;
  std::unique_ptr<InferenceProcess> server_;
};

TEST_F(InferenceClientsTest, AClientThatVanishesGivesItsSlotBack) {
  Start({"--max_running", "1"});
  // Cut off, cancelled, past its deadline; and a unary call.
  const auto expect_freed = [&](const char* how, const std::function<void()>& vanish) {
    server_->WaitForMetric(kRunning, 1);
    const absl::Time begin = absl::Now();
    vanish();
    server_->WaitForMetric(kRunning, 0);
    std::printf("[ MEASURED ] %s: slot free after %.1f ms, the look at /metrics included\n", how,
                absl::ToDoubleMilliseconds(absl::Now() - begin));
    ExpectServes(server_->client());
  };
  {
    Relay relay(PortOf(*server_));
    Client client(relay.target());
    OpenStream stream(client, Endless());
    ASSERT_TRUE(stream.Read());
    expect_freed("connection cut", [&] { relay.Cut(); });
    EXPECT_FALSE(stream.ReadToEnd().ok());
  }
  {
    OpenStream stream(server_->client(), Endless());
    ASSERT_TRUE(stream.Read());
    expect_freed("cancelled", [&] { stream.context.TryCancel(); });
    EXPECT_EQ(stream.ReadToEnd().error_code(), grpc::StatusCode::CANCELLED);
  }
  {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
    v1::GenerateUnaryResponse response;
    EXPECT_EQ(server_->client().stub().GenerateUnary(&context, Endless(), &response).error_code(),
              grpc::StatusCode::DEADLINE_EXCEEDED);
    server_->WaitForMetric(kRunning, 0);
  }
  // Abort by another call: the stream ends well.
  v1::GenerateRequest named = Endless();
  named.set_request_id("mine");
  OpenStream stream(server_->client(), named);
  ASSERT_TRUE(stream.Read());
  EXPECT_EQ(stream.event.prompt().request_id(), "mine");
  EXPECT_EQ(server_->client().Generate(named).status.error_code(),
            grpc::StatusCode::ALREADY_EXISTS);
  v1::AbortRequest abort;
  abort.set_request_id("mine");
  v1::AbortResponse aborted;
  EXPECT_TRUE(server_->client().Call(&Stub::Abort, abort, &aborted).ok());
  EXPECT_TRUE(stream.ReadToEnd().ok());
  EXPECT_EQ(stream.event.finish().reason(), v1::FINISH_REASON_ABORTED);
}

TEST_F(InferenceClientsTest, AReaderThatNeverReadsIsEndedAndHoldsNobodyUp) {
  Start({"--stream_buffer_bytes", "64KiB"});
  v1::GenerateRequest request = Endless();
  request.set_logprobs(20);  // some 400 bytes a token
  OpenStream silent(server_->client(), request);
  server_->WaitForMetric(kRunning, 1);
  // Others are served meanwhile; the transport's window and the buffer fill, then it is ended.
  Client other(server_->target());
  ExpectServes(other);
  server_->WaitForMetric("memory3_request_success_total{finished_reason=\"CANCELLED\"}", 1);
  server_->WaitForMetric(kRunning, 0);
  ExpectServes(other);
  const grpc::Status status = silent.ReadToEnd();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("does not read"));
}

TEST_F(InferenceClientsTest, AFullQueueRefusesWithAHint) {
  Start({"--max_running", "1", "--max_waiting", "2"});
  std::vector<std::unique_ptr<OpenStream>> streams;
  for (int i = 0; i < 3; ++i) {
    streams.push_back(std::make_unique<OpenStream>(server_->client(), Endless()));
    if (i == 0) server_->WaitForMetric(kRunning, 1);
  }
  server_->WaitForMetric(kWaiting, 2);
  const Generated refused = server_->client().Generate(Endless());
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("queue is full"));
  ASSERT_TRUE(refused.retry_after_ms);
  EXPECT_GE(*refused.retry_after_ms, 100);
  EXPECT_LE(*refused.retry_after_ms, 60'000);
  // One that waits gives its place back too.
  streams[2]->context.TryCancel();
  server_->WaitForMetric(kWaiting, 1);
  for (auto& stream : streams) stream->context.TryCancel();
  server_->WaitForMetric(kWaiting, 0);
  server_->WaitForMetric(kRunning, 0);
  ExpectServes(server_->client());
}

// One of many streams of a client that reads as fast as it can.
class ManyStreams {
 public:
  void Open(Client& client, const v1::GenerateRequest& request) {
    Reader& reader = readers_.emplace_back(this);
    client.stub().async()->Generate(&reader.context, &request, &reader);
    reader.StartRead(&reader.event);
    reader.StartCall();
  }
  void Wait() {
    absl::MutexLock lock(&mutex_);
    const auto done = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return done_ == static_cast<int>(readers_.size());
    };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&done), absl::Seconds(100)));
  }
  int count(grpc::StatusCode code) {
    absl::MutexLock lock(&mutex_);
    return codes_[code];
  }

 private:
  struct Reader final : grpc::ClientReadReactor<v1::GenerateResponse> {
    explicit Reader(ManyStreams* owner) : all(owner) {}
    void OnReadDone(bool ok) override {
      if (ok) StartRead(&event);
    }
    void OnDone(const grpc::Status& status) override {
      absl::MutexLock lock(&all->mutex_);
      ++all->codes_[status.error_code()];
      ++all->done_;
    }
    ManyStreams* all;
    grpc::ClientContext context;
    v1::GenerateResponse event;
  };
  std::deque<Reader> readers_;
  absl::Mutex mutex_;
  std::map<grpc::StatusCode, int> codes_;
  int done_ = 0;
};

TEST_F(InferenceClientsTest, TenThousandStreamsAtOnceAreBounded) {
  Start({"--max_running", "32", "--max_waiting", "6000", "--max_concurrent_streams", "2000"});
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 10; ++i) clients.push_back(std::make_unique<Client>(server_->target()));
  // The batch is held so that all of them are there at once.
  std::vector<std::unique_ptr<OpenStream>> holders;
  for (int i = 0; i < 32; ++i)
    holders.push_back(std::make_unique<OpenStream>(server_->client(), Endless()));
  server_->WaitForMetric(kRunning, 32);
  ManyStreams streams;
  const v1::GenerateRequest request = RequestOf({1, 403, 407}, 2);
  for (int i = 0; i < 10'000; ++i) streams.Open(*clients[i % clients.size()], request);
  server_->WaitForMetric(kWaiting, 6000);
  server_->WaitForMetric("memory3_requests_refused_total{code=\"RESOURCE_EXHAUSTED\"}", 4000);
  const std::string status = ReadFile(absl::StrCat("/proc/", server_->process().pid(), "/status"));
  const int rss_kib = std::stoi(status.substr(status.find("VmRSS:") + 6));
  std::printf("[ MEASURED ] 10,000 streams open: resident %d MiB\n", rss_kib / 1024);
  EXPECT_LT(rss_kib / 1024, 1024);
  for (auto& holder : holders) holder->context.TryCancel();
  streams.Wait();
  EXPECT_EQ(streams.count(grpc::StatusCode::OK), 6000);
  EXPECT_EQ(streams.count(grpc::StatusCode::RESOURCE_EXHAUSTED), 4000);
  ExpectServes(server_->client());
}

TEST_F(InferenceClientsTest, DrainLetsRunningRequestsEndAndRefusesNewOnes) {
  Start({"--drain_seconds", "3"});
  OpenStream finite(server_->client(), RequestOf({1}, 300));
  OpenStream endless(server_->client(), Endless());
  ASSERT_TRUE(finite.Read());
  ASSERT_TRUE(endless.Read());
  server_->process().Signal(SIGTERM);
  ASSERT_TRUE(server_->process().WaitForLine("draining"));
  Client late(server_->target());
  EXPECT_EQ(late.Generate(RequestOf({1}, 5)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(late.Health("memory3.v1.InferenceService"), 2);
  EXPECT_TRUE(finite.ReadToEnd().ok());
  EXPECT_EQ(finite.event.finish().reason(), v1::FINISH_REASON_LENGTH);
  const grpc::Status cut = endless.ReadToEnd();
  EXPECT_EQ(cut.error_code(), grpc::StatusCode::UNAVAILABLE) << cut.error_message();
  EXPECT_THAT(cut.error_message(), HasSubstr("shutting down"));
  EXPECT_EQ(server_->process().Wait(), 0) << server_->process().output();
}

TEST_F(InferenceClientsTest, ListensAtOnceAndIsReadyWhenTheModelIsLoaded) {
  // An embedder whose table is still being written.
  const std::string table = directory_ / "idf.bin";
  ASSERT_EQ(mkfifo(table.c_str(), 0600), 0);
  server_ = std::make_unique<InferenceProcess>(
      std::vector<std::string>{"--model", long_model_, "--memory", "localhost:1", "--embedder",
                               "lexical:" + (directory_ / "")},
      /*until_ready=*/false);
  Client& client = server_->client();
  EXPECT_EQ(client.Health(""), 2);
  EXPECT_EQ(client.Health("memory3.v1.InferenceService"), 2);
  EXPECT_EQ(server_->Metric("memory3_ready"), 0);
  const Generated early = client.Generate(RequestOf({1}, 5));
  EXPECT_EQ(early.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(early.status.error_message(), HasSubstr("being loaded"));
  std::ofstream(table) << ReadFile("models/lexical/idf.bin");
  server_->WaitUntilReady();
  EXPECT_EQ(client.Health(""), 1);
  EXPECT_EQ(client.Health("memory3.v1.InferenceService"), 1);
  ExpectServes(client);
}

TEST_F(InferenceClientsTest, KeysTenantsAndTls) {
  const auto run = [&](const std::string& command) {
    ASSERT_EQ(std::system(
                  absl::StrCat("cd ", directory_ / "", " && (", command, ") 2>/dev/null").c_str()),
              0)
        << command;
  };
  run("openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=test-ca "
      "-days 2");
  for (const char* name : {"server", "client"}) {
    run(absl::StrCat("openssl req -newkey rsa:2048 -nodes -keyout ", name, ".key -out ", name,
                     ".csr -subj /CN=localhost && "
                     "echo subjectAltName=DNS:localhost,IP:127.0.0.1 > san && "
                     "openssl x509 -req -in ",
                     name, ".csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san ",
                     "-out ", name, ".pem"));
  }
  const auto write_keys = [&](const std::string& file, const std::vector<std::string>& entries) {
    std::string keys;
    for (const std::string& entry : entries) absl::StrAppend(&keys, keys.empty() ? "" : ",", entry);
    std::ofstream(directory_ / file) << "{\"keys\": [" << keys << "]}";
  };
  const auto key = [](const std::string& name, const std::string& tenant,
                      const std::string& rights) {
    return absl::StrCat("{\"name\": \"", name, "\", \"sha256\": \"",
                        Sha256Of(name + "-key").ToHex(), "\", \"tenant\": \"", tenant,
                        "\", \"knowledge_bases\": {", rights, "}}");
  };
  write_keys("memory_keys.json", {key("loader", "acme", "\"*\": \"admin\""),
                                  key("inference", "acme", "\"*\": \"read\"")});
  write_keys("keys.json", {key("reader", "acme", "\"stories\": \"read\""),
                           key("stranger", "globex", "\"*\": \"read\""),
                           key("nobody", "acme", "\"other\": \"read\"")});
  const std::vector<std::string> tls = {"--tls_certificate", directory_ / "server.pem",
                                        "--tls_key",         directory_ / "server.key",
                                        "--tls_client_ca",   directory_ / "ca.pem"};
  std::vector<std::string> flags = tls;
  flags.insert(flags.end(), {"--api_keys", directory_ / "memory_keys.json"});
  MemoryProcess memory(directory_ / "store", "0", flags);
  MemoryClientOptions loader = {.target = memory.target(), .api_key = "loader-key"};
  loader.tls = {directory_ / "ca.pem", directory_ / "client.pem", directory_ / "client.key"};
  auto memory_client = MemoryClient::Create(loader);
  ASSERT_TRUE(memory_client.ok()) << memory_client.status();
  OfflineModel offline(*StoriesDirectory());
  offline.FillKnowledgeBase(**memory_client, offline.Spec("stories"));

  flags = {"--model",
           *StoriesDirectory(),
           "--memory",
           memory.target(),
           "--memory_api_key",
           "inference-key",
           "--memory_tenant",
           "acme",
           "--memory_tls_ca",
           directory_ / "ca.pem",
           "--memory_tls_certificate",
           directory_ / "client.pem",
           "--memory_tls_key",
           directory_ / "client.key",
           "--api_keys",
           directory_ / "keys.json"};
  flags.insert(flags.end(), tls.begin(), tls.end());
  server_ = std::make_unique<InferenceProcess>(flags);
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = ReadFile(directory_ / "ca.pem");
  ssl.pem_cert_chain = ReadFile(directory_ / "client.pem");
  ssl.pem_private_key = ReadFile(directory_ / "client.key");
  const auto credentials = grpc::SslCredentials(ssl);
  const auto code_of = [&](const std::string& api_key, const std::string& knowledge_base) {
    Client client(server_->target(), credentials, api_key);
    const Generated got = client.Generate(RequestOf({1, 403}, 5, knowledge_base));
    if (got.status.ok() && !knowledge_base.empty()) {
      EXPECT_EQ(got.provenance.at(0).memories_size(), 5);
    }
    return got.status.error_code();
  };
  EXPECT_EQ(code_of("reader-key", "stories"), grpc::StatusCode::OK);
  EXPECT_EQ(code_of("reader-key", ""), grpc::StatusCode::OK);
  EXPECT_EQ(code_of("wrong", "stories"), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(code_of("", "stories"), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(code_of("nobody-key", "stories"), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(code_of("stranger-key", "stories"), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(code_of("stranger-key", ""), grpc::StatusCode::OK);
  // A client without a certificate, and one without TLS, are not talked to.
  grpc::SslCredentialsOptions anonymous;
  anonymous.pem_root_certs = ssl.pem_root_certs;
  for (const auto& c : {grpc::SslCredentials(anonymous), grpc::InsecureChannelCredentials()}) {
    Client client(server_->target(), c, "reader-key");
    EXPECT_EQ(client.Generate(RequestOf({1}, 5)).status.error_code(),
              grpc::StatusCode::UNAVAILABLE);
  }
  // Requests of one tenant are not another's to abort; keys are read again on SIGHUP.
  v1::GetModelResponse model;
  Client reader(server_->target(), credentials, "reader-key");
  ASSERT_TRUE(reader.Call(&Stub::GetModel, v1::GetModelRequest(), &model).ok());
  EXPECT_THAT(model.knowledge_bases(), ::testing::ElementsAre("stories"));
  write_keys("keys.json", {key("late", "acme", "\"*\": \"read\"")});
  server_->process().Signal(SIGHUP);
  ASSERT_TRUE(server_->process().WaitForLine("read again"));
  EXPECT_EQ(code_of("late-key", "stories"), grpc::StatusCode::OK);
  EXPECT_EQ(code_of("reader-key", "stories"), grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(InferenceClientsTest, WhatIsWrongWithTheFlagsIsSaidInOneLine) {
  Start({});
  const std::string taken = "127.0.0.1:" + std::to_string(PortOf(*server_));
  std::filesystem::create_directories(directory_ / "empty");
  std::ofstream(directory_ / "broken.json") << "{\"keys\": 5}";
  struct Case {
    std::vector<std::string> flags;
    std::vector<std::string> says;
  };
  const std::vector<Case> cases = {
      {{"--model", directory_ / "nowhere"}, {"--model", "nowhere", "config.json"}},
      {{"--model", directory_ / "empty"}, {"--model", "empty", "config.json"}},
      {{"--model", long_model_, "--listen", taken}, {"--listen", taken}},
      {{"--model", long_model_, "--memory", "nonsense"}, {"--memory", "nonsense"}},
      {{"--model", long_model_, "--memory", "embedded:/proc/nowhere"},
       {"--memory", "/proc/nowhere"}},
      {{"--model", long_model_, "--memory", "localhost:1", "--embedder", "oracle"},
       {"--embedder", "oracle"}},
      {{"--model", long_model_, "--memory", "localhost:1", "--device_cache_bytes", "1KiB"},
       {"--device_cache_bytes", "1024"}},
      {{"--model", long_model_, "--kv_cache_bytes", "1KiB"}, {"--kv_cache_bytes", "1024"}},
      {{"--model", long_model_, "--chat_template", "jinja"}, {"--chat_template", "jinja"}},
      {{"--model", long_model_, "--weights", "f64"}, {"--weights", "f64"}},
      {{"--model", long_model_, "--api_keys", directory_ / "broken.json"}, {"broken.json"}},
      {{"--model", long_model_, "--tls_key", "x"}, {"--tls_certificate", "--tls_key"}},
      {{}, {"--model"}},
  };
  for (const Case& c : cases) {
    std::vector<std::string> flags = c.flags;
    if (std::find(flags.begin(), flags.end(), "--listen") == flags.end())
      flags.insert(flags.end(), {"--listen", "127.0.0.1:0"});
    ChildProcess process("inference_server", flags);
    EXPECT_GT(process.Wait(), 0);
    const std::string output = process.output();
    for (const std::string& word : c.says) EXPECT_THAT(output, HasSubstr(word));
  }
  // The same flags from a file.
  std::ofstream(directory_ / "flags.conf") << "model = \"" << long_model_ << "\"\n"
                                           << "max_running = 3\n";
  InferenceProcess configured({"--config", directory_ / "flags.conf"});
  ExpectServes(configured.client());
}

}  // namespace
}  // namespace memory3
