// memory_server_retrieve: top-5 with bytes from the real memory_server in another process, beside
// three others that deliver the same records:
//   in process   the store's own search, its MultiGet, and a copy of each record
//   bare gRPC    a process that makes the same search and streams the same number of bytes from
//                memory: no database read, no checksums, no protobuf on either side
//   Redis        a client that makes the same search itself, then MGET from a redis-server
// "The same search" is MemoryStore::Retrieve without the bytes, over a copy (hard links) of the
// server's database, so that what differs is only how the bytes travel.
//   memory_server_retrieve [--scale 1] [--seconds 2] [--rounds 3] [--directory DIR] [--out DIR]
// --scale 1 is the size the targets are stated for: 100 k records of 38.5 KiB (and 4 k of 440 KiB);
// 6 GB of disk, and 4 GB of memory for Redis. --only PART measures those settings whose name has
// it. All ratios are medians of those within one round. cpu_ms is processor time of an answer, in
// the server and in this process, which is the client: unlike rates it says something on a busy
// machine.
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/impl/codegen/rpc_method.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/support/sync_stream.h>
#include <hiredis/hiredis.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bench/report.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory_server/client.h"
#include "memory_server/executor.h"
#include "memory_server/message.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"
#include "tests/child_process.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr uint32_t kDimension = 384;
constexpr uint32_t kTopK = 5;
constexpr int kManyClients = 16;
constexpr size_t kPayloads = 64;    // distinct contents; every record has an id of its own
constexpr uint64_t kDocument = 16;  // references of one document, about one thing
constexpr const char* kTenant = "default";
constexpr const char* kBareMethod = "/memory3.bench.Bare/Retrieve";

