// Minutes of mixed load on the memory_server binary over gRPC: puts, deletes, loads of both modes,
// rollbacks, retrievals, snapshots, their restoring and bad requests, all at once, on data whose
// size stays the same.
//   memory_server_soak [--seconds 600] [--json FILE]
// Fails on any error but those provoked, on a wrong answer, and where the server's memory grows.
// The rule: of its resident size, one sample a second, the median of the last quarter is at most 10
// % plus 24 MiB above the median of the second quarter; the first is for caches to fill.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <shared_mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory_server/client.h"
#include "tests/child_process.h"

namespace memory3 {
namespace {

using Stub = MemoryClient::Stub;

constexpr int kDimension = 64;
constexpr uint64_t kNumbers = 400;  // distinct references
constexpr uint64_t kDocuments = 60;

Hash256 Fingerprint(uint8_t byte) {
  Hash256 hash;
  hash.bytes.fill(byte);
  return hash;
}

// 16 KiB that follow from `n`.
std::string MakeRecord(uint64_t n) {
  std::mt19937_64 random(n);
  ExplicitMemory memory;
  memory.shape = {.layers = 2, .kv_heads = 2, .tokens = 8, .head_dim = 64};
  memory.reference_tokens = 100;
  memory.values.resize(memory.shape.values());
  for (float& value : memory.values) value = static_cast<float>(random() % 1000) / 1000;
  return *EncodeRecord(memory, Fingerprint(1), *MakeF32Codec(64));
}

std::vector<float> MakeVector(uint64_t n) {
  std::mt19937_64 random(n + 1);
  std::normal_distribution<float> normal;
  std::vector<float> vector(kDimension);
  for (float& x : vector) x = normal(random);
  return vector;
}

std::string IdOf(uint64_t n) { return std::string(Sha256Of(absl::StrCat("reference ", n)).view()); }

class Soak {
 public:
  Soak(std::string target, absl::Time until) : target_(std::move(target)), until_(until) {
    for (uint64_t n = 0; n < kNumbers; ++n) records_.push_back(MakeRecord(n));
  }

  // The number of failures.
  uint64_t Run(const std::function<void()>& each_second) {
    const std::unique_ptr<MemoryClient> client = Connect();
    for (const char* kb : {"live", "loaded"}) {
      v1::CreateKnowledgeBaseRequest request;
      v1::KnowledgeBaseSpec& spec = *request.mutable_spec();
      spec.set_name(kb);
      spec.set_writer_fingerprint(std::string(Fingerprint(1).view()));
      spec.set_embedder_fingerprint(std::string(Fingerprint(2).view()));
      spec.set_codec(v1::CODEC_F32);
      spec.set_embedding_dimension(kDimension);
      v1::Geometry& geometry = *spec.mutable_geometry();
      for (uint32_t layer : {0, 1}) geometry.add_memory_layers(layer);
      geometry.set_kv_heads(2);
      geometry.set_head_dim(64);
      geometry.set_tokens_kept(8);
      geometry.set_reference_tokens(128);
      Expect("create", client->Call(&Stub::CreateKnowledgeBase, request).status());
    }
    std::vector<std::thread> threads;
    for (uint64_t seed : {1, 2}) threads.emplace_back([this, seed] { Write(seed); });
    threads.emplace_back([this] { LoadLoop(); });
    for (uint64_t seed : {3, 4, 5}) threads.emplace_back([this, seed] { Retrieve(seed); });
    threads.emplace_back([this] { Snapshots(); });
    threads.emplace_back([this] { BadRequests(); });
    while (Going()) {
      each_second();
      absl::SleepFor(absl::Seconds(1));
    }
    for (std::thread& thread : threads) thread.join();
    return failures_;
  }

  std::string Done() const {
    std::ostringstream out;
    const char* separator = "";
    for (const auto& [what, n] : done_) {
      out << separator << "\"" << what << "\": " << n;
      separator = ", ";
    }
    return out.str();
  }

