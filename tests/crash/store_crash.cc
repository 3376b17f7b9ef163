// Kills a process that works on a store, at random moments, and looks at what is left.
//   store_crash --kills 200 [--seed N] [--directory DIR]
// The parent makes up operations, a child does them and says when each is acknowledged; the child
// dies by SIGKILL in the middle of whatever it does, opening included. Then everything acknowledged
// must be there, the operation under way must be there whole or not at all, loads and index must
// agree, and the store must take more work. Write buffers are tiny, so that flushes and compactions
// run all along.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <string>

#include "memory_server/rocksdb_store.h"
#include "memory_server/store_model.h"
#include "memory_server/store_testing.h"

namespace memory3 {
namespace {

using store_testing::Operation;
using store_testing::StoreModel;
using Clock = std::chrono::steady_clock;

constexpr int kPutSize = 20;

RocksDbStoreOptions Options(const std::string& directory) {
  RocksDbStoreOptions options;
  options.directory = directory;
  options.cache_bytes = 8 << 20;
  options.write_buffer_bytes = 64 << 10;
  options.index.flat_max = 64;  // the large index too
  options.index.recall_target = 1;
  options.index.tail_max = 16;
  options.index.build_threads = 1;
  options.merge_above = 1;  // at every turn
  return options;
}

int Child(const std::string& directory) {
  // Answers have a descriptor of their own: the store logs to standard output, and a line of its
  // log once was taken for an answer.
  FILE* answers = fdopen(dup(1), "w");
  if (answers == nullptr || dup2(2, 1) < 0) return 3;
  const auto answer = [answers](const std::string& line) {
    std::fprintf(answers, "%s\n", line.c_str());
    std::fflush(answers);
  };
  absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(Options(directory));
  if (!store.ok()) {
    answer("open: " + store.status().ToString());
    return 1;
  }
  answer("ready");
  std::string line;
  while (std::getline(std::cin, line)) {
    std::optional<Operation> op = Operation::FromLine(line);
    if (!op) return 2;
    absl::Status status = Execute(store->get(), *op);
    answer(status.ok() || absl::IsFailedPrecondition(status) ? "ok" : status.ToString());
  }
  return 0;
}

class Worker {
 public:
  Worker(const char* self, const std::string& directory) {
    int to[2], from[2];
    if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) std::abort();
    pid_ = fork();
    if (pid_ == 0) {
      dup2(to[0], 0);
      dup2(from[1], 1);
      execl(self, self, "--child", directory.c_str(), nullptr);
      _exit(3);
    }
    close(to[0]);
    close(from[1]);
    to_ = to[1];
    from_ = from[0];
  }
  ~Worker() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(to_);
    close(from_);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void Send(std::string line) {
    line.push_back('\n');
    if (write(to_, line.data(), line.size()) != static_cast<ssize_t>(line.size())) std::abort();
  }
  // A line, or "" when `until` came first.
  std::string Receive(Clock::time_point until) {
    while (true) {
      if (size_t end = read_.find('\n'); end != std::string::npos) {
        std::string line = read_.substr(0, end);
        read_.erase(0, end + 1);
        return line;
      }
      auto left = std::chrono::duration_cast<std::chrono::microseconds>(until - Clock::now());
      if (left.count() <= 0) return "";
      pollfd p{from_, POLLIN, 0};
      timespec t{left.count() / 1000000, (left.count() % 1000000) * 1000};
      if (ppoll(&p, 1, &t, nullptr) <= 0) return "";
      char buffer[4096];
      ssize_t n = read(from_, buffer, sizeof buffer);
      if (n <= 0) return "the child ended";
      read_.append(buffer, static_cast<size_t>(n));
    }
  }