struct Shape {
  const char* kb;
  uint64_t count;  // at full scale
  int layers, head_dim;
  uint64_t first;  // number of its first record: ids are of the tenant, not of the knowledge base
};
// A record has 128 bytes of header and 8 bytes a layer and number.
constexpr Shape kSmall = {"small", 100'000, 22, 224, 0};
constexpr Shape kLarge = {"large", 4'000, 22, 2560, 1'000'000};

double Seconds(Clock::time_point since) {
  return std::chrono::duration<double>(Clock::now() - since).count();
}

[[noreturn]] void Die(const std::string& why) {
  std::cerr << "memory_server_retrieve: " << why << "\n";
  std::exit(1);
}
void Must(const absl::Status& status) {
  if (!status.ok()) Die(status.ToString());
}
template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}

// ---- what is stored, and asked for ----

void Normalise(std::vector<float>& v) {
  double squares = 0;
  for (float x : v) squares += x * x;
  for (float& x : v) x = static_cast<float>(x / std::sqrt(squares));
}
// A direction near `base`: cosine about 1 / sqrt(1 + spread²).
std::vector<float> Near(const std::vector<float>& base, double spread, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(
      0, static_cast<float>(spread / std::sqrt(static_cast<double>(kDimension))));
  std::vector<float> v = base;
  for (float& x : v) x += normal(random);
  Normalise(v);
  return v;
}
// The embedding of record n: those of one document are alike (cosine about 0.6), as texts' are.
std::vector<float> Embedding(uint64_t n) {
  std::vector<float> topic = Near(std::vector<float>(kDimension), 1, ~(n / kDocument));
  return Near(topic, 0.8, n);
}
std::vector<float> QueryVector(uint64_t n) { return Near(Embedding(n), 0.6, n ^ 0x5eed'0000'0000); }

std::vector<std::string> Payloads(const Shape& shape) {
  const std::unique_ptr<Codec> codec = MakeF32Codec(shape.head_dim);
  std::mt19937 random(7);
  std::vector<std::string> payloads;
  for (size_t p = 0; p < kPayloads; ++p) {
    ExplicitMemory memory;
    memory.shape = {shape.layers, 1, 1, shape.head_dim};
    memory.reference_tokens = 128;
    for (int64_t i = 0; i < memory.shape.values(); ++i)
      memory.values.push_back(static_cast<float>(random() % 65536) / 32768 - 1);
    payloads.push_back(Must(EncodeRecord(memory, store_testing::FingerprintOf("writer"), *codec)));
  }
  return payloads;
}

void Load(MemoryStore& store, const Shape& shape, uint64_t count) {
  KnowledgeBaseSpec spec = store_testing::SmallSpec(shape.kb, kDimension);
  spec.geometry = {{}, 1, static_cast<uint32_t>(shape.head_dim), 1, 128};
  for (int l = 0; l < shape.layers; ++l) spec.geometry.memory_layers.push_back(l);
  Must(store.CreateKnowledgeBase(kTenant, spec, false).status());
  const std::string load =
      Must(store.BeginLoad(kTenant, shape.kb, "bench", LoadMode::kAppend, count)).load.load_id;
  const std::vector<std::string> payloads = Payloads(shape);
  const size_t batch = std::max<size_t>(1, (size_t{1} << 20) / payloads[0].size());
  for (uint64_t n = 0; n < count;) {
    std::vector<NewEntry> entries;
    std::vector<std::vector<float>> vectors;
    for (size_t i = 0; i < batch && n < count; ++i, ++n) {
      vectors.push_back(Embedding(n));
      NewEntry entry;
      entry.source.document_id = Message("document-", n / kDocument);
      entry.source.ordinal = n % kDocument;
      entry.source.title = Message("Title of ", n / kDocument);
      entry.source.uri = Message("https://example.org/", n / kDocument);
      entry.source.char_end = 500;
      entry.record_id = store_testing::MakeId(shape.first + n);
      entry.record = payloads[n % kPayloads];
      entry.embedding = vectors.back();
      entries.push_back(std::move(entry));
    }
    Must(store.PutLoad(kTenant, load, entries, false).status());
  }
  const LoadInfo done = Must(store.CommitLoad(kTenant, load, true));
  if (done.state != LoadState::kCommitted) Die(done.failure);
}

// The same database again: tables and blobs never change, so links will do for them.
void CopyDatabase(const fs::path& from, const fs::path& to) {
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(from)) {
    const fs::path target = to / fs::relative(entry.path(), from);
    if (entry.is_directory()) {
      fs::create_directories(target);
      continue;
    }
    fs::create_directories(target.parent_path());
    const std::string suffix = entry.path().extension();
    if (suffix == ".sst" || suffix == ".blob") {
      fs::create_hard_link(entry.path(), target);
    } else {
      fs::copy_file(entry.path(), target);
    }
  }
}

std::unique_ptr<MemoryStore> Open(const std::string& directory) {
  RocksDbStoreOptions options;
  options.directory = directory;
  return Must(OpenRocksDbStore(options));
}

RetrieveResult Search(MemoryStore& store, const VersionPin& pin, std::span<const float> vector) {
  const Query query{vector, kTopK, std::nullopt, {}};
  RetrieveResult result = Must(store.Retrieve(pin, {&query, 1}, {}));
  if (result.queries[0].size() != kTopK) Die("a search found less than it should");
  return result;
}

// ---- the bare gRPC stream: raw messages over grpc's callback API ----
// Request: a byte that names the shape, then the query vector. Answer: the bytes of five records.

class BareService : public grpc::CallbackGenericService {
 public:
  explicit BareService(const std::string& directory)
      : store_(Open(directory)), executor_(static_cast<int>(std::thread::hardware_concurrency())) {
    for (const Shape* shape : {&kSmall, &kLarge}) {
      pins_.push_back(Must(store_->Pin(kTenant, shape->kb, std::nullopt)));
      payloads_.push_back(Payloads(*shape));
    }
  }
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override {
    return new Stream(this);
  }

 private:
  class Stream : public grpc::ServerGenericBidiReactor {
   public:
    explicit Stream(BareService* service) : service_(service) { StartRead(&in_); }
    void OnReadDone(bool ok) override {
      if (!ok) {
        Finish(grpc::Status::OK);
      } else {
        service_->executor_.Run([this] { Answer(); });
      }
    }
    void OnWriteDone(bool) override { StartRead(&in_); }
    void OnDone() override { delete this; }