 private:
  bool Going() const { return absl::Now() < until_ && failures_ < 10; }

  std::unique_ptr<MemoryClient> Connect() const {
    MemoryClientOptions options;
    options.target = target_;
    return *MemoryClient::Create(options);
  }

  void Expect(const std::string& what, const absl::Status& status,
              absl::StatusCode code = absl::StatusCode::kOk) {
    std::lock_guard lock(mutex_);
    ++done_[what];
    if (status.code() == code) return;
    ++failures_;
    std::cerr << "soak: " << what << ": " << status << "\n";
  }

  v1::Entry EntryOf(uint64_t n, uint64_t document) const {
    v1::Entry entry;
    v1::Source& source = *entry.mutable_source();
    source.set_document_id(absl::StrCat("doc", document));
    source.set_ordinal(static_cast<uint32_t>(n % 20));
    source.set_title(absl::StrCat("Title ", document));
    source.set_text(absl::StrCat("The text of reference ", n));
    (*source.mutable_metadata())["number"] = absl::StrCat(n);
    entry.set_record_id(IdOf(n));
    const std::vector<float> vector = MakeVector(n);
    entry.mutable_embedding()->Add(vector.begin(), vector.end());
    return entry;
  }

  void Write(uint64_t seed) {
    std::mt19937_64 random(seed);
    const std::unique_ptr<MemoryClient> client = Connect();
    while (Going()) {
      const std::shared_lock changing = Changing();
      const auto writer = client->Put("live", random() % 4 != 0);
      for (int i = 0; i < 8; ++i) {
        const uint64_t n = random() % kNumbers;
        (void)writer->Write(EntryOf(n, random() % kDocuments), records_[n]);
      }
      Expect("put", writer->Finish().status());
      if (random() % 3 == 0) {
        v1::DeleteDocumentsRequest request;
        request.set_knowledge_base("live");
        request.add_document_ids(absl::StrCat("doc", random() % kDocuments));
        Expect("delete documents", client->Call(&Stub::DeleteDocuments, request).status());
      }
      if (random() % 3 == 0) {
        v1::DeleteRecordsRequest request;
        request.set_knowledge_base("live");
        request.add_record_ids(IdOf(random() % kNumbers));
        Expect("delete records", client->Call(&Stub::DeleteRecords, request).status());
      }
    }
  }

  // Loads into their own knowledge base, each published, sometimes taken back and published again;
  // the three newest versions stay.
  void LoadLoop() {
    std::mt19937_64 random(9);
    const std::unique_ptr<MemoryClient> client = Connect();
    for (uint64_t l = 0; Going(); ++l) {
      const std::shared_lock changing = Changing();
      v1::BeginLoadRequest begin;
      begin.set_knowledge_base("loaded");
      begin.set_idempotency_key(absl::StrCat("load ", l));
      begin.set_mode(l % 16 == 15 ? v1::LOAD_MODE_REPLACE : v1::LOAD_MODE_APPEND);
      const absl::StatusOr<v1::BeginLoadResponse> begun = client->Call(&Stub::BeginLoad, begin);
      Expect("begin load", begun.status());
      if (!begun.ok()) return;
      const std::string id = begun->load().load_id();
      const auto writer = client->PutLoad(id);
      for (int i = 0; i < 40; ++i) {
        const uint64_t n = random() % kNumbers;
        (void)writer->Write(EntryOf(n, random() % kDocuments), records_[n]);
      }
      Expect("put load", writer->Finish().status());
      if (l % 8 == 5) {
        v1::AbortLoadRequest abort;
        abort.set_load_id(id);
        Expect("abort load", client->Call(&Stub::AbortLoad, abort).status());
        continue;
      }
      v1::CommitLoadRequest commit;
      commit.set_load_id(id);
      commit.set_wait(true);
      Expect("commit load", client->Call(&Stub::CommitLoad, commit).status());
      v1::ListVersionsRequest list;
      list.set_knowledge_base("loaded");
      const absl::StatusOr<v1::ListVersionsResponse> versions =
          client->Call(&Stub::ListVersions, list);
      Expect("list versions", versions.status());
      if (!versions.ok()) return;
      const int n = versions->versions_size();
      if (l % 4 == 3 && n > 1) {
        for (int v : {n - 2, n - 1}) {
          v1::RollbackRequest rollback;
          rollback.set_knowledge_base("loaded");
          rollback.set_version(versions->versions(v).version());
          Expect("rollback", client->Call(&Stub::Rollback, rollback).status());
        }
      }
      for (int v = 0; v + 3 < n; ++v) {
        v1::DropVersionRequest drop;
        drop.set_knowledge_base("loaded");
        drop.set_version(versions->versions(v).version());
        Expect("drop version", client->Call(&Stub::DropVersion, drop).status());
      }
    }
  }