 private:
  pid_t pid_;
  int to_ = -1, from_ = -1;
  std::string read_;
};

int Parent(const char* self, const std::string& directory, int kills, uint64_t seed) {
  std::mt19937_64 random(seed);
  StoreModel model;
  {
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(Options(directory));
    if (!store.ok()) {
      std::cerr << store.status() << "\n";
      return 1;
    }
    auto made = (*store)->CreateKnowledgeBase(
        "default",
        store_testing::SmallSpec(store_testing::kModelKb, store_testing::kModelDimension), false);
    if (!made.ok()) {
      std::cerr << made.status() << "\n";
      return 1;
    }
  }
  std::map<int, int> in_flight;  // by kind of operation; -1: while opening, -2: between two
  uint64_t operations = 0;
  double slowest_open = 0;
  for (int k = 0; k < kills; ++k) {
    std::optional<Operation> open_operation;
    {
      Worker child(self, directory);
      // Now and then within the opening, mostly well after it.
      const bool early = random() % 8 == 0;
      Clock::time_point until = Clock::now() + std::chrono::microseconds(random() % 30000);
      std::string line = child.Receive(early ? until : Clock::now() + std::chrono::seconds(60));
      if (line == "ready") {
        until = Clock::now() + std::chrono::microseconds(random() % 150000);
        while (true) {
          const Operation op = model.Random(&random, kPutSize);
          child.Send(op.ToLine());
          line = child.Receive(until);
          if (line == "ok") {
            model.Apply(op);
            ++operations;
            continue;
          }
          if (!line.empty()) {
            std::cerr << "kill " << k << ": operation " << op.ToLine() << ": " << line << "\n";
            return 1;
          }
          open_operation = op;
          break;
        }
      } else if (!line.empty() || !early) {
        std::cerr << "kill " << k << ": the child did not open the store: " << line << "\n";
        return 1;
      }
      ++in_flight[open_operation ? static_cast<int>(open_operation->kind) : -1];
    }  // killed
    const Clock::time_point opening = Clock::now();
    absl::StatusOr<std::unique_ptr<MemoryStore>> store = OpenRocksDbStore(Options(directory));
    if (!store.ok()) {
      std::cerr << "kill " << k << ": opening: " << store.status() << "\n";
      return 1;
    }
    slowest_open =
        std::max(slowest_open, std::chrono::duration<double>(Clock::now() - opening).count());
    // A commit that had begun goes on by itself.
    absl::StatusOr<std::vector<LoadInfo>> loads = (*store)->ListLoads("default", "");
    for (const LoadInfo& load : *loads) {
      if (load.state != LoadState::kIndexing) continue;
      absl::StatusOr<LoadInfo> done = (*store)->CommitLoad("default", load.load_id, true);
      if (!done.ok() || done->state != LoadState::kCommitted) {
        std::cerr << "kill " << k << ": load " << load.load_id << " did not resume\n";
        return 1;
      }
    }
    if (std::string bad = model.Recover(store->get(), open_operation, &random); !bad.empty()) {
      std::cerr << "kill " << k << " of seed " << seed << ": " << bad << "\n";
      if (open_operation) std::cerr << "operation: " << open_operation->ToLine() << "\n";
      return 1;
    }
  }
  std::cout << kills << " kills, " << operations
            << " acknowledged operations, none lost; killed in";
  const char* names[] = {"put",        "delete documents", "delete records",
                         "begin load", "put load",         "commit",
                         "abort",      "rollback",         "drop version"};
  for (const auto& [kind, n] : in_flight) {
    std::cout << " " << (kind < 0 ? "opening" : names[kind]) << ":" << n;
  }
  std::cout << "; slowest opening " << slowest_open << " s\n";
  return 0;
}

}  // namespace
}  // namespace memory3

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  int kills = 15;
  uint64_t seed = 1;
  std::string directory;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string flag = argv[i];
    if (flag == "--child") return memory3::Child(argv[i + 1]);
    if (flag == "--kills") kills = std::atoi(argv[i + 1]);
    if (flag == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (flag == "--directory") directory = argv[i + 1];
  }
  if (!directory.empty()) {
    return memory3::Parent("/proc/self/exe", directory, kills, seed);
  }
  memory3::store_testing::TemporaryDirectory temporary;
  return memory3::Parent("/proc/self/exe", temporary.path() + "/store", kills, seed);
}