   private:
    void Answer() {
      grpc::Slice request;
      if (!in_.DumpToSingleSlice(&request).ok()) Die("a request of the bare stream");
      const int shape = request.begin()[0];
      std::vector<float> vector(kDimension);
      std::memcpy(vector.data(), request.begin() + 1, kDimension * sizeof(float));
      const RetrieveResult result = Search(*service_->store_, *service_->pins_[shape], vector);
      std::vector<grpc::Slice> slices;
      for (const Hit& hit : result.queries[0]) {
        const std::string& payload = service_->payloads_[shape][hit.record_id.bytes[0] % kPayloads];
        slices.emplace_back(payload.data(), payload.size(), grpc::Slice::STATIC_SLICE);
      }
      out_ = grpc::ByteBuffer(slices.data(), slices.size());
      StartWrite(&out_);
    }
    BareService* service_;
    grpc::ByteBuffer in_, out_;
  };

  std::unique_ptr<MemoryStore> store_;
  std::vector<std::shared_ptr<const VersionPin>> pins_;
  std::vector<std::vector<std::string>> payloads_;
  Executor executor_;
};

int ServeBare(const std::string& directory) {
  BareService service(directory);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&service);
  builder.SetMaxReceiveMessageSize(-1);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  std::cout << "bare gRPC on port " << port << std::endl;
  server->Wait();
  return 0;
}

// ---- clients: each makes one query at a time; `Ask` answers the record bytes it got ----

class Client {
 public:
  virtual ~Client() = default;
  virtual uint64_t Ask(std::span<const float> vector) = 0;
};

class WireClient : public Client {
 public:
  WireClient(const std::string& target, const Shape& shape) : kb_(shape.kb) {
    MemoryClientOptions options;
    options.target = target;
    options.channels = 1;
    client_ = Must(MemoryClient::Create(options));
    stream_ = client_->OpenRetrieve();
  }
  // All that came with the answer before is reported evicted, so that bytes travel every time.
  uint64_t Ask(std::span<const float> vector) override {
    v1::RetrieveRequest request;
    request.set_knowledge_base(kb_);
    request.set_evicted(std::move(held_));
    held_.clear();
    auto& query = *request.add_queries();
    query.mutable_embedding()->Add(vector.begin(), vector.end());
    query.set_top_k(kTopK);
    const RetrieveAnswer answer = Must(stream_->Retrieve(std::move(request)));
    uint64_t bytes = 0;
    for (const auto& [id, record] : answer.records) {
      held_ += id.view();
      bytes += record->size();
    }
    return bytes;
  }

 private:
  const std::string kb_;
  std::unique_ptr<MemoryClient> client_;
  std::unique_ptr<RetrieveStream> stream_;
  std::string held_;
};

class BareClient : public Client {
 public:
  BareClient(const std::string& target, const Shape& shape) : shape_(&shape == &kLarge ? 1 : 0) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    channel_ = grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
    const grpc::internal::RpcMethod method(kBareMethod, grpc::internal::RpcMethod::BIDI_STREAMING);
    stream_.reset(
        grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
            channel_.get(), method, &context_));
  }
  ~BareClient() override {
    stream_->WritesDone();
    Must(FromStatus(stream_->Finish()));
  }
  uint64_t Ask(std::span<const float> vector) override {
    std::string request(1, static_cast<char>(shape_));
    request.append(reinterpret_cast<const char*>(vector.data()), vector.size_bytes());
    const grpc::Slice slice(request);
    if (!stream_->Write(grpc::ByteBuffer(&slice, 1)) || !stream_->Read(&answer_))
      Die("the bare stream ended");
    return answer_.Length();
  }

 private:
  static absl::Status FromStatus(const grpc::Status& status) {
    return status.ok() ? absl::OkStatus() : absl::InternalError(status.error_message());
  }
  const int shape_;
  std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>> stream_;
  grpc::ByteBuffer answer_;
};