  void Retrieve(uint64_t seed) {
    std::mt19937_64 random(seed);
    const std::unique_ptr<MemoryClient> client = Connect();
    while (Going()) {
      const std::unique_ptr<RetrieveStream> stream = client->OpenRetrieve();
      std::set<std::string> held;
      for (int i = 0; i < 200 && Going(); ++i) {
        v1::RetrieveRequest request;
        request.set_knowledge_base(random() % 2 == 0 ? "live" : "loaded");
        while (held.size() > 50) {
          request.mutable_evicted()->append(*held.begin());
          held.erase(held.begin());
        }
        for (int q = 0; q < 3; ++q) {
          const std::vector<float> vector = MakeVector(random() % kNumbers);
          request.add_queries()->mutable_embedding()->Add(vector.begin(), vector.end());
          request.mutable_queries(q)->set_top_k(5);
        }
        const absl::StatusOr<RetrieveAnswer> answer = stream->Retrieve(std::move(request));
        Expect("retrieve", answer.status());
        if (!answer.ok()) return;
        for (const auto& query : answer->hits.queries()) {
          for (const auto& hit : query.hits()) {
            const uint64_t n = std::stoull(hit.sources(0).metadata().at("number"));
            const auto record = answer->records.find(*RecordId::FromBytes(hit.record_id()));
            const bool here = record != answer->records.end();
            if (hit.record_id() != IdOf(n) || (here && *record->second != records_[n]) ||
                (!here && held.count(hit.record_id()) == 0)) {
              Expect("retrieve", absl::InternalError(absl::StrCat("a wrong hit for ", n)));
            }
            held.insert(hit.record_id());
          }
        }
      }
    }
  }

  // Held over changes that a restore in their midst would make fail. Retrievals hold nothing: they
  // go on throughout.
  std::shared_lock<std::shared_mutex> Changing() {
    { const std::lock_guard next(turnstile_); }  // lets the one who restores in
    return std::shared_lock(restoring_);
  }

  void Snapshots() {
    const std::unique_ptr<MemoryClient> client = Connect();
    for (uint64_t s = 0; Going(); ++s) {
      v1::CreateSnapshotRequest create;
      create.set_name(absl::StrCat("soak-", s));
      {
        const std::lock_guard next(turnstile_);
        const std::unique_lock alone(restoring_);  // no load is open in it
        Expect("create snapshot", client->Call(&Stub::CreateSnapshot, create).status());
      }
      Expect("list snapshots",
             client->Call(&Stub::ListSnapshots, v1::ListSnapshotsRequest()).status());
      if (s % 4 == 3) {
        absl::SleepFor(absl::Seconds(1));  // for changes to be taken back
        const std::lock_guard next(turnstile_);
        const std::unique_lock alone(restoring_);
        v1::RestoreSnapshotRequest restore;
        restore.set_name(create.name());
        Expect("restore snapshot", client->Call(&Stub::RestoreSnapshot, restore).status());
      }
      v1::DeleteSnapshotRequest remove;
      remove.set_name(create.name());
      Expect("delete snapshot", client->Call(&Stub::DeleteSnapshot, remove).status());
      absl::SleepFor(absl::Seconds(2));
    }
  }

  void BadRequests() {
    const std::unique_ptr<MemoryClient> client = Connect();
    while (Going()) {
      v1::CountRequest unknown;
      unknown.set_knowledge_base("nothing");
      Expect("unknown knowledge base", client->Call(&Stub::Count, unknown).status(),
             absl::StatusCode::kNotFound);
      v1::Entry entry = EntryOf(1, 1);
      entry.mutable_embedding()->RemoveLast();
      const auto writer = client->Put("live");
      (void)writer->Write(entry, records_[1]);
      Expect("wrong dimension", writer->Finish().status(), absl::StatusCode::kInvalidArgument);
      std::string damaged = records_[2];
      damaged[200] = static_cast<char>(damaged[200] ^ 1);
      const auto second = client->Put("live");
      (void)second->Write(EntryOf(2, 1), damaged);
      Expect("damaged record", second->Finish().status(), absl::StatusCode::kInvalidArgument);
      absl::SleepFor(absl::Milliseconds(100));
    }
  }

  const std::string target_;
  const absl::Time until_;
  std::mutex turnstile_;
  std::shared_mutex restoring_;
  std::vector<std::string> records_;
  std::mutex mutex_;
  std::map<std::string, uint64_t> done_;
  std::atomic<uint64_t> failures_{0};
};

// MiB, from /proc.
double ResidentSize(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::strtod(line.c_str() + 6, nullptr) / 1024;
  }
  return 0;
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

int Main(int seconds, const std::string& json) {
  std::string directory = std::filesystem::temp_directory_path() / "memory_server_soak_XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) return 1;
  struct Remover {
    std::string directory;
    ~Remover() {
      std::error_code ignored;
      std::filesystem::remove_all(directory, ignored);
    }
  } remover{directory};
  ChildProcess server("memory_server", {"--data", directory + "/data", "--listen", "127.0.0.1:0",
                                        "--cache_mb", "32", "--write_buffer_mb", "4"});
  const std::optional<std::string> port = server.WaitForLine(R"(gRPC on port (\d+))");
  if (!port) {
    std::cerr << "soak: the server did not start: " << server.output() << "\n";
    return 1;
  }
  std::vector<double> sizes;
  Soak soak(absl::StrCat("localhost:", *port), absl::Now() + absl::Seconds(seconds));
  const uint64_t failures = soak.Run([&] {
    sizes.push_back(ResidentSize(server.pid()));
    if (sizes.size() % 30 == 0) {
      std::cerr << "soak: " << sizes.size() << " s, " << sizes.back() << " MiB\n";
    }
  });
  server.Signal(SIGTERM);
  const int exit_code = server.Wait();
  if (sizes.size() < 8) {
    std::cerr << "soak: too short to tell\n";
    return 1;
  }
  const auto part = [&](size_t quarter) {
    const size_t n = sizes.size() / 4;
    return Median({sizes.begin() + static_cast<ptrdiff_t>(quarter * n),
                   sizes.begin() + static_cast<ptrdiff_t>((quarter + 1) * n)});
  };
  const double early = part(1), late = part(3), most = 1.1 * early + 24;
  std::ostringstream report;
  report << "{\"seconds\": " << seconds << ", \"failures\": " << failures
         << ", \"server_exit\": " << exit_code << ", \"rss_mib_second_quarter\": " << early
         << ", \"rss_mib_last_quarter\": " << late << ", \"rss_mib_allowed\": " << most
         << ", \"done\": {" << soak.Done() << "}}";
  std::cout << report.str() << "\n";
  if (!json.empty()) std::ofstream(json) << report.str() << "\n";
  return failures == 0 && exit_code == 0 && late <= most ? 0 : 1;
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  int seconds = 600;
  std::string json;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--seconds") seconds = std::atoi(argv[i + 1]);
    if (flag == "--json") json = argv[i + 1];
  }
  return memory3::Main(seconds, json);
}