class InProcessClient : public Client {
 public:
  InProcessClient(MemoryStore* store, const Shape& shape)
      : store_(store), pin_(Must(store->Pin(kTenant, shape.kb, std::nullopt))) {}
  uint64_t Ask(std::span<const float> vector) override {
    const RetrieveResult result = Search(*store_, *pin_, vector);
    std::vector<RecordId> ids;
    for (const Hit& hit : result.queries[0]) ids.push_back(hit.record_id);
    uint64_t bytes = 0;
    for (absl::StatusOr<RecordView>& record : result.records->Read(ids)) {
      const std::string copy(Must(std::move(record)).bytes);
      bytes += copy.size();
    }
    return bytes;
  }

 protected:
  MemoryStore* const store_;
  const std::shared_ptr<const VersionPin> pin_;
};

// The search alone: what all have in common.
class SearchClient : public InProcessClient {
 public:
  using InProcessClient::InProcessClient;
  uint64_t Ask(std::span<const float> vector) override {
    return Search(*store_, *pin_, vector).queries[0].size();
  }
};

class RedisClient : public Client {
 public:
  RedisClient(int port, MemoryStore* store, const Shape& shape)
      : store_(store), pin_(Must(store->Pin(kTenant, shape.kb, std::nullopt))) {
    redis_ = redisConnect("127.0.0.1", port);
    if (redis_ == nullptr || redis_->err != 0) Die("cannot connect to redis-server");
  }
  ~RedisClient() override { redisFree(redis_); }
  uint64_t Ask(std::span<const float> vector) override {
    const RetrieveResult result = Search(*store_, *pin_, vector);
    const char* words[1 + kTopK] = {"MGET"};
    size_t sizes[1 + kTopK] = {4};
    for (uint32_t i = 0; i < kTopK; ++i) {
      words[1 + i] = reinterpret_cast<const char*>(result.queries[0][i].record_id.bytes.data());
      sizes[1 + i] = 32;
    }
    auto* reply = static_cast<redisReply*>(redisCommandArgv(redis_, 1 + kTopK, words, sizes));
    if (reply == nullptr || reply->type != REDIS_REPLY_ARRAY) Die("MGET failed");
    uint64_t bytes = 0;
    for (size_t i = 0; i < reply->elements; ++i) bytes += reply->element[i]->len;
    freeReplyObject(reply);
    return bytes;
  }
  static void Fill(int port, const Shape& shape, uint64_t count) {
    redisContext* redis = redisConnect("127.0.0.1", port);
    if (redis == nullptr || redis->err != 0) Die("cannot connect to redis-server");
    const std::vector<std::string> payloads = Payloads(shape);
    for (uint64_t first = 0; first < count; first += 64) {
      const uint64_t last = std::min(count, first + 64);
      for (uint64_t n = first; n < last; ++n) {
        const RecordId id = store_testing::MakeId(n);
        const std::string& payload = payloads[n % kPayloads];
        redisAppendCommand(redis, "SET %b %b", id.bytes.data(), id.bytes.size(), payload.data(),
                           payload.size());
      }
      for (uint64_t n = first; n < last; ++n) {
        redisReply* reply = nullptr;
        if (redisGetReply(redis, reinterpret_cast<void**>(&reply)) != REDIS_OK ||
            reply->type == REDIS_REPLY_ERROR)
          Die("SET failed");
        freeReplyObject(reply);
      }
    }
    redisFree(redis);
  }

 private:
  MemoryStore* const store_;
  const std::shared_ptr<const VersionPin> pin_;
  redisContext* redis_;
};

// ---- measuring ----

class Queries {
 public:
  explicit Queries(uint64_t records) {
    std::mt19937_64 random(11);
    for (int i = 0; i < 4096; ++i) vectors_.push_back(QueryVector(random() % records));
  }
  const std::vector<float>& operator[](size_t i) const { return vectors_[i % vectors_.size()]; }

 private:
  std::vector<std::vector<float>> vectors_;
};

struct Setting {
  std::string name;
  std::vector<std::unique_ptr<Client>> clients;
  const Queries* queries = nullptr;
  uint64_t bytes_per_answer = 0;
  std::vector<double> qps;                // a round each
  std::vector<double> latencies;          // of all rounds, ms
  pid_t server = 0;                       // 0: none
  double client_cpu = 0, server_cpu = 0;  // processor time of all rounds, seconds
};

// Processor time that a process has taken.
double CpuSeconds(pid_t process) {
  std::ifstream stat(Message("/proc/", process, "/stat"));
  std::string line;
  std::getline(stat, line);
  std::istringstream fields(line.substr(std::min(line.size(), line.rfind(')') + 2)));
  std::string field;
  double ticks = 0;
  for (int i = 3; i <= 15 && fields >> field; ++i) {  // numbered as in proc(5)
    if (i >= 14) ticks += std::atof(field.c_str());
  }
  return ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

void RunRound(Setting& setting, double seconds) {
  std::vector<std::vector<double>> latencies(setting.clients.size());
  std::vector<std::thread> threads;
  threads.reserve(setting.clients.size());
  const double client_cpu = CpuSeconds(getpid());
  const double server_cpu = setting.server != 0 ? CpuSeconds(setting.server) : 0;
  const Clock::time_point start = Clock::now();
  for (size_t c = 0; c < setting.clients.size(); ++c) {
    threads.emplace_back([&, c] {
      for (size_t i = 97 * c + 1009 * setting.qps.size(); Seconds(start) < seconds; ++i) {
        const Clock::time_point begun = Clock::now();
        if (setting.clients[c]->Ask((*setting.queries)[i]) != setting.bytes_per_answer)
          Die(setting.name + ": an answer has another size than it should");
        latencies[c].push_back(1000 * Seconds(begun));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double took = Seconds(start);
  setting.client_cpu += CpuSeconds(getpid()) - client_cpu;
  if (setting.server != 0) setting.server_cpu += CpuSeconds(setting.server) - server_cpu;
  size_t answers = 0;
  for (const std::vector<double>& l : latencies) {
    answers += l.size();
    setting.latencies.insert(setting.latencies.end(), l.begin(), l.end());
  }
  setting.qps.push_back(static_cast<double>(answers) / took);
}

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}
double Ratio(const Setting& ours, const Setting& other) {
  std::vector<double> ratios;
  ratios.reserve(ours.qps.size());
  for (size_t i = 0; i < ours.qps.size(); ++i) ratios.push_back(ours.qps[i] / other.qps[i]);
  return Quantile(ratios, 0.5);
}

// Bytes of request and answer (as messages) beyond the query vector, for five hits all held by a
// client that holds every record of the knowledge base.
uint64_t HeldBytes(const std::string& target, uint64_t count, const Queries& queries) {
  MemoryClientOptions options;
  options.target = target;
  const std::unique_ptr<MemoryClient> client = Must(MemoryClient::Create(options));
  const std::unique_ptr<RetrieveStream> stream = client->OpenRetrieve();
  uint64_t most = 0;
  for (size_t i = 0; i < 100; ++i) {
    v1::RetrieveRequest request;
    request.set_knowledge_base(kSmall.kb);
    request.add_queries()->mutable_embedding()->Add(queries[i].begin(), queries[i].end());
    request.mutable_queries(0)->set_top_k(kTopK);
    if (i == 0) {
      for (uint64_t n = 0; n < count; ++n)
        request.mutable_held()->append(store_testing::MakeId(n).view());
    }
    const uint64_t sent = request.ByteSizeLong() - kDimension * sizeof(float);
    const RetrieveAnswer answer = Must(stream->Retrieve(std::move(request)));
    if (!answer.records.empty()) Die("a held record came again");
    if (i > 0) most = std::max<uint64_t>(most, sent + answer.hits.ByteSizeLong());
  }
  return most;
}

std::string PortOf(ChildProcess& process, const std::string& line) {
  const std::optional<std::string> port = process.WaitForLine(line, std::chrono::seconds(120));
  if (!port) Die("a server did not start: " + process.output());
  return *port;
}

int Main(int argc, char** argv) {
  double scale = 1, seconds = 2;
  int rounds = 3;
  std::string directory, only, out = "build/bench";
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (i + 1 == argc) Die("flag without a value: " + flag);
    const char* value = argv[++i];
    if (flag == "--serve_bare") return ServeBare(value);
    if (flag == "--scale") {
      scale = std::atof(value);
    } else if (flag == "--seconds") {
      seconds = std::atof(value);
    } else if (flag == "--rounds") {
      rounds = std::max(1, std::atoi(value));
    } else if (flag == "--only") {
      only = value;
    } else if (flag == "--directory") {
      directory = value;
    } else if (flag == "--out") {
      out = value;
    } else {
      Die("unknown flag " + flag);
    }
  }
  std::optional<store_testing::TemporaryDirectory> temporary;
  if (directory.empty()) directory = temporary.emplace().path();
  const auto scaled = [&](const Shape& shape) {
    return std::max<uint64_t>(200, static_cast<uint64_t>(scale * static_cast<double>(shape.count)));
  };

  Clock::time_point start = Clock::now();
  std::string index;
  {
    const std::unique_ptr<MemoryStore> store = Open(directory + "/served");
    for (const Shape* shape : {&kSmall, &kLarge}) Load(*store, *shape, scaled(*shape));
    index = Must(store->GetKnowledgeBase(kTenant, kSmall.kb, false)).index;
  }
  CopyDatabase(directory + "/served", directory + "/in_process");
  CopyDatabase(directory + "/served", directory + "/bare");
  const double load_seconds = Seconds(start);

  ChildProcess server("memory_server",
                      {"--data", directory + "/served", "--listen", "127.0.0.1:0"});
  ChildProcess bare(fs::read_symlink("/proc/self/exe"), {"--serve_bare", directory + "/bare"});
  const std::string target = "127.0.0.1:" + PortOf(server, R"(gRPC on port (\d+))");
  const std::string bare_target = "127.0.0.1:" + PortOf(bare, R"(bare gRPC on port (\d+))");
  const std::unique_ptr<MemoryStore> store = Open(directory + "/in_process");

  std::optional<ChildProcess> redis;
  const int redis_port = 20'000 + getpid() % 20'000;
  for (const char* binary : {"/usr/bin/redis-server", "/usr/local/bin/redis-server"}) {
    if (!fs::exists(binary)) continue;
    redis.emplace(binary, std::vector<std::string>{"--port", std::to_string(redis_port), "--bind",
                                                   "127.0.0.1", "--save", "", "--appendonly", "no",
                                                   "--dir", directory});
    if (!redis->WaitForLine("Ready to accept connections")) Die(redis->output());
    RedisClient::Fill(redis_port, kSmall, scaled(kSmall));
    break;
  }

  const Queries small_queries(scaled(kSmall)), large_queries(scaled(kLarge));
  std::map<std::string, Setting> settings;
  std::vector<std::string> order;
  const auto add = [&](const std::string& name, const Shape& shape, int clients,
                       const std::function<std::unique_ptr<Client>()>& make) {
    if (name.find(only) == std::string::npos) return;
    Setting& setting = settings[name];
    setting.name = name;
    setting.queries = &shape == &kLarge ? &large_queries : &small_queries;
    setting.bytes_per_answer = kTopK * Payloads(shape)[0].size();
    if (name.rfind("ours", 0) == 0) setting.server = server.pid();
    if (name.rfind("grpc", 0) == 0) setting.server = bare.pid();
    for (int i = 0; i < clients; ++i) setting.clients.push_back(make());
    order.push_back(name);
  };
  const auto ours = [&](const Shape& shape) {
    return [&] { return std::make_unique<WireClient>(target, shape); };
  };
  const auto grpc_bare = [&](const Shape& shape) {
    return [&] { return std::make_unique<BareClient>(bare_target, shape); };
  };
  add("ours_1", kSmall, 1, ours(kSmall));
  add("in_process_1", kSmall, 1,
      [&] { return std::make_unique<InProcessClient>(store.get(), kSmall); });
  add("grpc_1", kSmall, 1, grpc_bare(kSmall));
  add("search_1", kSmall, 1, [&] { return std::make_unique<SearchClient>(store.get(), kSmall); });
  if (settings.contains("search_1")) settings["search_1"].bytes_per_answer = kTopK;
  add("ours_16", kSmall, kManyClients, ours(kSmall));
  add("grpc_16", kSmall, kManyClients, grpc_bare(kSmall));
  if (redis) {
    const auto make = [&] {
      return std::make_unique<RedisClient>(redis_port, store.get(), kSmall);
    };
    add("redis_16", kSmall, kManyClients, make);
    add("redis_1", kSmall, 1, make);
  }
  add("ours_440k", kLarge, 1, ours(kLarge));
  add("in_process_440k", kLarge, 1,
      [&] { return std::make_unique<InProcessClient>(store.get(), kLarge); });
  add("grpc_440k", kLarge, 1, grpc_bare(kLarge));

  for (const std::string& name : order) RunRound(settings[name], 0.25 * seconds);
  for (const std::string& name : order)
    settings[name].qps.clear(), settings[name].latencies.clear(),
        settings[name].client_cpu = settings[name].server_cpu = 0;
  for (int round = 0; round < rounds; ++round) {
    for (const std::string& name : order) RunRound(settings[name], seconds);
  }

  BenchReport report("memory_server_retrieve");
  const auto ratio = [&](const char* metric, const char* a, const char* b, const char* goal) {
    if (!settings.contains(a) || !settings.contains(b)) return;
    report.Add(metric, Ratio(settings[a], settings[b]), "", goal);
  };
  ratio("qps_vs_inprocess_1", "ours_1", "in_process_1", ">= 0.60");
  ratio("qps_vs_grpc_16", "ours_16", "grpc_16", ">= 0.80");
  ratio("qps_vs_grpc_440k", "ours_440k", "grpc_440k", ">= 0.80");
  ratio("qps_vs_redis", "ours_16", "redis_16", ">= 0.80");
  ratio("qps_vs_redis_1", "ours_1", "redis_1", "");
  ratio("qps_vs_grpc_1", "ours_1", "grpc_1", "");
  for (const std::string& name : order)
    report.Add("qps_" + name, Quantile(settings[name].qps, 0.5), "/s");
  for (const char* name : {"ours_1", "ours_16", "grpc_16", "redis_16", "ours_440k", "grpc_440k",
                           "in_process_1", "search_1"}) {
    if (!settings.contains(name)) continue;
    const std::string suffix = std::string(name).rfind("ours_", 0) == 0 ? name + 5 : name;
    report.Add("p50_ms_" + suffix, Quantile(settings[name].latencies, 0.5), "ms");
    report.Add("p99_ms_" + suffix, Quantile(settings[name].latencies, 0.99), "ms");
  }
  for (const char* name : {"ours_16", "grpc_16", "ours_440k", "grpc_440k"}) {
    if (!settings.contains(name)) continue;
    const Setting& setting = settings[name];
    const auto answers = static_cast<double>(setting.latencies.size());
    report.Add(Message("cpu_ms_client_", name), 1000 * setting.client_cpu / answers, "ms");
    report.Add(Message("cpu_ms_server_", name), 1000 * setting.server_cpu / answers, "ms");
  }
  report.Add("held_bytes", static_cast<double>(HeldBytes(target, scaled(kSmall), small_queries)),
             "bytes", "< 1024");
  report.Note(Message(scaled(kSmall), " records of ", Payloads(kSmall)[0].size(), " bytes, index ",
                      index, "; ", scaled(kLarge), " of ", Payloads(kLarge)[0].size(),
                      " bytes; loaded in ", load_seconds, " s"));
  report.Note("440k: one client each");
  if (!redis) report.Note("qps_vs_redis was left out: there is no redis-server here");
  settings.clear();
  return report.Write(out);
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) { return memory3::Main(argc, argv); }
